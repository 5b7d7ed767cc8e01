"""The table of families: what can be seen at once is proved here, what takes long is held to be of these families."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.verify.compare import BOUND, Difference, Row, failed
from megatron_aquila.verify.huggingface import BOUND as LOGITS_BOUND
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.matrix import MatrixCase, MatrixRow, is_offered, matrix_cases
from megatron_aquila.verify.page import put
from tests.checkpoint.plain_networks import baichuan_logits
from tests.verify.families import FAMILIES, HEADER, Family, Found, cells, prove

pytest.importorskip("transformers", reason="it judges Llama's form (extra hf)")

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
CASE = MatrixCase(layout=Layout(), documents=False)
HOLDS = Row(axis="-", layout=Layout(), against="plain", worst=Difference(tensor="loss", error=1e-15), first_wrong=None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_form_of_every_family(family: Family, tmp_path: Path) -> None:
    found = prove(family, tmp_path)
    assert found.equal == found.tensors > 0
    assert 0 < found.logits < LOGITS_BOUND


def test_a_wrong_network_would_show(tmp_path: Path) -> None:
    wrong = replace(FAMILIES[-1], logits=partial(baichuan_logits, alibi=False))
    assert prove(wrong, tmp_path).logits > 100 * LOGITS_BOUND


def offered(family: Family) -> int:
    config = load_config(["--preset", family.preset], prog="families").config
    return sum(is_offered(config, case) for case in matrix_cases())


def test_the_page_shows_these_families_without_a_failure() -> None:
    """Numbers differ in their last digits from machine to machine; what they are of, and their bounds, do not."""
    table = PAGE.partition("<!-- families: ")[2].partition("<!-- /families -->")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert tuple(header) == HEADER
    assert [row[0] for row in rows] == [family.name for family in FAMILIES], "run the command in the page again"
    for row, family in zip(rows, FAMILIES, strict=True):
        _, cases, parity, read, written, back, logits = row
        assert int(cases) == offered(family), "run the command in the page again"
        assert float(parity) <= BOUND
        assert (read, written) == (", ".join(family.forms), family.written)
        equal, _, tensors, *_ = back.split()
        assert equal == tensors
        assert float(logits) <= LOGITS_BOUND
    assert put(PAGE, "families", table.partition("-->\n")[2].strip()) == PAGE


def test_a_row_says_what_fails() -> None:
    right = MatrixRow(case=CASE, plain=HOLDS, bits=None, seconds=1.0)
    wrong = MatrixRow(case=CASE, plain=failed("pp", Layout(pp=2), "-", "no run"), bits=None, seconds=1.0)
    found = Found(equal=3, tensors=4, logits=0.5)
    assert cells(FAMILIES[0], [right, right], found)[1:3] == ["2", "1.0e-15"]
    assert cells(FAMILIES[0], [right, wrong], found)[1] == "1 of 2 FAIL"
    assert cells(FAMILIES[0], [right], found)[5:] == ["3 of 4 tensors byte-equal", "5.0e-01"]


def test_a_family_that_changes_scores_is_not_split_over_sequences_unless_it_can_be() -> None:
    """The matrix of a preset leaves out what its check refuses, and nothing else."""
    assert offered(FAMILIES[0]) == len(matrix_cases())
    assert 0 < offered(FAMILIES[-1]) <= len(matrix_cases())
