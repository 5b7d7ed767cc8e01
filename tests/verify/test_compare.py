import math
from dataclasses import replace

import pytest
import torch

from megatron_aquila.verify.compare import BOUND, bit_error, compare, compare_bits, failed, relative_error, tensors
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.observe import Observation

VALUES = {"first": torch.tensor([3.0, 4.0], dtype=torch.float64), "second": torch.ones(2, dtype=torch.float64)}
FOUND = Observation(
    outputs=VALUES,
    loss=1.0,
    gradients=VALUES,
    grad_norm=2.0,
    updated={"sgd": VALUES, "adamw": VALUES},
    next_loss={"sgd": 0.5, "adamw": 0.25},
    next_gradients=VALUES,
)


def test_the_order_is_that_of_computation() -> None:
    names = list(tensors(FOUND))
    assert names[:6] == [
        "output of first", "output of second", "loss", "gradient of second", "gradient of first", "gradient norm",
    ]  # fmt: skip
    assert names[-4:] == [
        "next loss after sgd",
        "next loss after adamw",
        "next gradient of second",
        "next gradient of first",
    ]
    assert list(tensors(FOUND, only_gradients=True)) == names[:5]


def test_the_worst_and_the_first_wrong_tensor_are_named() -> None:
    wrong = replace(FOUND, loss=1.0 + 1e-9, gradients=VALUES | {"first": VALUES["first"] * 1.5})
    row = compare("tp", Layout(tp=2), "plain", FOUND, wrong)
    assert (row.first_wrong, row.worst.tensor, row.worst.error) == ("loss", "gradient of first", 0.5)
    assert not row.holds
    assert compare("tp", Layout(tp=2), "plain", FOUND, replace(FOUND, loss=1.0 + BOUND / 2)).holds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_wrong(value: float) -> None:
    assert compare("tp", Layout(), "plain", FOUND, replace(FOUND, next_loss={"sgd": value, "adamw": 0.25})).first_wrong


def test_a_tensor_that_is_missing_is_wrong() -> None:
    assert compare("pp", Layout(), "plain", FOUND, replace(FOUND, outputs={})).first_wrong == "output of first"


def test_bits() -> None:
    off = replace(FOUND, grad_norm=2.0 * (1 + 2**-52))
    assert compare_bits("pp", Layout(pp=2), Layout(), FOUND, off, "gradients").holds
    row = compare_bits("pp", Layout(pp=2), Layout(), FOUND, off, "everything")
    assert (row.first_wrong, row.against) == ("gradient norm", "one process, bit for bit")
    assert bit_error(VALUES["first"], VALUES["first"] * (1 + 2**-52)) == 2 * BOUND
    assert relative_error(torch.zeros(2), torch.tensor([3.0, 4.0])) == 5.0


def test_a_failed_run_says_where() -> None:
    text = (
        "observe_rank failed on rank 1 of 2:\nTraceback\n  File\nmegatron_aquila.errors.ScheduleError: bad\nrank 0: x"
    )
    row = failed("pp", Layout(pp=2), "plain", text)
    assert row.first_wrong == "observe_rank failed on rank 1 of 2: megatron_aquila.errors.ScheduleError: bad"
    assert not row.holds
