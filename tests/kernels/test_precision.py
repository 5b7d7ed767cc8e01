import pytest
import torch

from megatron_aquila.kernels.precision import apply, compute_dtype, matmul


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 1, x * 2


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ],
)
def test_sums_are_carried_in_float32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert compute_dtype(dtype) is wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matmul_is_torchs_own_where_that_is_wide_enough(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 3, 7, dtype=dtype), torch.randn(7, 2, dtype=dtype)
    assert torch.equal(matmul(a, b), a @ b)


def test_matmul_of_bfloat16_on_a_cpu_rounds_once() -> None:
    a, b = torch.randn(5, 3, 700).bfloat16(), torch.randn(700, 2).bfloat16()
    exact = a.double() @ b.double()
    # half an ulp of 8 significant bits, plus what a float32 sum of 700 terms may lose (700 * 2^-24 of the terms' size)
    bound = exact.abs() * 2**-8 + 700 * 2**-24 * (a.double().abs() @ b.double().abs())
    assert matmul(a, b).dtype is torch.bfloat16
    assert ((matmul(a, b) - exact).abs() <= bound).all()


def test_apply_is_for_functions_of_one_output() -> None:
    with pytest.raises(AssertionError, match="Pair returned tuple"):
        apply(Pair, torch.zeros(1))


def test_a_wide_product_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small whole numbers, so that every order of sums gives the same."""
    a, b = torch.randint(-4, 5, (2, 3, 8)).bfloat16(), torch.randint(-4, 5, (8, 7)).bfloat16()
    whole = matmul(a, b)
    monkeypatch.setattr("megatron_aquila.kernels.precision.WIDE_ELEMENTS", 20)
    assert torch.equal(matmul(a, b), whole)
    assert torch.equal(matmul(a, b.T.contiguous().T), whole)
