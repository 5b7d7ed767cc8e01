import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.kernels.fp8 import Quantized, product, product_reference, quantized

FORMATS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # bits of mantissa


def normal(rows: int, columns: int, *, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, columns) * scale).to(torch.bfloat16)


def widened(x: Quantized) -> torch.Tensor:
    return x.values.double() * x.scale


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(exponent=st.integers(-100, 120))
def test_every_normal_value_keeps_its_leading_bits(dtype: torch.dtype, exponent: int) -> None:
    x = normal(16, 32, scale=2.0**exponent)
    result = quantized(x, dtype)
    bits = FORMATS[dtype]
    # half a unit of the last place, or of the smallest normal number's where a value lies below that
    allowed = (x.double().abs() * 2.0**-bits).clamp(min=torch.finfo(dtype).tiny * 2.0**-bits * result.scale) / 2
    assert ((widened(result) - x.double()).abs() <= allowed).all()
    top = torch.finfo(dtype).max
    assert top / 4 < result.values.double().abs().max() <= top
    assert torch.frexp(result.scale).mantissa == 0.5, "the scale is no power of two"


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_round_alike_in_any_part_of_a_matrix(dtype: torch.dtype) -> None:
    x = normal(64, 32)
    x[0] *= 100  # the first half has another largest value than the second
    whole, halves = widened(quantized(x, dtype)), [widened(quantized(half, dtype)) for half in x.split(32)]
    smallest_normal = torch.finfo(dtype).tiny * quantized(x, dtype).scale
    is_normal = x.double().abs() >= smallest_normal
    assert is_normal.double().mean() > 0.99
    assert torch.equal(whole[is_normal], torch.cat(halves)[is_normal])
    # with the usual scale, the largest value to the top of the range, they would not
    top = torch.finfo(dtype).max

    def usual(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max().double() / top
        return (x.double() / scale).to(dtype).double() * scale

    assert not torch.equal(usual(x)[is_normal], torch.cat([usual(half) for half in x.split(32)])[is_normal])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.0, 2.0**-133, -1.0, 448.0, 57344.0, torch.finfo(torch.bfloat16).max])
def test_constant_matrices(dtype: torch.dtype, value: float) -> None:
    x = torch.full((16, 16), value, dtype=torch.bfloat16)
    back = widened(quantized(x, dtype))
    assert ((back - x.double()).abs() <= max(abs(value) / 16, 2.0**-130)).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_never_becomes_a_number(value: float) -> None:
    x = normal(16, 16)
    x[3, 5] = value
    y = product(quantized(x, torch.float8_e5m2), quantized(normal(32, 16), torch.float8_e4m3fn), torch.bfloat16)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_product_is_the_reference(dtype: torch.dtype) -> None:
    a, b = quantized(normal(48, 320), torch.float8_e5m2), quantized(normal(80, 320), torch.float8_e4m3fn)
    ours, reference = product(a, b, dtype), product_reference(a, b, dtype)
    assert ours.dtype is reference.dtype is dtype
    exact = widened(a) @ widened(b).T
    # 320 terms summed in float32 in any order, and one rounding to the type of the result
    bound = 320 * 2.0**-24 * (widened(a).abs() @ widened(b).abs().T) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((ours.double() - exact).abs() <= bound).all()
    assert ((reference.double() - exact).abs() <= bound).all()


def test_sizes_that_tensor_cores_do_not_take_are_our_mistake() -> None:
    a, b = quantized(normal(16, 24), torch.float8_e4m3fn), quantized(normal(16, 24), torch.float8_e4m3fn)
    for multiply in (product, product_reference):
        with pytest.raises(AssertionError, match=r"sizes \[16, 24, 16, 24\] are not all multiples of 16"):
            multiply(a, b, torch.bfloat16)
