from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.draw import draw
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate


def test_one_row_a_rank_one_column_a_unit() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), lambda action: {Op.F: 1.0, Op.B: 2.0}[action.op])
    assert draw(timeline).splitlines() == [
        "rank 0 | F0 F1 .. .. B0 B0 F2 B1 B1 .. B2 B2",
        "rank 1 | .. F0 B0 B0 F1 B1 B1 F2 B2 B2 .. ..",
    ]


def test_several_stages_a_rank_name_the_stage() -> None:
    programs = {0: [Action(Op.F, 0, 0), Action(Op.F, 1, 0)]}
    assert draw(simulate(programs, lambda action: 1.0)) == "rank 0 | 0F0 1F0"


def test_long_rows_go_on_below() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), lambda action: {Op.F: 1.0, Op.B: 2.0}[action.op])
    assert draw(timeline, width=29).splitlines() == [
        "rank 0 | F0 F1 .. .. B0 B0 F2",
        "rank 1 | .. F0 B0 B0 F1 B1 B1",
        "",
        "rank 0 | B1 B1 .. B2 B2",
        "rank 1 | F2 B2 B2 .. ..",
    ]
    assert draw(timeline, width=28).splitlines()[0] == "rank 0 | F0 F1 .. .. B0 B0"
    assert draw(timeline, width=1).splitlines()[0] == "rank 0 | F0"
