import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.rope import apply_rope, rope_qkv_, rope_qkv_triton_, rope_tables
from tests.kernels.triton.common import DEVICE, DTYPES, EPS32, draw, exact, outcome, unit, worst

PAIRINGS = [False, True]


def tables(seq_len: int, num_samples: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sample begins elsewhere, so that no two tokens turn alike."""
    positions_BS = torch.arange(seq_len, device=DEVICE) + 37 * torch.arange(num_samples, device=DEVICE)[:, None]
    return rope_tables(positions_BS, head_dim=head_dim, base=100.0, dtype=dtype)


def as_queries(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """``x`` turned by the kernel, as the queries of a projection."""
    qkv = torch.cat((x.flatten(-2), x.new_zeros(*x.shape[:2], 2 * x.shape[3])), dim=-1)
    q, _, _ = rope_qkv_triton_(qkv, cos, sin, num_heads=x.shape[2], num_kv_heads=1, interleaved=interleaved)
    return q


def held(x: Tensor, grad: Tensor, *, interleaved: bool, function=as_queries) -> float:
    """Largest error of output and gradient: one rounding to the type, and in float32 four of the pair's length."""
    cos, sin = tables(*x.shape[:2], x.shape[-1], x.dtype)
    wide = cos.double(), sin.double()
    ours = outcome(lambda x: function(x, cos, sin, interleaved=interleaved), [x], grad)
    right = exact(lambda x: apply_rope(x, *wide, interleaved=interleaved), [x], grad)
    assert all(t.dtype is x.dtype for t in ours)
    shares = []
    for found, value, source in zip(ours, right, (x, grad), strict=True):
        length = source.double().unflatten(-1, (-1, 2) if interleaved else (2, -1)).norm(dim=-1 if interleaved else -2)
        reach = length.repeat_interleave(2, dim=-1) if interleaved else torch.cat((length, length), dim=-1)
        shares.append(worst(found, value, unit(x.dtype) * value.abs() + 4 * EPS32 * reach))
    return max(shares)


@pytest.mark.parametrize("interleaved", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_with_gradients(dtype: torch.dtype, interleaved: bool) -> None:
    x, grad = draw(5, 3, 6, 20, dtype=dtype), draw(5, 3, 6, 20, dtype=dtype)
    assert held(x, grad, interleaved=interleaved) <= 1


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9).map(lambda n: 2 * n)),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_small_shape(shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype) -> None:
    assert held(draw(*shape, dtype=dtype), draw(*shape, dtype=dtype), interleaved=interleaved) <= 1


@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_gradients_that_are_views_and_heads_in_several_programs(interleaved: bool) -> None:
    x = draw(3, 2, 66, 128)
    assert held(x, draw(1).expand(x.shape), interleaved=interleaved) <= 1
    feature_first = draw(128, 2, 66, 3).transpose(0, 3)
    assert held(x, feature_first, interleaved=interleaved) <= 1


def test_the_bound_tells_wrong_answers() -> None:
    x = draw(5, 3, 6, 20, dtype=torch.bfloat16)

    def back(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
        return apply_rope(x, cos, -sin, interleaved=interleaved)

    def other_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
        return apply_rope(x, cos, sin, interleaved=not interleaved)

    for wrong in (back, other_pairs):
        assert held(x, torch.ones_like(x), interleaved=False, function=wrong) > 10


@pytest.mark.parametrize("interleaved", PAIRINGS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2)])
def test_a_projection_in_place(num_heads: int, num_kv_heads: int, interleaved: bool) -> None:
    """Forward and backward as the reference, through the linear that made the projection, in its memory."""
    heads, (cos, sin) = num_heads + 2 * num_kv_heads, tables(3, 2, 16, torch.float32)
    x, weight = draw(3, 2, 12), draw(12, heads * 16)
    grads = [draw(3, 2, n, 16) for n in (num_heads, num_kv_heads, num_kv_heads)]

    def gradients(function, *, in_place: bool) -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        qkv = x @ leaf
        parts = function(qkv, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, interleaved=interleaved)
        if in_place:
            assert [part.untyped_storage().data_ptr() for part in parts] == [qkv.untyped_storage().data_ptr()] * 3
        return [part.detach().clone() for part in parts] + [*torch.autograd.grad(parts, leaf, grads)]

    for ours, own in zip(gradients(rope_qkv_triton_, in_place=True), gradients(rope_qkv_, in_place=False), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_missing_is_zero() -> None:
    cos, sin = tables(5, 2, 16, torch.float32)
    qkv = draw(5, 2, 6 * 16).requires_grad_()
    q, k, v = rope_qkv_triton_(qkv.clone(), cos, sin, num_heads=2, num_kv_heads=2)
    for part, columns in zip((q, k, v), (slice(0, 32), slice(32, 64), slice(64, 96)), strict=True):
        (grad,) = torch.autograd.grad(part.square().sum(), qkv, retain_graph=True)
        rest = torch.ones(96, dtype=torch.bool)
        rest[columns] = False
        assert grad[..., rest].eq(0).all()
        # a rotation keeps lengths, so the gradient of their squares is twice the input
        torch.testing.assert_close(grad[..., columns], 2 * qkv[..., columns], rtol=0, atol=1e-5)


def test_in_place_is_refused_where_it_would_be_wrong() -> None:
    cos, sin = tables(5, 2, 16, torch.float32)

    def turn(qkv: Tensor) -> tuple[Tensor, ...]:
        return rope_qkv_triton_(qkv, cos, sin, num_heads=2, num_kv_heads=2)

    leaf = draw(5, 2, 6 * 16).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        turn(leaf)
    kept = leaf.exp()  # which keeps its output for backward
    q, _, _ = turn(kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()
    qkv = leaf * 2
    q, _, _ = turn(qkv)
    with pytest.raises(AssertionError, match="used after its rotation in place"):
        (q.sum() + qkv.sum()).backward()


def test_nothing_of_the_projection_is_kept_but_the_tables() -> None:
    cos, sin = tables(5, 2, 16, torch.float32)
    kept: list[Tensor] = []
    qkv = draw(5, 2, 6 * 16).requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rope_qkv_triton_(qkv, cos, sin, num_heads=2, num_kv_heads=2)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"tables \(4, 2, 16\) and \(4, 2, 16\) do not fit \(5, 2, 4, 16\)"):
        as_queries(draw(5, 2, 3, 16), *tables(4, 2, 16, torch.float32), interleaved=False)
    cos, sin = (table.transpose(0, 2).contiguous().transpose(0, 2) for table in tables(5, 2, 16, torch.float32))
    with pytest.raises(AssertionError, match="features must lie side by side"):
        as_queries(draw(5, 2, 3, 16), cos, sin, interleaved=False)
