import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.parallel.rng import TILE, normal_rectangle

SHAPE = (2 * TILE + 37, TILE + 50)


def draw(
    offset: tuple[int, int] = (0, 0),
    shape: tuple[int, int] = SHAPE,
    *,
    name: str = "model.w",
    seed: int = 1,
    std: float = 0.02,
    global_shape: tuple[int, ...] = SHAPE,
) -> torch.Tensor:
    return normal_rectangle(name, seed=seed, global_shape=global_shape, offset=offset, shape=shape, std=std)


WHOLE = draw()


@given(
    rows=st.tuples(st.integers(0, SHAPE[0]), st.integers(0, SHAPE[0])),
    columns=st.tuples(*[st.integers(0, SHAPE[1])] * 2),
)
def test_any_rectangle_is_the_wholes(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    (top, bottom), (left, right) = sorted(rows), sorted(columns)
    piece = draw((top, left), (bottom - top, right - left))
    assert torch.equal(piece, WHOLE[top:bottom, left:right])


@pytest.mark.parametrize("tp", [2, 3, 8])
def test_shards_joined_are_the_whole(tp: int) -> None:
    size = (24 * tp, 300)
    whole = draw(shape=size, global_shape=size)
    by_rows = [draw((rank * 24, 0), (24, 300), global_shape=size) for rank in range(tp)]
    assert torch.equal(torch.cat(by_rows), whole)


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    taller = (SHAPE[0] + 500, SHAPE[1])
    assert torch.equal(draw(global_shape=taller), WHOLE), "padding a vocabulary must not change its rows"


def test_values_are_normal() -> None:
    n = WHOLE.numel()
    assert WHOLE.dtype is torch.float32
    assert abs(WHOLE.mean()) < 5 * 0.02 / n**0.5
    assert abs(WHOLE.std() / 0.02 - 1) < 5 / (2 * n) ** 0.5
    assert WHOLE.unique().numel() > 0.99 * n, "tiles repeat"


@pytest.mark.parametrize("other", [{"name": "model.v"}, {"seed": 2}, {"seed": 1 + 2**32}])
def test_names_and_seeds_draw_other_values(other: dict) -> None:
    """The last one draws the same values with torch's CPU generator, which reads 32 bits of a seed."""
    assert not (draw(**other) == WHOLE).float().mean() > 0.01


def test_values_do_not_change_with_a_release() -> None:
    """A run's first checkpoint can be drawn again only as long as this holds; numpy may break it, so it is watched."""
    expected = torch.tensor(
        [
            [-0.7428087592124939, 1.320434808731079, -0.08614235371351242],
            [0.2982875108718872, -1.0408191680908203, -0.8528722524642944],
        ]
    )
    assert torch.equal(draw(shape=(2, 3), std=1.0), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_shape": (8,)}, "2-D is drawn"),
        ({"offset": (1, 0)}, "is outside"),
        ({"offset": (-1, 0), "shape": (1, 1)}, "is outside"),
    ],
)
def test_what_is_not_in_the_tensor_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        draw(**arguments)
