"""One packed file, or a pipe, keeps all workers busy, and gives the bytes of the plain file whatever happens."""

import gzip
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megatron_aquila.data import blocks as module
from megatron_aquila.data import preprocess as whole
from megatron_aquila.data import streams
from megatron_aquila.data.blocks import Corpus, corpus_of
from megatron_aquila.data.encoders import Encoded, ReferenceEncoder
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.inputs import Piece, plan_pieces
from megatron_aquila.data.output import Output
from megatron_aquila.data.preprocess import Done, Progress, preprocess
from megatron_aquila.data.preprocess_settings import PreprocessSettings
from megatron_aquila.data.records import ReadOptions
from megatron_aquila.data.shards import Shard, ShardWriter
from megatron_aquila.data.tokenizer import Tokenizer, load_tokenizer
from megatron_aquila.data.workers import AHEAD
from megatron_aquila.errors import DataError

zstandard = pytest.importorskip("zstandard", reason="an extra (data)")

FRAME = 10_000
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: b"".join(
        zstandard.ZstdCompressor().compress(data[start : start + FRAME]) for start in range(0, len(data), FRAME)
    ),
}
BLOCK = 1 << 13
FILES = ("_text_document.bin", "_text_document.idx", ".meta.jsonl", ".bad.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_files["tokenizer_model"])


@pytest.fixture(scope="module")
def corpus(megatron_fixtures: Path) -> bytes:
    """About thirty blocks of documents and blank lines, some lines bad, some text there twice."""
    texts = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    draw = random.Random(3)
    lines = []
    for number in range(500):
        text = None if draw.random() < 0.03 else draw.choice(texts)[: draw.choice([1, 400, 2000])]
        lines += [json.dumps({"text": text, "id": number}) + "\n", "\n" * (draw.random() < 0.1)]
    data = "".join(lines).encode()
    assert 20 * BLOCK < len(data) < 60 * BLOCK
    return data


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "SMALLEST_PIECE", BLOCK)
    monkeypatch.setattr(streams, "PACKED_BYTES", 1 << 10)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(PACK.get(path.suffix, bytes)(data))
    return path


def run(
    source: Path | str,
    prefix: Path,
    tokenizer: Tokenizer,
    report: Callable[[Progress], None] = lambda _: None,
    **settings: Any,
) -> Done:
    settings = {"backend": "tokenizers", "skip_bad_lines": True, **settings}
    made = PreprocessSettings(inputs=(str(source),), output_prefix=str(prefix), append_eod=True, **settings)
    return preprocess(made, tokenizer, report=report, say=lambda _: None)


def run_filtered(source: Path | str, prefix: Path, tokenizer: Tokenizer, **settings: Any) -> Done:
    """Everything on that counts lines and documents."""
    settings |= {"read": ReadOptions(keep_meta=("id",)), "limits": LengthLimits(min_chars=2, max_chars=1500)}
    return run(source, prefix, tokenizer, deduplicate=True, **settings)


def found(prefix: Path, source: Path | str) -> list[bytes]:
    """All files of an output, the input's name apart."""
    named = json.dumps(str(source)).encode()
    paths = [Path(f"{prefix}{end}") for end in FILES]
    return [path.read_bytes().replace(named, b'"in"') if path.exists() else b"" for path in paths]


def told(log: Path) -> list[tuple[int, str]]:
    """Process and place of every shard that was made."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), place) for pid, place in (line.split(" ", 1) for line in lines)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Who made which shard, a line each, as it gets its name."""
    log = tmp_path / "made"
    write_shard = ShardWriter._write

    def logged(self: ShardWriter, *arguments: Any) -> Shard:
        shard = write_shard(self, *arguments)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {shard.place}\n")
        return shard

    monkeypatch.setattr(ShardWriter, "_write", logged)
    return log


@pytest.mark.parametrize("how", [".gz", ".zst", "stdin", "pipe"])
def test_a_stream_gives_the_bytes_of_the_plain_file_and_every_worker_has_a_part(
    tmp_path: Path, tokenizer: Tokenizer, corpus: bytes, monkeypatch: pytest.MonkeyPatch, made: Path, how: str
) -> None:
    plain = write(tmp_path / "in.jsonl", corpus)
    expected = run_filtered(plain, tmp_path / "plain", tokenizer)
    made.unlink()
    source: Path | str = write(tmp_path / f"in.jsonl{how if how in PACK else '.gz'}", corpus)
    feeder = multiprocessing.get_context("fork").Process(target=Path(source).read_bytes)
    if how == "stdin":
        monkeypatch.setattr(sys, "stdin", Path(source).open())  # noqa: SIM115
        source = "-"
    if how == "pipe":
        source = tmp_path / "pipe.jsonl"
        os.mkfifo(source)
        feeder = multiprocessing.get_context("fork").Process(target=source.write_bytes, args=(corpus,))
    feeder.start()
    seen: list[int] = []
    done = run_filtered(
        source, tmp_path / "out", tokenizer, workers=3, report=lambda done: seen.append(done.file_bytes)
    ).progress
    feeder.join()
    assert found(tmp_path / "out", source) == found(tmp_path / "plain", plain)
    assert done.counts == expected.progress.counts
    assert len({pid for pid, _ in told(made)}) == 3
    assert len(told(made)) > 20
    assert seen == sorted(seen)
    assert seen[-1] == done.total_file_bytes == (Path(source).stat().st_size if how in PACK else 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_joined_as_those_of_a_file(
    tmp_path: Path, tokenizer_files: dict[str, Path], corpus: bytes, workers: int
) -> None:
    """By C++ and gigatoken, where they are there."""
    aquila = load_tokenizer("AquilaTokenizer", **tokenizer_files)  # type: ignore[arg-type]
    plain, packed = write(tmp_path / "in.jsonl", corpus), write(tmp_path / "in.jsonl.zst", corpus)
    run(plain, tmp_path / "plain", aquila)
    run(packed, tmp_path / "out", aquila, backend="auto", workers=workers)
    assert found(tmp_path / "out", packed) == found(tmp_path / "plain", plain)


def _killed(folder: Path, prefix: Path, tokenizer: Tokenizer, shards: int) -> None:
    """Die when so many shards are appended."""
    append = Output.append

    def counted(self: Output, *arguments: Any) -> Shard:
        kept = append(self, *arguments)
        if self.num_shards == shards:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept

    Output.append = counted  # type: ignore[method-assign]
    run_filtered(folder, prefix, tokenizer, workers=2)


@pytest.mark.parametrize("shards", [5, 19])
def test_killed_it_goes_on_without_making_a_shard_twice(
    tmp_path: Path, tokenizer: Tokenizer, corpus: bytes, monkeypatch: pytest.MonkeyPatch, made: Path, shards: int
) -> None:
    half = corpus[: corpus.index(b"\n", len(corpus) // 2) + 1]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl.zst", half)
    write(folder / "b.jsonl.gz", corpus[len(half) :])
    run_filtered(folder, tmp_path / "whole", tokenizer)
    made.unlink()
    arguments = (folder, tmp_path / "out", tokenizer, shards)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = told(made)
    read: list[str] = []

    def opened(path: Path) -> AbstractContextManager[BinaryIO]:
        read.append(path.name)
        return streams.opened(path)

    monkeypatch.setattr(module, "opened", opened)
    done = run_filtered(folder, tmp_path / "out", tokenizer).progress
    places = [place for _, place in told(made)]
    assert shards <= len(before) < len(places)
    assert len(places) == len(set(places)), "none is made twice"
    assert 0 < done.resumed.documents < done.counts.documents
    assert done.file_bytes == done.total_file_bytes >= done.resumed_file_bytes > 0
    assert found(tmp_path / "out", folder) == found(tmp_path / "whole", folder)
    assert read == ["a.jsonl.zst", "b.jsonl.gz"][shards > 10 :], "a file that is done is not unpacked again"


@pytest.mark.parametrize("suffix", PACK)
def test_a_stream_that_is_cut_off_is_named_with_its_line(
    tmp_path: Path, tokenizer: Tokenizer, corpus: bytes, suffix: str
) -> None:
    path = write(tmp_path / f"in.jsonl{suffix}", corpus)
    size = path.stat().st_size * 3 // 4
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError) as caught:
        run(path, tmp_path / "out", tokenizer, workers=2)
    line, _, why = str(caught.value).removeprefix(f"{path}:").partition(": ")
    assert why.startswith(f"the {'gzip' if suffix == '.gz' else 'zstd'} stream is cut off: the file ends at byte ")
    assert why.endswith("all behind this is lost; mend the file, or leave it out: this is more than a line to skip")
    assert 1 < int(line) < corpus.count(b"\n")
    with pytest.raises(DataError) as alone:
        run(path, tmp_path / "out", tokenizer)
    assert str(alone.value) == str(caught.value)


def test_a_bad_line_is_named_as_the_file_counts_it(tmp_path: Path, tokenizer: Tokenizer, corpus: bytes) -> None:
    good = b'{"text": "some words"}\n' * 2000
    path = write(tmp_path / "in.jsonl.gz", good + b'{"text": 3}\n' + good)
    with pytest.raises(DataError, match=r"in.jsonl.gz:2001: 'text' is not a string"):
        run(path, tmp_path / "out", tokenizer, workers=2, skip_bad_lines=False)


class Killed(ReferenceEncoder):
    """Dies, as a worker does that takes too much memory."""

    def encode(self, texts: Any, end: int | None) -> Encoded:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts, end)


def test_a_dead_worker_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, corpus: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_aquila.data.encoders.ReferenceEncoder", Killed)
    with pytest.raises(DataError, match=r"killed by SIGKILL.*what was finished is kept"):
        run(write(tmp_path / "in.jsonl.zst", corpus), tmp_path / "out", tokenizer, workers=2)


def test_a_full_disk_is_an_error(tmp_path: Path, tokenizer: Tokenizer, corpus: bytes) -> None:
    path = write(tmp_path / "in.jsonl.gz", corpus)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # a shard fits, the growing file does not
    try:
        with pytest.raises(DataError, match=r"cannot be written: File too large.*the same command goes on from there"):
            run(path, tmp_path / "out", tokenizer, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(path, tmp_path / "out", tokenizer).progress.resumed.documents > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_few_blocks_are_held_at_once(
    tmp_path: Path, tokenizer: Tokenizer, corpus: bytes, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    held, most = 0, 0
    parts, append = Corpus.parts, Output.append

    def counted(self: Corpus, *arguments: Any) -> Iterator[Piece]:
        nonlocal held, most
        for part in parts(self, *arguments):
            held += 1
            most = max(held, most)
            yield part

    def appended(self: Output, *arguments: Any) -> Shard:
        nonlocal held
        held -= 1
        return append(self, *arguments)

    monkeypatch.setattr(Corpus, "parts", counted)
    monkeypatch.setattr(Output, "append", appended)
    run(write(tmp_path / "in.jsonl.zst", corpus), tmp_path / "out", tokenizer, workers=workers)
    assert held == 0
    assert most <= AHEAD * workers


def test_blocks_are_the_file(tmp_path: Path, corpus: bytes) -> None:
    path = write(tmp_path / "in.jsonl.zst", b"\xef\xbb\xbf" + corpus + b"the last line")
    made = corpus_of(plan_pieces([str(path)]), BLOCK)
    parts = list(made.parts(1 << 20, (-1, 0)))
    data = [part.unpacked.data for part in parts if part.unpacked is not None]
    assert b"".join(data) == corpus + b"the last line"
    assert [part.block for part in parts] == list(range(len(data)))
    assert [part.lines_before for part in parts] == [b"".join(data[:n]).count(b"\n") for n in range(len(data))]
    assert sum(part.num_bytes for part in parts) == made.num_bytes == path.stat().st_size
    assert all(len(block) >= BLOCK for block in data[:-2])
    assert list(made.parts(1 << 20, (0, 4))) == parts[5:]
    assert list(made.parts(1 << 20, (0, 10_000))) == []
    assert [part.unpacked for part in corpus_of(plan_pieces([str(path)]), 1 << 30).parts(1, (-1, 0))] == [None]


def test_which_files_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, if they are few, and pipes; by lines only."""
    monkeypatch.setattr(module, "MANY", 4)
    data = os.urandom(3000)
    for name in ("a.jsonl.gz", "b.txt.zst", "c.jsonl.gz"):
        write(tmp_path / name, data)
    write(tmp_path / "d.jsonl.gz", data[:1000])
    write(tmp_path / "e.json.gz", b"[" + data * 3)
    write(tmp_path / "f.jsonl", data * 3)

    def cut(*names: str, **plan: Any) -> list[str]:
        pieces = plan_pieces([str(path) for path in names], piece_bytes=2000, **plan)
        made = corpus_of(pieces, 2000)
        return [piece.path.name for piece in pieces if piece.index in made.cut]

    everything = [str(path) for path in sorted(tmp_path.iterdir())]
    a, b, c, d, e, f = everything
    assert cut(a, d) == ["a.jsonl.gz"]
    assert cut(a, b, c, text_documents="line") == ["a.jsonl.gz", "b.txt.zst", "c.jsonl.gz"]
    assert cut(a, b, c) == ["a.jsonl.gz", "c.jsonl.gz"], "a whole file is one document"
    assert cut(a, c, d, e, f) == [], "each is small beside the rest"
    assert cut(e, f) == []
    assert cut(d, "-") == ["-"]
    with suppress(DataError):
        assert cut("-", input_format="json-array") == []
