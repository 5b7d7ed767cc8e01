import importlib.util
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels import products
from megatron_aquila.kernels.fp8 import PLAIN, Quantized, product
from megatron_aquila.kernels.products import BACKWARD, FORWARD, Fp8Products, fp8_products, why_not_plain
from tests.kernels.triton.common import DEVICE, draw

triton_fp8 = pytest.importorskip("megatron_aquila.kernels.triton.fp8", reason="Triton is not installed")
TRITON = triton_fp8.TritonRounding()
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
VIEWS = {"whole": lambda x: x, "part": lambda x: x[::2, : x.shape[1] // 2], "turned": lambda x: x.T}


def all_bits() -> Tensor:
    """Every finite bfloat16 once: most of them vanish beside the largest."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return bits[bits.isfinite()].view(240, 272).to(DEVICE)


def alike(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))


def rounds_alike(x: Tensor, dtype: torch.dtype) -> bool:
    """In each layout alone, and both at once."""
    ours, right = ((r.rows(x, dtype), r.columns(x, dtype), *r.both(x, dtype)) for r in (TRITON, PLAIN))
    return all(map(alike, ours, right)) and all(a.values.is_contiguous() for a in ours)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_number_is_rounded_to_the_same_bits(dtype: torch.dtype) -> None:
    for largest in (torch.inf, 2.0**-118):  # what counts lies elsewhere
        x = all_bits()
        x[x.abs() > largest] = 0
        assert all(map(alike, TRITON.both(x, dtype), PLAIN.both(x, dtype)))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-133, -1.0, 448.0, 450.0, 57344.0, torch.finfo(torch.bfloat16).max])
def test_constant_matrices(dtype: torch.dtype, value: float) -> None:
    assert rounds_alike(torch.full((16, 16), value, dtype=torch.bfloat16, device=DEVICE), dtype)


@settings(max_examples=3)
@given(
    rows=st.integers(1, 10), columns=st.integers(1, 10), exponent=st.integers(-100, 100), dtype=st.sampled_from(FORMATS)
)
@pytest.mark.parametrize("view", VIEWS)
def test_any_shape(view: str, rows: int, columns: int, exponent: int, dtype: torch.dtype) -> None:
    assert rounds_alike(VIEWS[view](draw(16 * rows, 16 * columns, dtype=torch.bfloat16) * 2.0**exponent), dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_never_becomes_a_number(value: float, dtype: torch.dtype) -> None:
    x = draw(144, 16, dtype=torch.bfloat16)
    x[131, 5] = value
    for one in (TRITON.rows(x, dtype), *TRITON.both(x, dtype)):
        assert one.scale.isnan()
    y = product(TRITON.rows(x, dtype), PLAIN.rows(draw(32, 16, dtype=torch.bfloat16), FORWARD), torch.bfloat16)
    assert y.isnan().all()


def test_products_are_the_same_bits() -> None:
    x, weight, grad_y = (draw(*sizes, dtype=torch.bfloat16) for sizes in ((8, 2, 48), (80, 48), (8, 2, 80)))

    def results(products: Fp8Products) -> list[Tensor]:
        total, gradients = torch.ones(80, 48, device=DEVICE), products.gradients(grad_y)
        gradients.add_grad_weight_(total, x)
        return [products.output(x, weight), gradients.grad_x(weight), gradients.grad_weight(x), total]

    assert all(map(torch.equal, results(Fp8Products(TRITON)), results(Fp8Products())))


def test_operands_of_another_type_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"operands are bfloat16, not torch.float32"):
        TRITON.rows(draw(16, 16), FORWARD)


MUTANTS = {
    "a sign is lost": ("rounded | (value & -0x80000000)", "rounded & 0x7FFFFFFF"),
    "cut off": ("+ units) - units)", ") - 0 * units)"),
    "a unit too coarse": ("(23 - MANTISSA)", "(24 - MANTISSA)"),
    "no small numbers": ("tl.maximum(value & 0x7F800000, TINY)", "(value & 0x7F800000)"),
    "half the scale": (">> 23) - 126", ">> 23) - 127"),
    "of the last block": ("tl.atomic_max(largest,", "tl.atomic_xchg(largest,"),
    "one block of columns": ("column = tl.program_id(1).to", "column = 0 * tl.program_id(1).to"),
    "columns as rows": ("tl.trans(column * num_rows + row)", "tl.trans(row * num_columns + column)"),
    "infinity is a number": ("bits < 0x7F800000", "bits < 0x7FFFFFFF"),
    "does not compile": ("tl.div_rn(", "tl.no_such_function("),
}


def test_the_right_one_passes_the_trial() -> None:
    assert why_not_plain(TRITON, DEVICE) is None


@pytest.mark.parametrize("what", MUTANTS)
def test_wrong_ones_are_refused(what: str, tmp_path: Path) -> None:
    right, wrong = MUTANTS[what]
    source = Path(triton_fp8.__file__).read_text(encoding="utf-8")
    assert right in source, f"there is no {right!r}"
    (tmp_path / "mutant_fp8.py").write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant_fp8", tmp_path / "mutant_fp8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    why = why_not_plain(module.TritonRounding(), DEVICE)
    assert why is not None
    assert why.startswith("rounding by Triton fails: ") == (what == "does not compile"), why


def on_a_gpu(why: str | None) -> Fp8Products:
    """What is chosen on a GPU whose trial says ``why``."""
    with (
        mock.patch.object(products, "_why_refused", return_value=None),
        mock.patch.object(products, "why_unfit", return_value=None),
        mock.patch.object(products, "why_not_plain", return_value=why),
    ):
        return fp8_products(torch.device("cuda"))


def test_a_gpu_rounds_by_them_where_the_trial_lets_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(on_a_gpu(None).rounding, triton_fp8.TritonRounding)
    with pytest.warns(RuntimeWarning, match=r"^kernels: it errs; torch's operations round to 8 bits instead"):
        assert on_a_gpu("it errs").rounding is PLAIN


def test_both_layouts_are_as_long_as_what_they_are_of() -> None:
    """So that a backward that owes a weight's gradient keeps no more than it does in bfloat16."""
    grad_y = draw(16, 2, 48, dtype=torch.bfloat16)
    for rounding in (TRITON, PLAIN):
        kept = rounding.both(grad_y.flatten(0, -2), BACKWARD)
        assert sum(one.values.nbytes for one in kept) == grad_y.nbytes
