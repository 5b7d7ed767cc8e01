"""``aquila preprocess``: the flags, what it prints and its exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aquila.commands import data, preprocess
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.preprocess import Progress
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Aquila tokenizer and two files of text."""
    made = tmp_path_factory.mktemp("preprocess")
    save_tokenizer_files(train_tokenizer([], 265), made)
    for name, texts in {"a": ["one", "", "二"], "b": ["</s>", 4, "end"]}.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return made


def flags(folder: Path, *inputs: str) -> list[str]:
    files = [str(folder / name) for name in ("vocab.json", "merges.txt", "special_tokens.txt")]
    return [
        *["--input", *(str(folder / name) for name in inputs), "--json-keys", "text"],
        *["--tokenizer-type", "AquilaTokenizer", "--vocab-file", files[0], "--merge-file", files[1]],
        *["--special-tokens-file", files[2], "--append-eod", "--workers", "1", "--log-interval", "1"],
    ]


def test_megatrons_flags(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess.main([*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out")]) == 0
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert [dataset[i].tolist()[-1] for i in range(len(dataset))] == [264, 264]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    progress, summary, wrote = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"3 documents, 0\.0 M tokens, 0\.0 MB \([\d.]+ MB/s\)(, [\d:]+ left)?", progress)
    assert re.fullmatch(r"3 documents, .* MB/s\) in [\d.]+ s", summary)
    assert wrote == f"wrote {tmp_path}/out_text_document.bin/.idx/.manifest.json (uint16)"


def test_days_that_are_left_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 50_000.0)
    done = Progress(total_file_bytes=3, file_bytes=1, started=0.0)
    assert preprocess.progress_line(done) == "0 documents, 0.0 M tokens, 0.0 MB (0.0 MB/s), 1 day, 3:46:40 left"
    assert "left" not in preprocess.progress_line(Progress(total_file_bytes=3, started=0.0)), "nothing is known yet"


def test_a_bad_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*flags(folder, "a.jsonl", "b.jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert preprocess.main(arguments) == 2
    assert re.search(r"\nerror: .*b.jsonl:2: 'text' is not a string but a int; mend", capsys.readouterr().err)
    assert not list(tmp_path.glob("out_*"))
    assert preprocess.main([*arguments, "--on-bad-line", "skip"]) == 0
    report = tmp_path / "out.bad.jsonl"
    assert re.search(rf"5 documents, .*; 1 bad lines skipped, named in {report}", capsys.readouterr().out)
    (bad,) = map(json.loads, report.read_text().splitlines())
    assert (bad["file"], bad["line"]) == (str(folder / "b.jsonl"), 2)


def test_settings_are_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("")
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert preprocess.main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(flag in printed for flag in ("--vocab-file", "--merge-file", "--special-tokens-file"))
    with pytest.raises(SystemExit, match="2"):
        preprocess.main([*arguments, "--append-oed"])


@pytest.mark.parametrize("interval", ["0", "-1"])
def test_an_interval_of_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: str
) -> None:
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--log-interval", interval]
    assert preprocess.main(arguments) == 2
    assert f"--log-interval {interval}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", ["0", "-1"])
def test_records_of_no_bytes_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], most: str
) -> None:
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--max-document-bytes", most]
    assert preprocess.main(arguments) == 2
    assert f"--max-document-bytes {most}: no record is as short as that; use 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_no_name_of_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix = tmp_path / "in.jsonl", ["--output-prefix", str(tmp_path / "out")]
    source.write_text('{"a/b": "a"}\n')
    arguments = flags(folder, str(source))
    assert preprocess.main([*arguments, *prefix, "--text-template", "{a/b}"]) == 0
    capsys.readouterr()
    arguments[arguments.index("--json-keys") + 1] = "a/b"
    assert preprocess.main([*arguments, *prefix]) == 2
    assert "--json-keys a/b: the key is a part of its data set's name" in capsys.readouterr().err
    arguments[arguments.index("--json-keys") + 1] = "k" * 250  # longer than a name may be
    source.write_text(f'{{"{"k" * 250}": "a"}}\n')
    for _ in range(2):
        assert preprocess.main([*arguments, "--output-prefix", str(tmp_path / "again")]) == 2
        assert "cannot be written: File name too long" in capsys.readouterr().err
        assert not (tmp_path / "again.partial").exists(), "nothing was begun that could go on"
    arguments = flags(folder, "a.jsonl")
    assert preprocess.main([*arguments, "--output-prefix", str(tmp_path / "again")]) == 0, "with other settings"


@pytest.mark.parametrize("shard", ["1", "a/b", "-1/2", "3/3"])
def test_a_shard_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shard: str) -> None:
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--shard", shard]
    assert preprocess.main(arguments) == 2
    assert f"--shard {shard}: " in capsys.readouterr().err


def test_shards_and_fields(folder: Path, tmp_path: Path) -> None:
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--shard", "0/1"]
    assert preprocess.main([*arguments, "--text-template", "{text}{text}", "--keep-meta", "text"]) == 0
    dataset = IndexedDataset(tmp_path / "out_shard00000of00001_text_document")
    assert len(dataset[0]) == len("oneone") + 1
    lines = (tmp_path / "out_shard00000of00001.meta.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"document": n, "line": n + 1, "source": str(folder / "a.jsonl"), "meta": {"text": text}}
        for n, text in enumerate(["one", "", "二"])
    ]


def test_one_keys_lines_are_not_anothers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both keys' data sets have PREFIX.meta.jsonl, and the other one's corpus is written over it."""
    for name, key in {"a": "text", "longer": "title"}.items():
        (tmp_path / f"{name}.jsonl").write_text(f'{{"{key}": "{name}", "u": 1}}\n' * 3)
    common = ["--output-prefix", str(tmp_path / "out"), "--keep-meta", "u", "--overwrite"]
    text, title = (str(tmp_path / f"out_{key}_document") for key in ("text", "title"))
    assert preprocess.main([*flags(folder, f"{tmp_path}/a.jsonl"), *common]) == 0
    capsys.readouterr()
    assert data.main(["inspect", text, "--document", "1"]) == 0
    assert f"from {tmp_path}/a.jsonl:2, u 1" in capsys.readouterr().out
    arguments = flags(folder, f"{tmp_path}/longer.jsonl")
    arguments[arguments.index("--json-keys") + 1] = "title"
    assert preprocess.main([*arguments, *common]) == 0
    capsys.readouterr()
    assert data.main(["inspect", text, "--document", "1"]) == 0
    assert f"from an unknown place: {tmp_path}/out.meta.jsonl was replaced" in capsys.readouterr().out
    assert data.main(["verify", title]) == 0
    assert data.main(["verify", text]) == 1
    printed = "".join(capsys.readouterr())
    assert f"{tmp_path}/out.meta.jsonl: it has" in printed
    assert "replaced by another data set's" in printed
    assert "write the data set again" not in printed
    assert data.main(["merge", str(tmp_path / "both"), text, title]) == 0


def test_parts_end_with_the_command_that_joins_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        shutil.copy(folder / "a.jsonl", tmp_path / f"{name}.jsonl")
    inputs = flags(folder, *(str(tmp_path / f"{name}.jsonl") for name in "abc"))
    assert preprocess.main([*inputs, "--output-prefix", str(tmp_path / "whole")]) == 0
    assert "merge" not in capsys.readouterr().out
    told = set()
    for part in ("0/3", "1/3", "2/3"):
        assert preprocess.main([*inputs, "--output-prefix", str(tmp_path / "my out"), "--shard", part]) == 0
        told.add(capsys.readouterr().out.splitlines()[-1].removeprefix("when all parts are there: "))
    (line,) = told
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    aquila, command, *words = shell.stdout.splitlines()
    assert (aquila, command) == ("aquila", "data")
    assert [Path(word).name for word in words[2:]] == [
        f"my out_shard0000{part}of00003_text_document.idx" for part in range(3)
    ]
    assert data.main(words) == 0
    for ending in (".bin", ".idx"):
        files = [tmp_path / f"{name}_text_document{ending}" for name in ("whole", "my out")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert data.main([*words[:2], words[2], words[4], "--overwrite"]) == 2
    assert "its corpus has 3 parts, and 1/3 is missing; make it first" in capsys.readouterr().err


def test_parts_cut_from_two_corpora_are_not_joined(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Part 0 is made, a file is added to the folder, part 1 is made: what lies between them is in neither."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    corpus.mkdir()
    for name in "ac":
        (corpus / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    shutil.copytree(corpus, elsewhere)
    (corpus / "b.jsonl").write_text('{"text": "b"}\n')
    parts = [str(tmp_path / f"out_shard0000{index}of00002_text_document") for index in range(2)]
    merging = ["merge", str(tmp_path / "out"), *parts]
    for part, made_of in (("0/2", elsewhere), ("1/2", corpus)):
        prefix = ["--output-prefix", str(tmp_path / "out"), "--shard", part]
        assert preprocess.main([*flags(folder, str(made_of)), *prefix]) == 0
    capsys.readouterr()
    assert data.main(merging) == 2
    assert f"{parts[1]}: part 1/2, but of another corpus, or made with other options" in capsys.readouterr().err
    again = [*flags(folder, str(elsewhere)), "--output-prefix", str(tmp_path / "out"), "--shard", "1/2", "--overwrite"]
    assert preprocess.main([*again, "--min-chars", "1"]) == 0
    assert data.main(merging) == 2, "other options"
    (corpus / "b.jsonl").unlink()
    again[again.index(str(elsewhere))] = str(corpus)
    assert preprocess.main(again) == 0
    assert data.main(merging) == 0, "the same files, below another folder"


@pytest.mark.parametrize("inputs", ["", "**/*.jsonl", "*"])
def test_an_output_within_an_input_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: str
) -> None:
    """What the command writes there is not read: when it goes on, begins anew, or another part is at work."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 9)
    (tmp_path / "in").mkdir()
    bad = tmp_path / ("b.jsonl" if inputs == "*" else "in/b.jsonl")
    bad.write_text('{"text": 4}\n')
    source, prefix = f"{tmp_path}/{inputs}", ["--output-prefix", f"{tmp_path}/in/../out"]
    arguments = [*flags(folder, source), *prefix, "--keep-meta", "text"]
    assert preprocess.main([*arguments, "--on-bad-line", "stop"]) == 2
    assert f"{bad}:1: 'text' is not a string" in capsys.readouterr().err
    left = tmp_path / "out.partial"
    assert left.exists()
    for part in ("0/2", "1/2", "1/2"):
        assert preprocess.main([*arguments, "--shard", part, "--on-bad-line", "skip", "--overwrite"]) == 0
    for more in ([], ["--overwrite"]):
        assert preprocess.main([*arguments, "--on-bad-line", "skip", *more]) == 0
        assert not left.exists()
        manifest = IndexedDataset(tmp_path / "out_text_document").manifest
        assert manifest is not None
        assert [Path(said.path).name for said in manifest.origin.sources] == ["a.jsonl", "b.jsonl"]
    assert preprocess.main([*flags(folder, f"{tmp_path}/out.bad.jsonl"), *prefix, "--overwrite"]) == 2
    assert "out.bad.jsonl: this is a file of the output, too" in capsys.readouterr().err


def test_a_file_in_two_inputs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*flags(folder, "a.jsonl", "[ax].jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert preprocess.main(arguments) == 2
    assert f"--input {folder}/a.jsonl: the same file is read for --input" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_keys_beside_a_template(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--text-template", "{title}"]
    arguments.insert(arguments.index("--json-keys") + 2, "content")
    assert preprocess.main(arguments) == 2
    assert "--json-keys text content: the texts are the --text-template's" in capsys.readouterr().err


def test_what_is_left_out_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = shutil.copy(folder / "a.jsonl", tmp_path)
    inputs = flags(folder, "a.jsonl", "b.jsonl", again)
    arguments = [*inputs, "--output-prefix", str(tmp_path / "out"), "--on-bad-line", "skip", "--keep-meta", "text"]
    arguments += ["--deduplicate", "--min-chars", "1", "--max-chars", "3"]
    assert preprocess.main(arguments) == 0
    *_, summary, wrote = capsys.readouterr().out.splitlines()
    assert summary.startswith("3 documents, ")
    skipped = f"; 1 bad lines skipped, named in {tmp_path}/out.bad.jsonl"
    dropped = "; documents left out: 2 shorter than --min-chars, 1 longer than --max-chars, 2 seen before"
    assert summary.endswith(skipped + dropped)
    assert f", {tmp_path}/out.meta.jsonl (" in wrote
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert len(dataset) == len(dataset.document_indices) - 1 == 3
    assert dataset.manifest is not None
    options = dataset.manifest.origin.options
    assert (options["min_chars"], options["max_chars"], options["deduplicate"]) == (1, 3, True)
    assert options["left_out"] == {
        "bad": 1,
        "shorter than --min-chars": 2,
        "longer than --max-chars": 1,
        "seen before": 2,
    }
    lines = list(map(json.loads, (tmp_path / "out.meta.jsonl").read_text().splitlines()))
    assert [(each["document"], each["line"], each["meta"]["text"]) for each in lines] == [
        (0, 1, "one"),
        (1, 3, "二"),
        (2, 3, "end"),
    ]
    assert (
        preprocess.main([*inputs, "--output-prefix", str(tmp_path / "none"), "--min-chars", "3", "--max-chars", "2"])
        == 2
    )
    assert "--min-chars 3: no document is as long as that" in capsys.readouterr().err


def test_a_closed_output(folder: Path, tmp_path: Path) -> None:
    """As of ``| head -1``, and by Megatron-LM's name for the command: no traceback."""
    arguments = [*flags(folder, "a.jsonl"), "--output-prefix", str(tmp_path / "out")]
    reader, writer = os.pipe()
    os.close(reader)
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1])}
    command = [sys.executable, str(tool), *arguments]
    told = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(writer)
    assert told.returncode == 2, told.stderr
    assert "Traceback" not in told.stderr
    assert "error: standard output was closed; what was finished is kept" in told.stderr


def test_cores_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preprocess.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert preprocess.usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert preprocess.PreprocessOptions(input=(), output_prefix="").workers == 1


def test_help_says_what_a_bad_line_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        preprocess.main(["--help"])
    assert "blank" in capsys.readouterr().out


def test_a_bar_in_a_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    again = shutil.copy(folder / "a.jsonl", tmp_path)
    assert preprocess.main([*flags(folder, "a.jsonl", again), "--output-prefix", str(tmp_path / "out")]) == 0
    assert "6 documents" in capsys.readouterr().out
