import pytest

from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.draw import draw, draw_to_scale, is_drawable, num_blocks, scale
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


def costs(action: Action) -> float:
    return {Op.F: 1.0, Op.B: 2.0}[action.op]


def test_blocks_are_counted() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), costs)
    for width in (1, 28, 29, 45, 46, 1000):
        assert num_blocks(timeline, width) == draw(timeline, width).count("\n\n") + 1


def test_at_a_scale_equal_times_are_equally_long() -> None:
    short, long = (simulate(build_schedule("1f1b", 2, count), costs) for count in (3, 6))
    column = scale([short, long], width=9 + 45)
    assert column == 0.5, "21 units have room for two characters each"
    assert draw_to_scale(short, column).splitlines() == [
        "rank 0 | F0F1....B0bbF2B1bb..B2bb",
        "rank 1 | ..F0B0bbF1B1bbF2B2bb....",
    ]
    assert len(draw_to_scale(long, column).splitlines()[0]) == 9 + 42


def test_what_is_shorter_than_a_character_is_not_drawn() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), costs)
    assert [is_drawable(timeline, column) for column in (0.5, 1.0, 2.0)] == [True, True, False]
    with pytest.raises(AssertionError, match="shorter than 2"):
        draw_to_scale(timeline, 2.0)


def test_the_scale_is_a_whole_multiple_where_room_is_short() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3), costs)
    assert [scale([timeline], 9 + room) for room in (1, 5, 6, 11, 12, 23, 24)] == [12, 3, 2, 2, 1, 1, 0.5]
    assert scale([timeline], 0) == 12
