"""The picture is well-formed, and its boxes stand where the timelines say."""

from xml.etree import ElementTree

import pytest

from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import Timeline, simulate
from megatron_aquila.pipeline.svg import COLOURS, IDLE, LEFT, RIGHT, ROW, WIDTH, Panel, _round_step, svg

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str, ranks: int, microbatches: int) -> Timeline:
    return simulate(build_schedule(name, ranks, microbatches), lambda action: 1.0)


def panel(one: Timeline, title: str = "title") -> Panel:
    return Panel(timeline=one, title=title, note="note")


def boxes(text: str) -> list[tuple[str, dict[str, str]]]:
    """Every action's name and the attributes of its box."""
    root = ElementTree.fromstring(text)
    return [(title.text or "", box.attrib) for box in root.iter(f"{SVG}rect") for title in box.iter(f"{SVG}title")]


def words(text: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(text).iter(f"{SVG}text")]


def test_every_action_has_its_box() -> None:
    drawn_one = timeline("zb-v", 2, 3)
    drawn = dict(boxes(svg([panel(drawn_one)], "heading")))
    assert set(drawn) == {str(action) for action in drawn_one.start}
    scale = (WIDTH - LEFT - RIGHT) / drawn_one.makespan
    tops = []
    for rank, program in drawn_one.schedule.items():
        for action in program:
            box = drawn[str(action)]
            assert float(box["x"]) == pytest.approx(LEFT + drawn_one.start[action] * scale, abs=0.01)
            assert float(box["width"]) == pytest.approx(scale, abs=0.01)
            tops.append(float(box["y"]) - rank * ROW)
    assert len(set(tops)) == 1
    assert {drawn[f"0{op}0"]["fill"] for op in "FIW"} == {COLOURS[op] for op in "FIW"}  # type: ignore[index]
    assert len({drawn[f"{stage}F0"]["fill"] for stage in (0, 3)}) == 2, "the second chunk is paler"


def test_panels_share_a_scale_and_do_not_overlap() -> None:
    long, short = timeline("gpipe", 2, 4), timeline("1f1b", 2, 2)
    drawn = boxes(svg([panel(long, "the long"), panel(short, "the short")], "heading"))
    first, second = drawn[: len(long.start)], drawn[len(long.start) :]
    assert [name for name, _ in second] == [str(action) for program in short.schedule.values() for action in program]
    assert {box["width"] for _, box in first} == {box["width"] for _, box in second}
    assert max(float(box["y"]) for _, box in first) + ROW < min(float(box["y"]) for _, box in second)
    texts = words(svg([panel(long, "the long"), panel(short, "the short")], "heading"))
    assert {"heading", "the long", "the short", "note", "rank 0", "rank 1"} <= set(texts)
    assert [text for text in texts if text in ("F forward", "B backward", "waiting")] == [
        "F forward",
        "B backward",
        "waiting",
    ]


def test_waiting_reaches_to_the_end_of_the_step() -> None:
    one = timeline("1f1b", 2, 1)
    text = svg([panel(one)], "heading")
    waiting = [box for box in ElementTree.fromstring(text).iter(f"{SVG}rect") if box.attrib["fill"] == IDLE]
    assert [float(box.attrib["width"]) for box in waiting] == [WIDTH - LEFT - RIGHT] * 2 + [14], "ranks and the legend"


def test_peak_activations_stand_beside_their_rank() -> None:
    texts = words(svg([panel(timeline("1f1b", 2, 3))], "heading"))
    assert texts[texts.index("rank 0") + 1] == "2"
    assert texts[texts.index("rank 1") + 1] == "1"


def test_texts_are_escaped_and_the_legend_has_only_what_is_there() -> None:
    text = svg([panel(timeline("1f1b", 1, 1))], "a & <b>")
    assert "a & <b>" in words(text)
    assert "F forward" in text
    assert "weight gradient" not in text
    assert "first chunk" not in text
    assert "first chunk" in svg([panel(timeline("zb-v", 2, 3))], "")


@pytest.mark.parametrize(("least", "step"), [(0.9, 1), (1, 1), (1.1, 2), (2.5, 5), (5.1, 10), (0.03, 0.05), (120, 200)])
def test_ticks_are_round(least: float, step: float) -> None:
    assert _round_step(least) == pytest.approx(step)
