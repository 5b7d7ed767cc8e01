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


def test_compare_draws_at_one_scale_what_the_width_has_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(printed(capsys, "--pp", "4", "--microbatches", "32", "--compare"))
    assert "a character is 1 of time" in text
    *drawn, left = text.split("\n\n")[2:]
    assert [block.splitlines()[0] for block in drawn] == ["gpipe", "1f1b", "zb-h1"]
    assert [len(block.splitlines()[1]) - len("rank 0 | ") for block in drawn] == [105, 105, 99]
    assert left == "too long for this width: 1f1b, 2 chunks a rank; zb-v, 2 chunks a rank. --svg FILE draws it"
    assert max(map(len, text.splitlines())) <= 120
    assert "too long" not in "\n".join(printed(capsys, "--pp", "4", "--microbatches", "8", "--compare"))


def test_of_a_long_run_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--pp", "4", "--microbatches", "200")
    assert lines[2].split()[:3] == ["1f1b", "1", "609"]
    assert lines[5:] == ["", "too long for this width: 1f1b. --svg FILE draws it"]
    assert len(printed(capsys, "--pp", "4", "--microbatches", "2000", "--compare")) == 11


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
    assert "zb-v, 2 chunks a rank" in path.read_text(encoding="utf-8")
    assert printed(capsys, *SMALL, "--compare", "--svg", str(path))[-1] == f"drawn in {path}"
    text = path.read_text(encoding="utf-8")
    assert [text.count(f">{title}<") for title in ("gpipe", "1f1b", "1f1b, 2 chunks a rank", "zb-h1")] == [1] * 4
    assert "makespan 12, bubble 25.00 %, 25.00 % in span" in text


RUN = """
model: {num_layers: 6, hidden_size: 64, num_heads: 4, vocab_size: 500, seq_len: 64}
parallel: {pipeline: 2, tensor: 2, schedule: gpipe}
train: {global_batch: 24, micro_batch: 2}
"""


def test_a_run_gives_ranks_microbatches_schedule_and_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    lines = printed(capsys, str(path), "--world-size", "12")
    assert lines[0] == "tp 2 x pp 2 x dp 3, global batch 24, micro-batch 2; layers by stage 3 3"
    first, last = map(float, lines[1].removeprefix("times of the ranks, by FLOPs with the head: ").split())
    assert (first + last) == pytest.approx(2)
    assert first < last, "the head is on the last"
    assert lines[2] == "2 ranks, 4 microbatches, F 1, B 1, W 1, hop 0"
    name, _, makespan = lines[4].split()[:3]
    assert name == "gpipe"
    assert float(makespan) == pytest.approx(3 * (first + 4 * last), rel=1e-3)
    # flags: the run's settings, and this command's own before the run's
    assert printed(capsys, str(path), "--dp", "1", "--stage-layers", "4", "2")[0].endswith("by stage 4 2")
    assert printed(capsys, str(path), "--pp", "3")[2].startswith("3 ranks, 12 microbatches")
    assert printed(capsys, str(path), "--microbatches", "5")[2].startswith("2 ranks, 5 microbatches")
    assert printed(capsys, str(path), "--schedule", "zb-v")[4].startswith("zb-v")
    even = printed(capsys, str(path), "--stage-times", "1", "1")
    assert even[2].startswith("schedule"), "times that are given need no FLOPs"
    assert float(even[3].split()[2]) == 3 * (12 + 1)
    rows = printed(capsys, "--preset", "aquila2-34b", "--compare", "--world-size", "512")[4:9]
    assert [row.split()[0] for row in rows] == ["gpipe", "1f1b", "1f1b", "zb-h1", "zb-v"]


def test_errors_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    for arguments, message in {
        "--preset nope": "--preset nope: no preset has this name",
        f"{path} --pp 7": "--pp 7: 6 layers cannot fill 7 stages",
        f"{path} --nope 3": "--nope 3: is no setting",
        f"{path} --world-size 6": "ranks do not divide the world size 6",
        f"{path} --microbatches 100000000": "with 2 stages that is more than this simulates; use 166666 or less",
        str(tmp_path / "none.yaml"): "none.yaml: No such file",
    }.items():
        assert schedule.main(arguments.split()) == 2
        assert message in capsys.readouterr().err


def test_without_a_run_sizes_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule.main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    for flag in ("--pp", "--microbatches"):
        assert f"{flag}: is not given; give {flag} N, or a run to take it from: CONFIG.yaml or --preset NAME" in err


@pytest.mark.parametrize("arguments", [["--pp", "x"], ["--pp", "None"], ["--schedule", "zbh1"], ["--forward", "x"]])
def test_what_is_no_number_or_name_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        schedule.main([*SMALL, *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert arguments[0] in err
    assert "NoneType" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "0"], "--pp 0: there is nothing to run; use 1 or more"),
        (["--chunks", "0"], "--chunks 0: there is nothing to run; use 1 or more"),
        (["--weight", "0"], "--weight 0.0: work takes time; use a number above 0"),
        (["--forward", "nan"], "--forward nan: work takes time; use a number above 0"),
        (["--world-size", "0"], "--world-size 0: there is nothing to run; use 1 or more"),
        (["--tp", "4"], "--tp: is no option of this command; settings of a run need one"),
        (["stray"], "stray"),
        (["--hop", "-1"], "--hop -1.0: no message arrives before it is sent; use 0 or more"),
        (["--svg", "/no/where/a.svg"], "--svg /no/where/a.svg: no such file or directory; name a file"),
        (["--svg", "/"], "--svg /: is a directory; name a file in a folder that can be written"),
        (["--stage-times", "1"], "--stage-times 1: it takes one number above 0 a rank or a stage; give 2"),
        (["--stage-times", "1", "0"], "--stage-times 1 0: it takes one number above 0 a rank or a stage; give 2"),
        (["--stage-times", "1", "--chunks", "2"], "a rank or a stage; give 2 or 4"),
        (["--stage-times", "1", "inf"], "--stage-times 1 inf: it takes one number above 0"),
        (["--microbatches", "1000000"], "with 2 stages that is more than this simulates; use 166666 or less"),
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
