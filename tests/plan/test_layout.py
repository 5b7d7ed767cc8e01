import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.layout import LayoutError, layout_layers


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("EtL", (1,)),
        ("Ett|ttL", (2, 2)),
        ("E|t*3|L", (0, 3, 0)),
        ("Et*3|(tt|)*29,L", (3, *[2] * 29, 0)),
        ("Et*2|(|)*0(t|t)*2|t L", (2, 1, 2, 1, 1)),
        ("(Et|)*1tL", (1, 1)),
    ],
)
def test_megatrons_words(layout, layers):
    assert layout_layers(layout) == layers


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_what_is_written_is_read(layers):
    assert layout_layers("E" + "|".join(f"t*{count}" for count in layers) + "L") == tuple(layers)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("Et*3|(tt|)*29,m|L", "multi-token prediction, its m, is not offered"),
        ("Et|x|L", "x is neither"),
        ("E(t|t)tL", r"\( \) is neither"),
        ("Et*1000L", r"\* 0 1 is neither"),
        ("E((t)*2)*2L", r"\( \) \* 2 is neither"),  # groups do not nest
        ("ttL", "the model is one E first"),
        ("EttLt", "the model is one E first"),
        ("EtEtL", "the model is one E first"),
        ("", "the model is one E first"),
        ("Et||tL", "stage 1 of 3 holds nothing"),
        ("EtL|", "stage 1 of 2 holds nothing"),
    ],
)
def test_what_is_no_layout_is_said(layout, why):
    with pytest.raises(LayoutError, match=why):
        layout_layers(layout)
