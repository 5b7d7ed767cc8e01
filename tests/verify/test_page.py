"""Tables, and the page docs/parity.md: its words and its measured tables belong to the tables in the code."""

import json
import math
from pathlib import Path

import pytest

from megatron_aquila.errors import AquilaError
from megatron_aquila.verify.compare import BOUND, Difference, Row, failed
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.matrix import MatrixCase, MatrixRow, matrix_cases, twin_of
from megatron_aquila.verify.page import HEADER, as_json, case_cells, markdown, matrix_table, put, write
from tests.verify import mutants
from tests.verify.mutants import mutants_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
HOLDS = Row(
    axis="pp", layout=Layout(pp=2), against="plain", worst=Difference(tensor="loss", error=1e-15), first_wrong=None
)
CASE = MatrixCase(layout=Layout(pp=2), documents=True)


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_the_page_shows_the_matrix_of_this_code_without_a_failure() -> None:
    """Only running it gives the numbers; that they are of these cases, and none fails, can be seen here."""
    table = PAGE.partition("<!-- matrix: ")[2].partition("<!-- /matrix -->")[0]
    lines = [cells(line) for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    assert tuple(header) == (*HEADER, "worst error", "verdict"), "no case of this cover has bits to compare"
    assert [row[: len(HEADER)] for row in rows] == [case_cells(case) for case in matrix_cases()], (
        "run the command in the page again"
    )
    assert [twin_of(case.layout) for case in matrix_cases()] == [None] * len(rows)
    for *_, error, verdict in rows:
        assert float(error) <= BOUND
        assert verdict == "holds"
    assert f"{len(rows)} cases, 0 failures" in table


@pytest.mark.parametrize(("name", "told"), [("README.md", "{} combinations"), ("README_zh.md", "{} 种组合")])
def test_the_readme_sums_the_matrix_up(name: str, told: str) -> None:
    table = PAGE.partition("<!-- matrix: ")[2].partition("<!-- /matrix -->")[0]
    errors = [cells(line)[-2] for line in table.splitlines() if line.startswith("|")][2:]
    page = (ROOT / name).read_text(encoding="utf-8")
    assert told.format(len(errors)) in page
    assert f"{max(errors, key=float)}" in page


def test_the_page_shows_the_mutants_of_this_code() -> None:
    assert put(PAGE, "mutants", mutants_table()) == PAGE, "run the command in the page again"


def test_a_matrix_row_says_what_fails() -> None:
    right = MatrixRow(case=CASE, plain=HOLDS, bits=HOLDS, seconds=1.0)
    wrong = MatrixRow(case=CASE, plain=HOLDS, bits=failed("pp", Layout(pp=2), "–", "no run"), seconds=1.0)
    alone = MatrixRow(case=CASE, plain=HOLDS, bits=None, seconds=1.0)
    text = matrix_table([right, wrong, alone])
    lines = [cells(line) for line in text.splitlines() if line.startswith("| 1")]
    assert [line[-2:] for line in lines] == [["equal", "holds"], ["DIFFER", "FAILS at no run"], ["–", "holds"]]
    assert cells(text.splitlines()[0])[-3:] == ["worst error", "bits", "verdict"]
    assert "3 cases, 1 failures" in text
    assert cells(matrix_table([alone]).splitlines()[0])[-2:] == ["worst error", "verdict"]


def test_a_table_is_put_in_its_place() -> None:
    page = "a\n<!-- one: made by x -->\nold\n<!-- /one -->\nb\n"
    assert put(page, "one", "new") == "a\n<!-- one: made by x -->\n\nnew\n\n<!-- /one -->\nb\n"
    assert put(put(page, "one", "new"), "one", "new") == put(page, "one", "new")
    with pytest.raises(AquilaError, match=r"no place for it: a line <!-- two: \.\.\. -->"):
        put(page, "two", "new")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text() == "text"


def test_what_a_program_reads_is_strict_json() -> None:
    found = as_json([HOLDS, failed("pp", Layout(pp=2), "–", "no run")])
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["rows"][1]["error"] is None
    assert (found["holds"], found["bound"]) == (False, BOUND)
    assert set(found["versions"]) == {"megatron_aquila", "torch", "python"}
    assert as_json([HOLDS])["holds"]
    assert not math.isnan(as_json([HOLDS])["rows"][0]["error"])


def test_markdown() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_table_of_bugs_is_put_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(mutants_table(), "old"), encoding="utf-8")
    mutants.main([str(page)])
    assert page.read_text(encoding="utf-8") == PAGE
    with pytest.raises(SystemExit, match="0"):
        mutants.main(["--help"])
    assert "docs/parity.md" in capsys.readouterr().out
