from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels import fp8, products
from megatron_aquila.kernels.products import FORWARD, NATIVE, Fp8Products, fp8_products

S, B, IN, OUT = 32, 2, 48, 80
# A product of operands rounded to 3 and 3, or 2 and 3, bits of mantissa: each term is off by at most 2**-4 + 2**-4, or
# 2**-3 + 2**-4, of itself; their errors are independent, so that the whole is off by less than that.
ALLOWED = {"y": 2**-3, "x": 2**-3 + 2**-4, "weight": 2**-3 + 2**-4}


def results(products, x, weight, grad_y):
    total = torch.zeros(OUT, IN)
    gradients = products.gradients(grad_y)
    gradients.add_grad_weight_(total, x)
    y, grad_x = products.output(x, weight), gradients.grad_x(weight)
    return {"y": y, "x": grad_x, "weight": gradients.grad_weight(x), "total": total}


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, B, IN), (OUT, IN), (S, B, OUT))
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def test_8_bit_products_are_near_those_of_16_bits(operands):
    native, fp8 = results(NATIVE, *operands), results(Fp8Products(), *operands)
    for name, exact in native.items():
        ours = fp8[name]
        assert (ours.shape, ours.dtype) == (exact.shape, exact.dtype)
        error = (ours.double() - exact.double()).norm() / exact.double().norm()
        assert error < ALLOWED.get(name, ALLOWED["weight"]), f"{name}: {error}"
        assert error > 0.01, f"{name} was not rounded to 8 bits: {error}"


def test_a_gradient_is_added_as_float32(operands):
    x, _, grad_y = operands
    total = torch.zeros(OUT, IN)
    gradients = Fp8Products().gradients(grad_y)
    gradients.add_grad_weight_(total, x)
    rounded = gradients.grad_weight(x)
    assert torch.equal(total.to(torch.bfloat16), rounded)
    assert not torch.equal(total, rounded.float()), "the product was rounded to 16 bits first"
    before = total.clone()
    gradients.add_grad_weight_(total, x)
    assert torch.equal(total, 2 * before)


@pytest.mark.parametrize("products", [NATIVE, Fp8Products()])
def test_an_output_may_be_written_into(products, operands):
    """The rotation of q, k and v does so, and autograd lets no Function of several outputs do it to a view."""
    x, weight, grad_y = operands
    assert not products.output(x, weight)._is_view()
    assert not products.gradients(grad_y).grad_x(weight)._is_view()


def test_a_device_is_tried():
    assert fp8_products(torch.device("cpu")) == Fp8Products(fp8.PLAIN)


def test_a_gpu_without_triton_rounds_in_more_passes_and_says_so():
    with (
        mock.patch.object(products, "_why_refused", return_value=None),
        mock.patch.dict("sys.modules", {"triton": None}),
        mock.patch.dict("os.environ", {"TRITON_INTERPRET": ""}),
        pytest.warns(RuntimeWarning, match="kernels: Triton cannot be imported: .*; torch's operations round"),
    ):
        assert fp8_products(torch.device("cuda")) == Fp8Products(fp8.PLAIN)


def as_hopper(a, b, dtype, *, promoted):
    """32 products at a time, cut to 13 bits behind the point of the largest: with what came before, or ``promoted``."""
    x, y = a.values.double(), b.values.double()
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64)
    for k in range(0, x.shape[1], 32):
        terms = x[:, None, k : k + 32] * y[None, :, k : k + 32]
        if not promoted:
            terms, total = torch.cat((terms, total[..., None]), -1), torch.zeros(())
        unit = 2.0 ** (torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent.double() - 1 - 13)
        total = total + (torch.trunc(terms / unit) * unit).sum(-1)
    return (total.float() * (a.scale * b.scale)).to(dtype)


@pytest.mark.parametrize("promoted", [False, True])
def test_the_sums_of_a_hopper_pass(promoted):
    """They are no float32 sums, which the bound for those would refuse."""
    a, b = (fp8.quantized(torch.randn(16, 64).bfloat16(), FORWARD) for _ in range(2))
    ours, exact = as_hopper(a, b, torch.float32, promoted=promoted), fp8.product_reference(a, b, torch.float32)
    assert (ours - exact).abs().max() > 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    with mock.patch.object(fp8, "product", partial(as_hopper, promoted=promoted)):
        assert isinstance(fp8_products(torch.device("cpu")), Fp8Products)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda a, b, dtype: fp8.product_reference(a, b, dtype) * 1.02, "into torch.bfloat16 is not that of"),
        (
            lambda a, b, dtype: fp8.product_reference(a, b, dtype) * (1.01 if dtype is torch.float32 else 1),
            "into torch.float32 is not that of",
        ),
        (lambda a, b, dtype: fp8.product_reference(a, b, torch.bfloat16).to(dtype), "into torch.float32 is not that"),
        (
            lambda a, b, dtype: fp8.product_reference(replace(a, scale=2 * a.scale), b, dtype),
            "product of torch.float8_e4m3fn into torch.bfloat16 is not that of",
        ),
        (lambda a, b, dtype: torch.full((32, 16), torch.nan), "is not that of the widened values; use bf16"),
        (lambda a, b, dtype: a.no_such_thing, "its products fail: AttributeError: .*; use bf16"),
    ],
)
def test_a_device_whose_products_are_wrong_is_refused(wrong, reason):
    with mock.patch.object(fp8, "product", wrong), pytest.raises(ConfigError, match=reason):
        fp8_products(torch.device("cpu"))


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_a_gpu_without_8_bit_products_is_refused(capability):
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA A100"),
        pytest.raises(ConfigError, match=r"--precision fp8: NVIDIA A100 \(compute capability [78]\.[05]\) has no fp8"),
    ):
        fp8_products(torch.device("cuda"))
