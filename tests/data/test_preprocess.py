"""Megatron-LM's own output byte for byte, whatever the number of workers; and nothing half-written on any error."""

import json
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.jsonl import LineBlock
from megatron_aquila.data.manifest import SourceFile, manifest_path, read_manifest
from megatron_aquila.data.preprocess import NAMED, EncodedBlock, Encoder, Progress, preprocess
from megatron_aquila.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_facts
from megatron_aquila.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_files["tokenizer_model"])


def write_jsonl(path: Path, texts: Sequence[object], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(inputs: Sequence[Path], prefix: Path, tokenizer: Tokenizer, **settings: Any) -> Progress:
    arguments: dict[str, Any] = {
        "keys": ["text"],
        "append_eod": False,
        "workers": 1,
        "skip_bad_lines": False,
        "report": lambda _: None,
    }
    return preprocess(inputs, str(prefix), tokenizer=tokenizer, **(arguments | settings))


@pytest.mark.parametrize(("name", "append_eod"), [("tool_u16_noeod", False), ("tool_u16", True)])
def test_megatrons_output_byte_for_byte(
    megatron_fixtures: Path, tmp_path: Path, tokenizer: Tokenizer, name: str, append_eod: bool
) -> None:
    texts = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    allowed = replace(tokenizer, allow_special_tokens=True)
    done = run([source], tmp_path / "out", allowed, append_eod=append_eod)
    for end in ("bin", "idx"):
        ours = (tmp_path / f"out_text_document.{end}").read_bytes()
        assert ours == (megatron_fixtures / f"{name}.{end}").read_bytes()
    assert (done.documents, done.num_bytes) == (135, source.stat().st_size)
    # By default a document cannot end itself.
    run([source], tmp_path / "safe", tokenizer, append_eod=append_eod)
    assert any("<|endoftext|>" in text for text in texts)
    ends = np.count_nonzero(IndexedDataset(tmp_path / "safe_text_document").tokens == 0)
    assert ends == (134 if append_eod else 0)
    assert np.count_nonzero(IndexedDataset(tmp_path / "out_text_document").tokens == 0) > ends


def test_workers_do_not_change_the_output(
    megatron_fixtures: Path, tmp_path: Path, tokenizer_files: dict[str, Path]
) -> None:
    texts = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    sources = [write_jsonl(tmp_path / "a.jsonl", texts * 25), write_jsonl(tmp_path / "b.jsonl", texts[::-1])]
    aquila = load_tokenizer("AquilaTokenizer", **tokenizer_files, allow_special_tokens=True)
    reports: list[tuple[str, int]] = []
    for workers in (1, 2):
        done = run(
            sources,
            tmp_path / f"out{workers}",
            aquila,
            workers=workers,
            append_eod=True,
            report=lambda progress: reports.append((progress.path.name, progress.position)),
        )
    assert reports[: len(reports) // 2] == reports[len(reports) // 2 :]
    assert len(reports) > 4
    assert reports[-1] == ("b.jsonl", sources[1].stat().st_size)
    for end in ("bin", "idx"):
        one, two = ((tmp_path / f"out{workers}_text_document.{end}").read_bytes() for workers in (1, 2))
        assert one == two
    dataset = IndexedDataset(tmp_path / "out2_text_document")
    assert len(dataset.tokens) == done.tokens
    assert len(dataset.document_indices) - 1 == done.documents == 135 * 26
    assert dataset.dtype == np.uint16
    assert dataset[len(dataset) - 1].tolist() == [*aquila.encode(texts[0]), aquila.eod]


def test_every_key_makes_a_data_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "one", "a": "two"}\n{"q": "", "a": "three"}\n{"q": "four"}\n')
    done = run([source], tmp_path / "out", tokenizer, keys=["q", "a"], append_eod=True, skip_bad_lines=True)
    assert (done.documents, done.bad_lines) == (2, 1)
    assert str(done.named_bad_lines[0]).startswith(f"{source}:3: no key 'a'")
    questions, answers = IndexedDataset(tmp_path / "out_q_document"), IndexedDataset(tmp_path / "out_a_document")
    assert questions.document_indices.tolist() == [0, 1, 1]  # an empty text is an empty document, as in Megatron-LM
    assert answers.document_indices.tolist() == [0, 1, 2]
    assert answers[1].tolist() == [*tokenizer.encode("three"), 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_or_is_skipped(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a", None, "b", *[3] * NAMED])
    with pytest.raises(DataError, match=r"in.jsonl:2: 'text' is not a string.*--on-bad-line skip"):
        run([source], tmp_path / "out", tokenizer, workers=workers)
    assert list(tmp_path.iterdir()) == [source]
    done = run([source], tmp_path / "out", tokenizer, workers=workers, skip_bad_lines=True)
    assert (done.documents, done.bad_lines, len(done.named_bad_lines)) == (2, NAMED + 1, NAMED)
    assert IndexedDataset(tmp_path / "out_text_document")[1].tolist() == tokenizer.encode("b")


def test_each_data_set_says_how_it_was_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "one", "a": "two, three"}\n{"q": "", "a": "four"}\n')
    run([source], tmp_path / "out", tokenizer, keys=["q", "a"])
    for key in ("q", "a"):
        said, dataset = (kind(f"{tmp_path}/out_{key}_document") for kind in (read_manifest, IndexedDataset))
        assert (said.contents.documents, said.contents.tokens) == (2, len(dataset.tokens))
        assert said.origin.tokenizer == tokenizer_facts(tokenizer)
        assert said.origin.options == {"json_key": key, "append_eod": False, "bad_lines_skipped": 0}
        assert said.origin.sources == (SourceFile(path=str(source), size=source.stat().st_size),)


def test_an_old_manifest_never_stands_beside_new_data(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    manifest = manifest_path(tmp_path / "out_text_document")
    manifest.write_text("old")
    with pytest.raises(DataError):
        run([write_jsonl(tmp_path / "bad.jsonl", [1])], tmp_path / "out", tokenizer)
    assert manifest.read_text() == "old", "the old data set was not replaced"

    def fail(*_: object, **__: object) -> None:
        raise DataError("no room")

    monkeypatch.setattr("megatron_aquila.data.indexed.write_manifest", fail)
    with pytest.raises(DataError, match="no room"):
        run([source], tmp_path / "out", tokenizer)
    assert not manifest.exists()


def test_nothing_to_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [None])
    with pytest.raises(DataError, match=r"in.jsonl: no document found, 1 bad lines"):
        run([source], tmp_path / "out", tokenizer, skip_bad_lines=True)
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        run([source, tmp_path / "nowhere"], tmp_path / "out", tokenizer, skip_bad_lines=True)
    assert list(tmp_path.iterdir()) == [source]


def test_settings_that_make_no_sense(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as caught:
        run([], tmp_path / "out", replace(tokenizer, eod_token=None), keys=["a", "a"], workers=0, append_eod=True)
    assert [problem.flag for problem in caught.value.problems] == ["--json-keys", "--workers", "--append-eod"]


def test_a_full_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 4000] * 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"out_text_document.bin: cannot be written: File too large"):
            run([source], tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [source]


class Killed(Encoder):
    """Dies in the second block, as a worker does that takes too much memory."""

    def __call__(self, block: LineBlock) -> EncodedBlock:
        if block.first > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(block)


def test_a_killed_worker(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 1000] * 300)
    monkeypatch.setattr("megatron_aquila.data.preprocess.Encoder", Killed)
    with pytest.raises(DataError, match=r"killed by SIGKILL.*nothing was published"):
        run([source], tmp_path / "out", tokenizer, workers=2)
    assert list(tmp_path.iterdir()) == [source]
