"""Of documents end to end those that are kept, however the tokens are cut."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.filters import SeenHashes, hashes_of, text_hash
from megatron_aquila.data.provenance import provenance_line
from megatron_aquila.data.selection import kept_tokens, select
from megatron_aquila.data.shards import Counts


@given(documents=st.lists(st.tuples(st.integers(0, 6), st.booleans())), chunk=st.integers(1, 9))
@settings(max_examples=100)
def test_tokens_of_the_kept(documents: list[tuple[int, bool]], chunk: int) -> None:
    lengths = np.array([length for length, _ in documents], dtype=np.int32)
    is_kept = np.array([kept for _, kept in documents], dtype=np.bool_)
    tokens = np.arange(lengths.sum(), dtype=np.uint16)
    found = [np.empty(0, np.uint16), *kept_tokens(tokens, lengths, is_kept, chunk)]
    assert max(map(len, found)) <= chunk
    assert np.concatenate(found).tolist() == tokens[np.repeat(is_kept, lengths)].tolist()


def test_a_shard(tmp_path: Path) -> None:
    texts = ["a", "b", "a", ""]
    tokens, lengths = np.array([1, 1, 2, 1, 1], dtype=np.uint16), np.array([2, 1, 2, 0], dtype=np.int32)
    tokens.tofile(tmp_path / "k.bin")
    lengths.tofile(tmp_path / "k.lengths")
    hashes_of([text_hash((text,)) for text in texts]).tofile(tmp_path / "hashes")
    (tmp_path / "bad.jsonl").write_bytes(b"bad\n")
    lines = [provenance_line(n, source="s", line=n + 1, meta=None) for n in range(4)]
    (tmp_path / "meta.jsonl").write_bytes(b"".join(lines))
    found, counts = {}, Counts(documents=4, tokens=5, num_bytes=9)
    for seen in (None, SeenHashes()):
        selected = select(tmp_path, seen)
        for name in ("k.bin", "k.lengths", "hashes", "bad.jsonl", "meta.jsonl"):
            parts = selected.parts(name, tokens.dtype, first=5, lines_before=10)
            found[name] = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
        assert found["bad.jsonl"] == b"bad\n"
        if seen is None:
            assert found["k.bin"] == tokens.tobytes()
            assert selected.counts(counts, ("k",)) == counts
    assert np.frombuffer(found["k.bin"], np.uint16).tolist() == [1, 1, 2]
    assert np.frombuffer(found["k.lengths"], np.int32).tolist() == [2, 1, 0]
    assert len(found["hashes"]) == 48
    assert [line[:28] for line in found["meta.jsonl"].splitlines()] == [
        b'{"document": 5, "line": 11, ',
        b'{"document": 6, "line": 12, ',
        b'{"document": 7, "line": 14, ',
    ]
    assert selected.counts(counts, ("k",)) == Counts(documents=3, tokens=3, num_bytes=9, duplicates=1)
    again = select(tmp_path, seen)
    assert again.counts(counts, ("k",)).documents == 0
    assert not list(again.parts("meta.jsonl", tokens.dtype, first=0, lines_before=0))
