"""The picture is well-formed, and its boxes stand where the timeline says."""

from xml.etree import ElementTree

import pytest

from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate
from megatron_aquila.pipeline.svg import LABEL, ROW, TITLE, WIDTH, svg

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> dict[str, dict[str, str]]:
    """Attributes of each action's box, by the action's name."""
    root = ElementTree.fromstring(text)
    return {title.text: box.attrib for box in root.iter(f"{SVG}rect") for title in box.iter(f"{SVG}title")}


def test_every_action_has_its_box() -> None:
    timeline = simulate(build_schedule("zb-v", 2, 3), lambda action: 1.0)
    drawn = boxes(svg(timeline, "a & b"))
    assert set(drawn) == {str(action) for action in timeline.start}
    scale = (WIDTH - LABEL) / timeline.makespan
    for rank, program in timeline.schedule.items():
        for action in program:
            box = drawn[str(action)]
            assert float(box["x"]) == pytest.approx(LABEL + timeline.start[action] * scale, abs=0.01)
            assert float(box["width"]) == pytest.approx(scale, abs=0.01)
            assert float(box["y"]) == TITLE + rank * ROW + 2
    colours = {name[1]: box["fill"] for name, box in drawn.items()}
    assert len(set(colours.values())) == len(colours) == 3
    assert drawn["0F0"]["fill-opacity"] > drawn["3F0"]["fill-opacity"]


def test_texts_are_escaped_and_the_legend_has_only_what_is_there() -> None:
    text = svg(simulate(build_schedule("1f1b", 1, 1), lambda action: 1.0), "a & <b>")
    assert "a &amp; &lt;b&gt;" in text
    assert "F forward" in text
    assert "weight gradient" not in text
