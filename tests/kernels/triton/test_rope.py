import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.rope import apply_rope, apply_rope_triton, rope_qkv_, rope_qkv_triton_, rope_tables
from tests.kernels.triton.common import DEVICE, DTYPES, EPS32, draw, exact, outcome, unit, worst

PAIRINGS = [False, True]


def tables(seq_len: int, num_samples: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sample begins elsewhere, so that no two tokens turn alike."""
    positions_BS = torch.arange(seq_len, device=DEVICE) + 37 * torch.arange(num_samples, device=DEVICE)[:, None]
    return rope_tables(positions_BS, head_dim=head_dim, base=100.0, dtype=dtype)


def held(x: Tensor, grad: Tensor, *, interleaved: bool, function=apply_rope_triton) -> float:
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
def test_views_and_heads_in_several_programs(interleaved: bool) -> None:
    qkv = draw(3, 2, 70 * 128)
    for x in (qkv.unflatten(-1, (70, 128))[:, :, 3:69], qkv.transpose(0, 1).unflatten(-1, (-1, 64))[:, :, :2]):
        assert held(x, draw(1).expand(x.shape), interleaved=interleaved) <= 1
    feature_first = draw(8, 2, 3, 4).transpose(0, 3)
    assert held(feature_first, draw(*feature_first.shape), interleaved=interleaved) <= 1


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
    """The bits of turning q and k one by one, forward and backward, through the linear that made the projection."""
    heads, (cos, sin) = num_heads + 2 * num_kv_heads, tables(3, 2, 16, torch.float32)
    x, weight = draw(3, 2, 12), draw(12, heads * 16)
    grads = [draw(3, 2, n, 16) for n in (num_heads, num_kv_heads, num_kv_heads)]
    settings = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "interleaved": interleaved}

    def gradients(function, turn=None) -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        qkv = x @ leaf
        parts = function(qkv, cos, sin, **settings)
        if turn is None:
            assert [part.untyped_storage().data_ptr() for part in parts] == [qkv.untyped_storage().data_ptr()] * 3
        return [part.detach().clone() for part in parts] + [*torch.autograd.grad(parts, leaf, grads)]

    def one_by_one(qkv: Tensor, cos: Tensor, sin: Tensor, **settings: object) -> tuple[Tensor, ...]:
        q, k, v = torch.split(qkv.unflatten(-1, (heads, -1)), [num_heads, num_kv_heads, num_kv_heads], dim=2)
        return *(apply_rope_triton(part, cos, sin, interleaved=interleaved) for part in (q, k)), v

    ours, plain = gradients(rope_qkv_triton_), gradients(one_by_one, turn=apply_rope_triton)
    assert all(map(torch.equal, ours, plain))
    own = gradients(rope_qkv_, turn=apply_rope)
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(AssertionError, match=r"tables \(4, 2, 16\) and \(4, 2, 16\) do not fit \(5, 2, 3, 16\)"):
        apply_rope_triton(draw(5, 2, 3, 16), *tables(4, 2, 16, torch.float32))
    cos, sin = (table.transpose(0, 2).contiguous().transpose(0, 2) for table in tables(5, 2, 16, torch.float32))
    with pytest.raises(AssertionError, match="features must lie side by side"):
        apply_rope_triton(draw(5, 2, 3, 16), cos, sin)
