import itertools
from collections.abc import Callable

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.cli import load_config
from megatron_aquila.verify.layout import Layout, with_layout
from megatron_aquila.verify.matrix import AXES, LARGEST, MatrixCase, matrix_cases, matrix_config, run_case, twin_of
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import shrink
from tests.verify.test_parity import CONFIG


def test_every_value_of_every_axis_is_met() -> None:
    cases = matrix_cases()
    for name, values in AXES.items():
        met = {case.documents if name == "documents" else getattr(case.layout, name) for case in cases}
        assert met == set(values)
    assert {(case.layout.tp, case.layout.pp) for case in cases} == {*itertools.product((1, 2, 4), repeat=2)} - {(4, 4)}


@pytest.mark.parametrize("case", matrix_cases(), ids=str)
def test_a_run_could_be_set_so(case: MatrixCase) -> None:
    small = with_layout(shrink(matrix_config(CONFIG, documents=case.documents), LARGEST), case.layout)
    assert [str(problem) for problem in check(small, case.layout.world_size)] == []


@pytest.mark.parametrize("preset", ["aquila-7b", "llama-2-7b", "baichuan2-7b", "baichuan2-13b"])
def test_the_sizes_of_every_family_split_in_every_case(preset: str) -> None:
    config = load_config(["--preset", preset]).config
    for case in matrix_cases():
        small = with_layout(shrink(matrix_config(config, documents=case.documents), LARGEST), case.layout)
        assert [str(problem) for problem in check(small, case.layout.world_size)] == [], case


def test_bits_are_due_where_no_sum_is_split() -> None:
    assert twin_of(Layout(pp=2, micro_batch=2, recompute="full")) == Layout(micro_batch=2)
    assert twin_of(Layout(tp=2)) is None
    assert twin_of(Layout(dp=2)) is None
    assert twin_of(Layout(micro_batch=2)) is None


def test_a_case_is_held_against_both_references(pool: Callable[[int], WorkerPool]) -> None:
    parity = Parity(matrix_config(CONFIG, documents=True), Layout(pp=2), pool)
    case = MatrixCase(layout=Layout(pp=2, schedule="gpipe", micro_batch=2), documents=True)
    row = run_case(case, parity)
    assert row.holds
    assert row.bits is not None
    assert row.bits.worst.error == 0
    assert row.rows == (row.plain, row.bits)
    assert row.seconds > 0
