"""``aquila schedule``: its table, its picture, its errors, and that docs/pipeline.md shows what it prints."""

import re
from pathlib import Path

import pytest

from megatron_aquila import __main__ as aquila
from megatron_aquila.commands import schedule
from megatron_aquila.pipeline.schedules import SCHEDULES

DOCS = Path(__file__).parents[2] / "docs"
SMALL = ["--pp", "2", "--microbatches", "3"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert schedule.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_table_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *SMALL)
    assert lines[0] == "2 ranks, 3 microbatches, F 1, B 1, W 1, hop 0"
    assert lines[2].split() == ["1f1b", "1", "12", "25.00", "%", "25.00", "%", "2", "1"]
    assert lines[-2:] == [
        "rank 0 | F0 F1 .. .. B0 B0 F2 B1 B1 .. B2 B2",
        "rank 1 | .. F0 B0 B0 F1 B1 B1 F2 B2 B2 .. ..",
    ]


def test_compare_has_a_row_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--pp", "4", "--microbatches", "32", "--compare", "--chunks", "5")
    rows = [(words[0], words[1], words[3], words[5]) for words in map(str.split, lines[2:7])]
    assert rows == [
        ("gpipe", "1", "8.57", "8.57"),
        ("1f1b", "1", "8.57", "8.57"),
        ("1f1b", "5", "1.84", "1.84"),
        ("zb-h1", "1", "3.03", "3.03"),
        ("zb-v", "2", "1.54", "0.00"),
    ]
    assert [line.split()[1] for line in printed(capsys, *SMALL, "--compare")[2:7]] == ["1", "1", "2", "1", "2"]


def test_every_schedule_can_be_asked_for() -> None:
    assert set(schedule.NAMES) == set(SCHEDULES)


def makespan(capsys: pytest.CaptureFixture[str], *arguments: str) -> float:
    return float(printed(capsys, *SMALL, *arguments)[2].split()[2])


def test_times_are_of_a_whole_rank(capsys: pytest.CaptureFixture[str]) -> None:
    times = ["--forward", "2", "--backward", "3", "--weight", "1"]
    assert makespan(capsys, *times) == (3 + 1) * 6
    assert makespan(capsys, *times, "--chunks", "2") == 3 * 6 + 6 / 2
    assert makespan(capsys, "--hop", "0.5") == 12 + 2 * 0.5 * 2


def test_uneven_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """A number a rank or a stage; the heavier sets the pace."""
    assert makespan(capsys, "--stage-times", "1", "2") == 3 * 6 + 3
    per_rank = makespan(capsys, "--chunks", "2", "--stage-times", "1", "2")
    assert makespan(capsys, "--chunks", "2", "--stage-times", "1", "2", "1", "2") == per_rank
    assert makespan(capsys, "--chunks", "2", "--stage-times", "1", "2", "1", "3") > per_rank


def test_svg(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    assert printed(capsys, *SMALL, "--schedule", "zb-v", "--svg", str(path))[-1] == f"drawn in {path}"
    assert "zb-v, 2 chunks a rank: 2 ranks, 3 microbatches" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "0"], "--pp 0: there is nothing to run; use 1 or more"),
        (["--chunks", "0"], "--chunks 0: there is nothing to run; use 1 or more"),
        (["--weight", "0"], "--weight 0.0: work takes time; use more than 0"),
        (["--hop", "-1"], "--hop -1.0: no message arrives before it is sent; use 0 or more"),
        (["--svg", "/no/where/a.svg"], "--svg /no/where/a.svg: its folder does not exist; make the folder first"),
        (["--stage-times", "1"], "--stage-times 1: it takes one number above 0 a rank or a stage; give 2"),
        (["--stage-times", "1", "0"], "--stage-times 1 0: it takes one number above 0 a rank or a stage; give 2"),
        (["--stage-times", "1", "--chunks", "2"], "a rank or a stage; give 2 or 4"),
        (["--stage-times", "1", "1", "1", "1", "--chunks", "2", "--compare"], "one number above 0 a rank; give 2"),
        (["--schedule", "zb-h1", "--chunks", "2"], "error: --chunks 2: --schedule zb-h1 has 1 a rank"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert schedule.main([*SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


def test_the_docs_show_what_it_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n\$ aquila (schedule .*)\n((?:.*\n)*?)```", page)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    for command, output in shown:
        assert aquila.main(command.split()) == 0
        assert capsys.readouterr().out == output, f"run: COLUMNS=120 aquila {command}"
    pictures = {path.name: path.read_text() for path in (tmp_path / "docs").iterdir()}
    assert pictures, "the page draws no picture"
    for name, picture in pictures.items():
        assert (DOCS / name).read_text() == picture, f"run the command in docs/pipeline.md that draws docs/{name}"
