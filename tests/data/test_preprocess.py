"""Megatron-LM's own output byte for byte, however the work is cut, stopped and shared; nothing half-written."""

import datetime
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aquila.data import preprocess as module
from megatron_aquila.data.encoders import Encoded, ReferenceEncoder
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.manifest import read_manifest
from megatron_aquila.data.preprocess import Done, Progress, preprocess
from megatron_aquila.data.preprocess_settings import PreprocessSettings
from megatron_aquila.data.records import ReadOptions, parse_template
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_files["tokenizer_model"])


@pytest.fixture(scope="module")
def texts(megatron_fixtures: Path) -> list[str]:
    found: list[str] = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", 1 << 14)


def write_jsonl(path: Path, texts: Sequence[object], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def silent(_: object) -> None:
    pass


def run(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    report: Callable[[Progress], None] = silent,
    say: Callable[[str], None] = silent,
    **settings: Any,
) -> Done:
    made = PreprocessSettings(inputs=tuple(map(str, inputs)), output_prefix=str(prefix), **settings)
    return preprocess(made, tokenizer, report=report, say=say)


def files(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    path = Path(f"{prefix}_{key}_document")
    return path.with_name(f"{path.name}.bin").read_bytes(), path.with_name(f"{path.name}.idx").read_bytes()


def meta(prefix: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """Document, line and kept fields of every line of provenance."""
    lines = map(json.loads, Path(f"{prefix}.meta.jsonl").read_text(encoding="utf-8").splitlines())
    return [(said["document"], said["line"], said["meta"]) for said in lines]


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
@pytest.mark.parametrize(("name", "append_eod"), [("tool_u16_noeod", False), ("tool_u16", True)])
def test_megatrons_output_byte_for_byte(
    megatron_fixtures: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    texts: list[str],
    name: str,
    append_eod: bool,
    backend: str,
) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    allowed = replace(tokenizer, allow_special_tokens=True)
    done = run([source], tmp_path / "out", allowed, append_eod=append_eod, backend=backend)
    theirs = tuple((megatron_fixtures / f"{name}.{end}").read_bytes() for end in ("bin", "idx"))
    assert files(tmp_path / "out") == theirs
    counts = done.progress.counts
    assert (counts.documents, counts.num_bytes) == (135, source.stat().st_size)
    # By default a document cannot end itself.
    run([source], tmp_path / "safe", tokenizer, append_eod=append_eod, backend=backend)
    assert any("<|endoftext|>" in text for text in texts)
    ends = np.count_nonzero(IndexedDataset(tmp_path / "safe_text_document").tokens == 0)
    assert ends == (134 if append_eod else 0)
    assert np.count_nonzero(IndexedDataset(tmp_path / "out_text_document").tokens == 0) > ends


def test_neither_workers_nor_cuts_nor_backends_change_the_output(
    tmp_path: Path, tokenizer_files: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_jsonl(tmp_path / "a.jsonl", texts * 8), write_jsonl(tmp_path / "b.jsonl", texts[::-1])]
    aquila = load_tokenizer("AquilaTokenizer", **tokenizer_files, allow_special_tokens=True)
    made = set()
    for workers, piece, backend in ((1, 1 << 20, "tokenizers"), (2, 1 << 15, "auto"), (3, 999, "auto")):
        monkeypatch.setattr(module, "SMALLEST_PIECE", piece)
        seen: list[int] = []
        done = run(
            sources,
            tmp_path / "out",
            aquila,
            workers=workers,
            backend=backend,
            append_eod=True,
            overwrite=True,
            report=lambda progress, seen=seen: seen.append(progress.file_bytes),  # type: ignore[misc]
        )
        assert seen == sorted(seen)
        assert seen[-1] == sum(path.stat().st_size for path in sources)
        made.add(files(tmp_path / "out"))
    assert len(made) == 1
    dataset = IndexedDataset(tmp_path / "out_text_document")
    counts = done.progress.counts
    assert len(dataset.tokens) == counts.tokens
    assert len(dataset.document_indices) - 1 == counts.documents == 135 * 9
    assert dataset.dtype == np.uint16
    assert dataset[len(dataset) - 1].tolist() == [*aquila.encode(texts[0]), aquila.eod]


def test_every_key_makes_a_data_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "one", "a": "two", "id": 7}\n{"q": "", "a": "three"}\n{"q": "four"}\n')
    read = ReadOptions(keys=("q", "a"), keep_meta=("id",))
    done = run([source], tmp_path / "out", tokenizer, read=read, append_eod=True, skip_bad_lines=True)
    assert (done.progress.counts.documents, done.progress.counts.bad_records) == (2, 1)
    (bad,) = map(json.loads, (tmp_path / "out.bad.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"], bad["kind"]) == (str(source), 3, "missing key")
    assert bad["why"].startswith("no key 'a'")
    assert meta(tmp_path / "out") == [(0, 1, {"id": 7}), (1, 2, {})]
    questions, answers = IndexedDataset(tmp_path / "out_q_document"), IndexedDataset(tmp_path / "out_a_document")
    assert questions.document_indices.tolist() == [0, 1, 1]  # an empty text is an empty document, as in Megatron-LM
    assert answers.document_indices.tolist() == [0, 1, 2]
    assert answers[1].tolist() == [*tokenizer.encode("three"), 0]
    assert list(done.manifests) == [f"{tmp_path}/out_{key}_document" for key in ("q", "a")]


def test_a_template_makes_one_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "one", "a": "two"}\n')
    run([source], tmp_path / "out", tokenizer, read=ReadOptions(template=parse_template(r"{q}\n{a}")))
    assert IndexedDataset(tmp_path / "out_text_document")[0].tolist() == tokenizer.encode("one\ntwo")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("_small_pieces")
def test_a_bad_line_stops_or_is_skipped(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    good = ["a" * 1000] * 40
    source = write_jsonl(tmp_path / "in.jsonl", [*good, None, "b"])
    with pytest.raises(DataError, match=r"in.jsonl:41: 'text' is null; .*--on-bad-line skip"):
        run([source], tmp_path / "out", tokenizer, workers=workers)
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out.partial"}
    said: list[str] = []
    done = run([source], tmp_path / "out", tokenizer, workers=workers, skip_bad_lines=True, say=said.append)
    assert (done.progress.counts.documents, done.progress.counts.bad_records) == (41, 1)
    assert any("going on in" in line for line in said) == (done.progress.resumed.documents > 0)
    assert IndexedDataset(tmp_path / "out_text_document")[40].tolist() == tokenizer.encode("b")
    assert not (tmp_path / "out.partial").exists()


def test_each_data_set_says_how_it_was_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "", "two, three"])
    run([source], tmp_path / "out", tokenizer)
    manifest = read_manifest(tmp_path / "out_text_document")
    assert manifest is not None
    contents, origin = manifest.contents, manifest.origin
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert (contents.documents, contents.sequences, contents.tokens) == (3, 2, len(dataset.tokens))
    assert (contents.dtype, contents.largest_token) == ("uint16", dataset.tokens.max())
    for facts, data in zip((contents.bin, contents.idx), files(tmp_path / "out"), strict=True):
        assert (facts.size, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert origin.tokenizer is not None
    assert origin.tokenizer.fingerprint == fingerprint(tokenizer)
    assert [(one.path, one.size) for one in origin.sources] == [(str(source), source.stat().st_size)]


def test_a_data_set_is_replaced_only_when_asked_and_when_the_new_one_is_whole(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    run([source], tmp_path / "out", tokenizer)
    before = files(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out_text_document.bin is there already; give --overwrite"):
        run([source], tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="is null"):
        run([write_jsonl(tmp_path / "bad.jsonl", [None])], tmp_path / "out", tokenizer, overwrite=True)
    assert files(tmp_path / "out") == before
    run([write_jsonl(source, ["a", "b"])], tmp_path / "out", tokenizer, overwrite=True)
    assert files(tmp_path / "out") != before
    assert not (tmp_path / "out.partial").exists()


def test_what_lies_beside_a_data_set_is_replaced_only_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    for end in ("meta", "bad"):
        beside = write_jsonl(tmp_path / f"out.{end}.jsonl", ["of the data set of another key"])
        before = beside.read_bytes()
        with pytest.raises(ConfigError, match=rf"out.{end}.jsonl is there already; give --overwrite"):
            run([source], tmp_path / "out", tokenizer)
        assert beside.read_bytes() == before
        beside.unlink()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["out.meta.jsonl", "out.bad.jsonl", "out.partial/in.jsonl"])
def test_an_input_is_never_replaced(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    (tmp_path / "out.partial").mkdir()
    source = write_jsonl(tmp_path / name, ["a"])
    before = source.read_bytes()
    with pytest.raises(ConfigError, match=rf"--input .*{name}: this is a file of the output, too; give another"):
        run([tmp_path / "." / name], tmp_path / "out", tokenizer, overwrite=True)
    assert source.read_bytes() == before


@pytest.mark.usefixtures("_small_pieces")
def test_an_unfinished_run_neither_replaces_nor_is_thrown_away_unasked(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*texts * 3, None])
    with pytest.raises(DataError, match="is null"):
        run([source], tmp_path / "out", tokenizer)
    begun = (tmp_path / "out.partial" / "text.bin").read_bytes()
    with source.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(ConfigError, match="unfinished run with other is_resumable, inputs"):
            run([Path("-")], tmp_path / "out", tokenizer)
    made_meanwhile = tmp_path / "out_text_document.bin"
    made_meanwhile.write_bytes(b"of another tool")
    with pytest.raises(ConfigError, match=r"out_text_document.bin is there already; give --overwrite"):
        run([source], tmp_path / "out", tokenizer, skip_bad_lines=True)
    assert made_meanwhile.read_bytes() == b"of another tool"
    assert (tmp_path / "out.partial" / "text.bin").read_bytes() == begun != b""
    done = run([source], tmp_path / "out", tokenizer, skip_bad_lines=True, overwrite=True)
    assert done.progress.resumed.documents > 0


def test_kept_fields_that_json_does_not_know_become_strings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "in.parquet"
    parquet.write_table(arrow.table({"text": ["a"], "date": [datetime.date(2020, 2, 29)]}), source)
    run([source], tmp_path / "out", tokenizer, read=ReadOptions(keep_meta=("date",)))
    assert meta(tmp_path / "out") == [(0, 1, {"date": "2020-02-29"})]


def test_nothing_to_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [None])
    why = r"in.jsonl: no document found, 1 bad; the first bad line is .*/in.jsonl:1: 'text' is null"
    with pytest.raises(DataError, match=why):
        run([source], tmp_path / "out", tokenizer, skip_bad_lines=True)
    write_jsonl(source, ["a"])
    with pytest.raises(DataError, match=r"in.jsonl: no document found, 1 shorter than --min-chars$"):
        run([source], tmp_path / "out", tokenizer, limits=LengthLimits(min_chars=2))
    assert list(tmp_path.iterdir()) == [source], "there is nothing to go on with"
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        run([source, tmp_path / "nowhere"], tmp_path / "out", tokenizer, skip_bad_lines=True)
    assert not list(tmp_path.glob("out_*"))


def test_settings_that_make_no_sense(tmp_path: Path, tokenizer: Tokenizer) -> None:
    without = replace(tokenizer, eod_token=None)
    with pytest.raises(ConfigError) as caught:
        run([], tmp_path / "out", without, read=ReadOptions(keys=("a", "a")), workers=0, append_eod=True, shard=(2, 2))
    flags = [problem.flag for problem in caught.value.problems]
    assert flags == ["--json-keys", "--workers", "--append-eod", "--shard"]
    with pytest.raises(ConfigError, match="--min-chars -1: a length is not negative"):
        run([], tmp_path / "out", tokenizer, limits=LengthLimits(min_chars=-1))


@pytest.mark.usefixtures("_small_pieces")
def test_a_full_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 1000] * 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # a shard fits, the growing file does not
    try:
        with pytest.raises(DataError, match=r"cannot be written: File too large.*the same command goes on from there"):
            run([source], tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.partial"}
    done = run([source], tmp_path / "out", tokenizer)
    assert 0 < done.progress.resumed.documents < 20
    assert done.progress.counts.documents == 20
    run([source], tmp_path / "again", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "again")


class Killed(ReferenceEncoder):
    """Dies, as a worker does that takes too much memory."""

    def encode(self, texts: Sequence[str], end: int | None) -> Encoded:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts, end)


@pytest.mark.usefixtures("_small_pieces")
def test_a_killed_worker(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 1000] * 20)
    monkeypatch.setattr("megatron_aquila.data.encoders.ReferenceEncoder", Killed)
    with pytest.raises(DataError, match=r"killed by SIGKILL.*what was finished is kept"):
        run([source], tmp_path / "out", tokenizer, workers=2, backend="tokenizers")
    assert list(tmp_path.iterdir()) == [source]


MARKS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def _killed_run(source: Path, prefix: Path, tokenizer: Tokenizer, moment: int, kind: str, workers: int) -> None:
    """Die by SIGKILL when the n-th thing of a kind, or of any, is done to a file or told of progress.

    Each that is leaves a mark.
    """
    done = 0
    marks = Path(f"{prefix}.marks").open("w")  # noqa: SIM115
    main = os.getpid()

    def count(event: str, *_: object) -> None:
        nonlocal done
        if event in (*MARKS, "told") and os.getpid() == main:
            done += kind in ("any", event)
            print(event, file=marks, flush=True)
            if done == moment:
                os.kill(main, signal.SIGKILL)

    sys.addaudithook(count)
    run_filtered(source, prefix, tokenizer, report=lambda _: count("told"), workers=workers)
    os._exit(0)


def run_filtered(source: Path, prefix: Path, tokenizer: Tokenizer, **settings: Any) -> Done:
    """Everything on: duplicates, bad lines, lengths, provenance."""
    read = ReadOptions(keep_meta=("id",))
    limits = LengthLimits(min_chars=2, max_chars=1500)
    settings |= {"read": read, "limits": limits, "deduplicate": True, "skip_bad_lines": True, "append_eod": True}
    return run([source], prefix, tokenizer, backend="tokenizers", **settings)


def write_dirty(path: Path, texts: Sequence[str], copies: int) -> Path:
    """Documents again and again, some too long or short, some lines bad."""
    draw = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for number in range(copies * len(texts)):
            text = draw.choice(texts)[: draw.choice([1, 400, 4000])]
            file.write(json.dumps({"text": None if draw.random() < 0.03 else text, "id": number}) + "\n")
            file.write("\n" * (draw.random() < 0.1))
    return path


def all_files(prefix: Path) -> dict[str, bytes]:
    """Everything under a prefix; the manifest names the file of provenance."""
    named = f"{prefix.name}.meta.jsonl".encode()
    return {
        path.name[len(prefix.name) :]: path.read_bytes().replace(named, b"PREFIX.meta.jsonl")
        for path in prefix.parent.glob(f"{prefix.name}[._]*")
    }


def test_killed_at_ten_moments_a_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", 1 << 12)
    source = write_dirty(tmp_path / "in.jsonl", texts, 1)
    whole = run_filtered(source, tmp_path / "whole", tokenizer).progress.counts
    assert min(whole.duplicates, whole.too_short, whole.too_long, whole.bad_records) > 0

    def killed(name: str, moment: int, kind: str, workers: int) -> int | None:
        arguments = (source, tmp_path / name, tokenizer, moment, kind, workers)
        process = multiprocessing.get_context("fork").Process(target=_killed_run, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    draw, moments = random.Random(5), []
    for workers in (1, 2):
        assert killed(f"all{workers}", -1, "any", workers) == 0
        events = (tmp_path / f"all{workers}.marks").read_text().split()
        # how often progress is told depends on which worker is done first: a later run may have fewer events
        moments += [(moment, "any", workers) for moment in draw.sample(range(2, len(events) * 3 // 4), 4)]
    renamed = events.count("os.rename")
    moments += [(moment, "os.rename", 2) for moment in (renamed - 2, renamed - 1)]  # the tokens' names
    left = []
    for number, (moment, kind, workers) in enumerate(moments):
        prefix = tmp_path / f"out{number}"
        assert killed(prefix.name, moment, kind, workers) == -signal.SIGKILL, (moment, events)
        assert read_manifest(f"{prefix}_text_document") is None
        Path(f"{prefix}.marks").unlink()
        done = run_filtered(source, prefix, tokenizer).progress
        left.append(done.counts.documents - done.resumed.documents)
        assert all_files(prefix) == all_files(tmp_path / "whole"), (moment, kind, workers)
        assert done.counts == whole
    assert left[8:] == [0, 0], "killed while the files got their names: nothing is left to tokenize"
    assert len(set(left)) > 4, "the moments are spread over the run"


def test_no_old_manifest_names_new_lines(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ReadOptions(keep_meta=("text",))
    source, out = write_jsonl(tmp_path / "in.jsonl", ["a"]), tmp_path / "out"
    run([source], out, tokenizer, read=kept, backend="tokenizers")
    before = meta(out)
    write_jsonl(source, ["b"])

    def refuse(prefix: str) -> None:
        raise DataError(f"{prefix}: refused")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_aquila.data.output.remove_manifest", refuse)
        with pytest.raises(DataError, match="refused"):
            run([source], out, tokenizer, read=kept, backend="tokenizers", overwrite=True)
    assert meta(out) == before
    run([source], out, tokenizer, read=kept, backend="tokenizers", overwrite=True)
    assert [said for _, _, said in meta(out)] == [{"text": "b"}]


@pytest.mark.parametrize(
    ("name", "damage", "refused"),
    [
        ("text.bin", lambda data: data[:-400], "text.bin: was changed since it was written"),
        ("hashes", lambda data: b"x" + data[1:], "hashes: was changed since it was written"),
        ("meta.jsonl", None, "meta.jsonl: cannot be written: No such file"),
        ("meta.jsonl", lambda data: data + b"{", None),
        ("journal.jsonl", lambda data: data[:-9], None),
        ("journal.jsonl", lambda data: data.replace(b'"index": 1', b'"index"= 1'), r"journal.jsonl:3: no line of a"),
    ],
)
def test_what_an_unfinished_run_left_is_damaged(
    tmp_path: Path,
    tokenizer: Tokenizer,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[bytes], bytes] | None,
    refused: str | None,
) -> None:
    """The second table of damage in docs/data.md."""
    monkeypatch.setattr(module, "SMALLEST_PIECE", 1 << 13)
    source = write_dirty(tmp_path / "in.jsonl", texts, 1)
    run_filtered(source, tmp_path / "whole", tokenizer)

    def interrupt(done: Progress) -> None:
        if done.counts.documents > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_filtered(source, tmp_path / "out", tokenizer, report=interrupt)
    path = tmp_path / "out.partial" / name
    if damage is None:
        path.unlink()
    else:
        data = path.read_bytes()
        assert damage(data) != data
        path.write_bytes(damage(data))
    if refused is None:
        assert run_filtered(source, tmp_path / "out", tokenizer).progress.resumed.documents > 0
    else:
        with pytest.raises(DataError, match=refused):
            run_filtered(source, tmp_path / "out", tokenizer)
        if name != "journal.jsonl":
            shutil.rmtree(tmp_path / "out.partial")
        run_filtered(source, tmp_path / "out", tokenizer, overwrite=True)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1 << 20, 999])
def test_what_is_left_out_depends_on_the_corpus_alone(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Against a plain loop over the lines; whatever the cuts, the batches, the workers and the backend."""
    source = write_dirty(tmp_path / "in.jsonl", texts, 1)
    expected: list[tuple[str, int, int]] = []
    for line, record in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        text = json.loads(record)["text"] if record else None
        if text is not None and 2 <= len(text) <= 1500 and text not in [kept for kept, _, _ in expected]:
            expected.append((text, line, json.loads(record)["id"]))
    monkeypatch.setattr(module, "SMALLEST_PIECE", cut)
    monkeypatch.setattr("megatron_aquila.data.shards.BATCH_BYTES", cut // 2)
    monkeypatch.setattr("megatron_aquila.data.selection.CHUNK", 100)
    done = run_filtered(source, tmp_path / "out", tokenizer, workers=1 + (cut == 999))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert [dataset[number].tolist() for number in range(len(dataset))] == [
        [*tokenizer.encode(text), tokenizer.eod] for text, _, _ in expected
    ]
    found = [(number, line, {"id": kept}) for number, (_, line, kept) in enumerate(expected)]
    assert meta(tmp_path / "out") == found
    counts = done.progress.counts
    dropped = counts.too_short + counts.too_long + counts.duplicates + counts.bad_records
    assert counts.documents + dropped == sum(1 for line in source.read_text().splitlines() if line)
    assert counts.tokens == len(dataset.tokens)


def test_parts_find_their_own_duplicates_only(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", 56)  # four lines
    source = write_jsonl(tmp_path / "in.jsonl", ["a", "b", "a", "c", "a", "d", "d", "a"])
    said: list[str] = []
    for index in range(2):
        read = ReadOptions(keep_meta=("text",))
        run([source], tmp_path / "out", tokenizer, shard=(index, 2), deduplicate=True, read=read, say=said.append)
    first, second = (meta(tmp_path / f"out_shard{index:05d}of00002") for index in range(2))
    assert [(line, kept["text"]) for _, line, kept in first] == [(1, "a"), (2, "b"), (4, "c")]
    assert [(line, kept["text"]) for _, line, kept in second] == [(5, "a"), (6, "d")]
    assert [number for number, _, _ in second] == [0, 1]
    assert "--deduplicate with --shard: equal documents are found within this part, not between parts" in said


@pytest.mark.usefixtures("_small_pieces")
def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*texts * 3, None])
    with pytest.raises(DataError, match="is null"):
        run([source], tmp_path / "out", tokenizer)
    with pytest.raises(ConfigError, match=r"unfinished run with other append_eod; give the same settings to go on"):
        run([source], tmp_path / "out", tokenizer, append_eod=True)
    grown = tmp_path / "out.partial" / "text.bin"
    grown.write_bytes(bytes(len(grown.read_bytes())))
    with pytest.raises(DataError, match=r"text.bin: was changed since it was written"):
        run([source], tmp_path / "out", tokenizer)
    write_jsonl(source, texts)
    with pytest.raises(ConfigError, match="with other inputs, pieces;"):
        run([source], tmp_path / "out", tokenizer)
    run([source], tmp_path / "out", tokenizer, overwrite=True)
    assert IndexedDataset(tmp_path / "out_text_document").document_indices[-1] > 0


@pytest.mark.usefixtures("_small_pieces")
def test_a_part_goes_on_only_with_the_corpus_it_was_cut_from(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    """Although its own files are the same."""
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", texts) for name in ("a", "renamed"))
    mine = write_jsonl(tmp_path / "b.jsonl", [*texts * 2, None])
    with pytest.raises(DataError, match="is null"):
        run([first, mine], tmp_path / "out", tokenizer, shard=(1, 2))
    with pytest.raises(ConfigError, match="holds an unfinished run with other corpus; give the same settings"):
        run([second, mine], tmp_path / "out", tokenizer, shard=(1, 2))
    with pytest.raises(DataError, match="is null"):
        run([first, mine], tmp_path / "out", tokenizer, shard=(1, 2))


@pytest.mark.usefixtures("_small_pieces")
def test_shards_are_the_whole_cut(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    sources = [write_jsonl(tmp_path / "a.jsonl", texts * 4), write_jsonl(tmp_path / "b.jsonl", texts)]
    run(sources, tmp_path / "out", tokenizer, backend="tokenizers")
    whole = IndexedDataset(tmp_path / "out_text_document")
    for count in (1, 3):
        parts = []
        for index in range(count):
            run(sources, tmp_path / "out", tokenizer, backend="tokenizers", shard=(index, count))
            parts.append(IndexedDataset(tmp_path / f"out_shard{index:05d}of{count:05d}_text_document"))
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        assert sum(len(part.document_indices) - 1 for part in parts) == len(whole.document_indices) - 1
    few = write_jsonl(tmp_path / "few.jsonl", ["one piece"])
    done = [run([few], tmp_path / "few", tokenizer, backend="tokenizers", shard=(index, 3)) for index in range(3)]
    assert sorted(one.progress.counts.documents for one in done) == [0, 0, 1], "a shard may have nothing to do"


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_many_small_files_share_shards(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of each takes milliseconds; what is said of a document still names its own file and line."""
    texts = [f"document {number}" for number in range(40)]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        if kind == "text":
            (tmp_path / f"in/{number:02}.txt").write_text(text)
        else:
            write_jsonl(tmp_path / f"in/{number:02}.jsonl", [text])
    monkeypatch.setattr(module, "PIECES", 4)
    (tmp_path / f"in/20.{'txt' if kind == 'text' else 'jsonl'}").write_bytes(b'{"text": "\xff"}\n')
    keep = ReadOptions(keep_meta=("text",))
    done = run([tmp_path / "in"], tmp_path / "out", tokenizer, read=keep, skip_bad_lines=True)
    assert done.progress.counts.bad_records == 1
    texts.pop(20)
    run([write_jsonl(tmp_path / "all.jsonl", texts)], tmp_path / "one", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "one")
    said = [json.loads(line) for line in Path(f"{tmp_path}/out.meta.jsonl").read_text().splitlines()]
    assert [(Path(line["source"]).stem, line["line"]) for line in said] == [
        (f"{number:02}", 1) for number in range(40) if number != 20
    ]
    (bad,) = Path(f"{tmp_path}/out.bad.jsonl").read_text().splitlines()
    assert (Path(json.loads(bad)["file"]).stem, json.loads(bad)["line"]) == ("20", 1)
    manifest = read_manifest(f"{tmp_path}/out_text_document")
    assert manifest is not None
    assert len(manifest.origin.sources) == 40


def test_standard_input(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a", "b"])
    with source.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        done = run([Path("-")], tmp_path / "out", tokenizer, workers=2)
    assert done.progress.counts.documents == 2
    assert done.progress.seconds_left is None


def test_a_cluster_has_another_standard_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for more in ({"input_format": "json-array"}, {"input_format": "text", "text_documents": "blank-line"}):
        with pytest.raises(ConfigError, match=r"--engine ray: standard input that is not cut .* use --engine local"):
            run([Path("-")], tmp_path / "out", tokenizer, engine="ray", **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_pipe_nothing_is_lost(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    """As of the shell's <(zcat ...): what the choice of an encoder would read of it is gone."""
    source = write_jsonl(tmp_path / "in.jsonl", [f"document {number}" for number in range(500)])
    run([source], tmp_path / "file", tokenizer)
    ours, theirs = os.pipe()
    with subprocess.Popen(["cat", str(source)], stdout=theirs):
        os.close(theirs)
        pipe = Path(f"/dev/fd/{ours}")
        run([pipe], tmp_path / "pipe", tokenizer, input_format="jsonl", workers=workers)
    os.close(ours)
    assert files(tmp_path / "pipe") == files(tmp_path / "file")


@pytest.mark.usefixtures("_small_pieces")
def test_every_piece_is_of_one_shard(tmp_path: Path) -> None:
    """A pipe behind all files, too, of which no bytes are known beforehand."""
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 1000] * 20)
    pieces = module._plan(PreprocessSettings(inputs=(str(source), "-"), output_prefix=""))
    for count in (1, 2, 3, 50):
        shared = [piece for index in range(count) for piece in module._share(pieces, (index, count))]
        assert [replace(piece, index=0) for piece in shared] == [replace(piece, index=0) for piece in pieces]


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("emptied", ["text.bin", "facts.json"])
def test_a_shard_that_a_power_cut_emptied_is_made_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, emptied: str
) -> None:
    """Its name can be on the disk before what it stands for."""
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 1000] * 20)
    run([source], tmp_path / "whole", tokenizer)

    def stop(*_: object) -> None:
        raise DataError("stopped with a finished shard that is not appended")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_aquila.data.output.Output.append", stop)
        patch.setattr("megatron_aquila.data.output.Output.close", lambda self: self._journal.close())
        with pytest.raises(DataError, match="stopped"):
            run([source], tmp_path / "out", tokenizer)
    (tmp_path / "out.partial" / "000000-000000" / emptied).write_bytes(b"")
    run([source], tmp_path / "out", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_it_starts_without_what_takes_long_to_import() -> None:
    code = (
        "import sys, megatron_aquila.data.ray_engine\n"
        "from megatron_aquila.commands.preprocess import main\n"
        "assert main(['--input', '/absent', '--output-prefix', 'x', '--json-keys', 'a', 'b']) == 2\n"
        "slow = {'torch', 'transformers', 'ray', 'pandas', 'awkward', 'typeguard'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
