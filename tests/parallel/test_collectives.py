import importlib.util
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.parallel import collectives as c
from megatron_aquila.parallel.context import Group
from tests.parallel.worlds import on_ranks, tp_group

DTYPES = [torch.float64, torch.bfloat16, torch.int64]


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Small whole numbers, exact in every dtype; any rank can tell what another one holds."""
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def check_plain(size: int, dtype: torch.dtype) -> None:
    group, shape = tp_group(size), (4, 8, 3)
    all_ranks = [of_rank(rank, shape, dtype) for rank in range(size)]
    total = torch.stack(all_ranks).sum(0).to(dtype)
    mine = all_ranks[group.rank]
    assert torch.equal(c.all_reduce_(mine.clone(), group), total)
    assert torch.equal(c.all_reduce_(mine.clone(), group, "max"), torch.stack(all_ranks).amax(0))
    assert torch.equal(c.all_reduce_(mine.clone(), group, "min"), torch.stack(all_ranks).amin(0))
    assert torch.equal(c.all_gather(mine, group), torch.cat(all_ranks))
    assert torch.equal(c.reduce_scatter(mine, group), total.chunk(size)[group.rank])
    transposed = mine.transpose(0, 1)  # not contiguous
    assert torch.equal(c.all_gather(transposed, group), torch.cat([x.transpose(0, 1) for x in all_ranks]))
    assert torch.equal(c.reduce_scatter(transposed, group), total.transpose(0, 1).chunk(size)[group.rank])


def check_flat(size: int) -> None:
    group, length = tp_group(size), 6
    fulls = [of_rank(rank, (size * length,)) for rank in range(size)]
    full, total = fulls[group.rank].clone(), torch.stack(fulls).sum(0)
    apart = torch.empty(length, dtype=torch.float64)
    c.begin_reduce_scatter_flat_(apart, full, group, overlap=False).wait()
    within = full.view(size, length)[group.rank]
    c.begin_reduce_scatter_flat_(within, full, group, overlap=True).wait()
    assert torch.equal(apart, total.view(size, length)[group.rank])
    assert torch.equal(within, apart)
    gathered = torch.empty(size * length, dtype=torch.float64)
    c.begin_all_gather_flat_(gathered, apart, group, overlap=False).wait()
    c.begin_all_gather_flat_(full, within, group, overlap=True).wait()
    assert torch.equal(gathered, total)
    assert torch.equal(full, total)


def pending_equal_done(size: int) -> None:
    """What is begun is, after the wait, what the plain collective gives; waiting again gives it again."""
    group = tp_group(size)
    mine = of_rank(group.rank, (4, 8, 3)).mul(0.1)
    for begin in (c.begin_all_gather, c.begin_reduce_scatter, c.begin_all_reduce_):
        done, pending = (begin(mine.clone(), group, overlap=overlap) for overlap in (False, True))
        assert torch.equal(pending.wait(), done.wait())
        assert pending.wait() is pending.wait()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_begun_is_done_after_the_wait(pool, size: int) -> None:
    on_ranks(pool, size, pending_equal_done)


def drawn(rank: int, length: int) -> torch.Tensor:
    """Numbers whose sum depends on its order."""
    return torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float32)


def sums_of(size: int, length: int, dtype: torch.dtype | None, in_rank_order: bool) -> torch.Tensor:
    group = tp_group(size)
    out = torch.empty(length // size)
    how = {"dtype": dtype, "in_rank_order": in_rank_order}
    full = drawn(group.rank, length)
    assert c.begin_reduce_scatter_flat_(out, full, group, overlap=True, **how).wait() is out
    within = full.view(size, -1)[group.rank]
    c.begin_reduce_scatter_flat_(within, full, group, overlap=False, **how).wait()
    assert torch.equal(within, out), "overlap and place change nothing"
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_in_rank_order_are_those_of_one_process(pool, size: int) -> None:
    expected = drawn(0, 4096)
    for rank in range(1, size):
        expected += drawn(rank, 4096)
    assert torch.equal(torch.cat(on_ranks(pool, size, sums_of, 4096, None, True)), expected)
    plain = torch.cat(on_ranks(pool, size, sums_of, 4096, None, False))
    assert torch.equal(plain, expected) is (size <= 2), "a backend that sums in rank order would prove nothing here"


@pytest.mark.parametrize("in_rank_order", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_of_what_travels_in_bf16(pool, size: int, in_rank_order: bool) -> None:
    """Each rank's number is rounded once; without an order the partial sums are, too. Alone nothing travels."""
    numbers = torch.stack([drawn(rank, 4096) for rank in range(size)]).double()
    found = torch.cat(on_ranks(pool, size, sums_of, 4096, torch.bfloat16, in_rank_order))
    roundings = 0 if size == 1 else 1 if in_rank_order else size
    # half an ulp of 8 significant bits each, of no more than the sum of sizes; float32's own are 2^16 times smaller
    bound = numbers.abs().sum(0) * (1.02 * roundings * 2**-8 + size * 2**-24)
    off = (found.double() - numbers.sum(0)).abs()
    assert (off <= bound).all()
    assert size == 1 or off.max() > 100 * 2**-24, "it did travel in bf16"


def check_objects(size: int) -> None:
    group = tp_group(size)
    value = {"rank": group.rank, "words": ["智源"] * group.rank, "none": None, "x": 0.1}
    expected = [{"rank": rank, "words": ["智源"] * rank, "none": None, "x": 0.1} for rank in range(size)]
    assert c.gather_objects(value, group) == expected
    c.barrier(group)


def check_no_warnings(size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_plain(size, torch.float64)
        check_flat(size)


def check_older_names(size: int) -> None:
    """A second copy of the module, loaded as on torch 2.11."""
    spec = importlib.util.spec_from_file_location("collectives_2_11", c.__file__)
    assert spec is not None
    assert spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(dist, "all_gather_single", None, create=True),
        mock.patch.object(dist, "reduce_scatter_single", None, create=True),
    ):
        spec.loader.exec_module(older)
    assert older._all_gather_single is dist.all_gather_into_tensor
    group, mine = tp_group(size), of_rank(tp_group(size).rank, (4, 8))
    assert torch.equal(older.all_gather(mine, group), c.all_gather(mine, group))
    assert torch.equal(older.reduce_scatter(mine, group), c.reduce_scatter(mine, group))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_collectives(pool, size: int, dtype: torch.dtype) -> None:
    on_ranks(pool, size, check_plain, dtype)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", [check_flat, check_objects])
def test_flat_collectives_and_objects(pool, size: int, check) -> None:
    on_ranks(pool, size, check)


def test_no_deprecated_name_is_used(pool) -> None:
    on_ranks(pool, 2, check_no_warnings)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_names_of_torch_2_11_work_too(pool) -> None:
    on_ranks(pool, 2, check_older_names)


# Adjoints: for a linear map A, <A x, y> must equal <x, A^T y>. A replicated tensor is one tensor however many ranks
# hold it, so its inner product is taken once; others are taken on each rank and summed.
ADJOINTS = [
    (c.reduce_from, "own", "replicated"),
    (c.scatter_sequence, "own", "own"),
]


def inner(a: torch.Tensor, b: torch.Tensor, kind: str, group: Group) -> torch.Tensor:
    product = (a * b).sum()
    return product if kind == "replicated" else c.all_reduce_(product, group)


def adjoint_errors(size: int, number: int) -> tuple[float, float, float]:
    """|<A x, y> - <x, g>| over the size of its terms, for the gradient g, for size * g and for no gradient."""
    collective, kind_in, kind_out = ADJOINTS[number]
    group = tp_group(size)

    def random(kind: str, shape: torch.Size) -> torch.Tensor:
        seed = 7 if kind == "replicated" else 70 + group.rank
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    x = random(kind_in, torch.Size((8, 3, 5))).requires_grad_()
    ax = collective(x, group)
    y = random(kind_out, ax.shape)
    (grad,) = torch.autograd.grad(ax, x, y)
    assert grad.shape == x.shape
    left = inner(ax.detach(), y, kind_out, group)
    size_of_terms = inner(ax.detach().abs(), y.abs(), kind_out, group)
    guesses = (grad, size * grad, torch.zeros_like(grad))
    right = [inner(x.detach(), guess, kind_in, group) for guess in guesses]
    return tuple(float((left - one).abs() / size_of_terms) for one in right)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("number", range(len(ADJOINTS)), ids=[f.__name__ for f, *_ in ADJOINTS])
def test_each_backward_is_the_adjoint_of_its_forward(pool, size: int, number: int) -> None:
    tolerance = 1e-14  # at most 480 products summed in float64, relative to the sum of their sizes
    for error, times_size, zero in on_ranks(pool, size, adjoint_errors, number):
        assert error <= tolerance
        assert size == 1 or times_size > 10 * tolerance
        assert zero > 10 * tolerance


def backward_without_gather(size: int, number: int) -> str:
    """``scatter_sequence`` whose backward forgets the other ranks."""
    with mock.patch.object(c, "all_gather", lambda x, group: x), pytest.raises(RuntimeError) as error:
        adjoint_errors(size, number)
    return str(error.value)


def test_a_backward_without_its_collective_shows(pool) -> None:
    number = [f for f, *_ in ADJOINTS].index(c.scatter_sequence)
    assert all("invalid gradient" in message for message in on_ranks(pool, 4, backward_without_gather, number))


def unequal_split(size: int) -> None:
    group = tp_group(size)
    with pytest.raises(AssertionError, match=r"shape \(5, 2\) does not split over the 2 ranks of tp"):
        c.reduce_scatter(torch.zeros(5, 2), group)
    for flat in (c.begin_all_gather_flat_, lambda a, b, *args, **how: c.begin_reduce_scatter_flat_(b, a, *args, **how)):
        with pytest.raises(AssertionError, match="2 shards of 4 are not 9"):
            flat(torch.zeros(9), torch.zeros(4), group, overlap=False)


def test_what_does_not_split_is_refused_before_anything_is_sent(pool) -> None:
    on_ranks(pool, 2, unequal_split)


def test_a_group_without_processes_cannot_talk() -> None:
    with pytest.raises(AssertionError, match="group tp of 2 has no process group"):
        c.barrier(Group("tp", 0, 2, (0, 1), None))
