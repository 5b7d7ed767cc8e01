"""The C++ extension and the numpy reference give identical values, and both give Megatron-LM's."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data import native, reference

try:
    from megatron_aquila import _native
except ImportError:
    _native = None

needs_extension = pytest.mark.skipif(_native is None, reason="the C++ extension is not built: setup.py build_ext")
BUILDERS = [reference, pytest.param(_native, marks=needs_extension)]


def sample_index(
    builder: ModuleType,
    lengths: np.ndarray,
    documents: np.ndarray,
    seq_len: int,
    num_samples: int,
    dtype: type[np.integer] = np.int32,
    block: int = 1 << 30,
) -> np.ndarray:
    """The whole index, each ``block`` of rows going on where the one before it ended."""
    index = np.zeros((num_samples + 1, 2), dtype=dtype)
    for row in range(0, num_samples, block):
        builder.fill_sample_index(lengths, documents, seq_len, tuple(index[row].tolist()), index[row + 1 :][:block])
    return index


@pytest.mark.parametrize("builder", BUILDERS)
def test_sample_index_is_megatrons(megatron_fixtures: Path, builder: ModuleType) -> None:
    cases = json.loads((megatron_fixtures / "expected_helpers.json").read_text())["build_sample_idx"]
    cases = [case for case in cases if case["drop_last_partial_sequence"] and case["add_extra_token"] == 1]
    assert len(cases) == 4
    for case in cases:
        lengths, documents = (np.array(case[name], dtype=np.int32) for name in ("sizes", "document_index"))
        num_samples = (case["num_epochs"] * case["tokens_per_epoch"] - 1) // case["sequence_length"]
        for block in (1, 3, 1 << 30):
            index = sample_index(builder, lengths, documents, case["sequence_length"], num_samples, block=block)
            assert index.dtype == case["dtype"]
            assert index.tolist() == case["sample_index"]


@pytest.mark.parametrize("builder", BUILDERS)
def test_blends_are_megatrons(megatron_fixtures: Path, builder: ModuleType) -> None:
    expected = json.loads((megatron_fixtures / "expected_helpers.json").read_text())
    for case in expected["build_blending_indices"]:
        dataset, sample = builder.build_blending_indices(np.array(case["weights"]), case["size"])
        assert (dataset.dtype, sample.dtype) == (np.int16, np.int64)
        assert dataset.tolist() == case["dataset_index"]
        assert sample.tolist() == case["dataset_sample_index"]
    for case in expected["build_exhaustive_blending_indices"]:
        dataset, sample = builder.build_exhaustive_blending_indices(np.array(case["sizes"]))
        assert dataset.tolist() == case["dataset_index"]
        assert sample.tolist() == case["dataset_sample_index"]


@needs_extension
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    epochs=st.integers(1, 3),
    seq_len=st.integers(1, 7),
    dtype=st.sampled_from([np.int32, np.int64]),
    block=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_sample_index_of_both(
    lengths: list[int], epochs: int, seq_len: int, dtype: type[np.integer], block: int, seed: int
) -> None:
    documents = np.random.default_rng(seed).permutation(np.tile(np.arange(len(lengths), dtype=np.int32), epochs))
    arguments = (np.array(lengths, dtype=np.int32), documents, seq_len)
    num_samples = max(0, epochs * sum(lengths) - 1) // seq_len
    index = sample_index(reference, *arguments, num_samples, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", 2)
        for builder in (reference, _native):
            blocks = sample_index(builder, *arguments, num_samples, dtype, block)
            np.testing.assert_array_equal(blocks, index, strict=True)
    # Every row but the first, which Megatron-LM puts at (0, 0), is on a token that exists; rows are seq_len apart.
    assert (index[1:, 1] < np.array(lengths)[documents[index[1:, 0]]]).all()
    before = np.cumsum(np.array(lengths)[documents]) - np.array(lengths)[documents]
    assert (before[index[:, 0]] + index[:, 1]).tolist() == [row * seq_len for row in range(num_samples + 1)]


@needs_extension
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), size=st.integers(0, 200))
def test_blends_of_both(weights: list[float], size: int) -> None:
    shares = np.array(weights) / np.sum(weights)
    ours, twin = _native.build_blending_indices(shares, size), reference.build_blending_indices(shares, size)
    for built, expected in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(built, expected, strict=True)
    for number in range(len(weights)):  # each set's samples are taken in order, none left out
        assert ours[1][ours[0] == number].tolist() == list(range(int((ours[0] == number).sum())))
    assert np.abs(np.bincount(ours[0], minlength=len(weights)) - shares * size).max() < len(weights)


@needs_extension
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_exhaustive_blends_of_both(sizes: list[int]) -> None:
    given_sizes = np.array(sizes)
    ours = _native.build_exhaustive_blending_indices(given_sizes)
    for built, expected in zip(ours, reference.build_exhaustive_blending_indices(given_sizes), strict=True):
        np.testing.assert_array_equal(built, expected, strict=True)
    assert np.bincount(ours[0], minlength=len(sizes)).tolist() == sizes


@pytest.mark.parametrize("builder", BUILDERS)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.int32, np.uint32, np.int64]),
)
def test_shuffles_are_numpys(builder: ModuleType, sizes: list[int], seed: int, dtype: type[np.integer]) -> None:
    """One after the other from one stream, as Megatron-LM shuffles documents and then samples."""
    ours, numpys = builder.LegacyShuffle(seed), np.random.RandomState(seed)
    for size in sizes:
        values, expected, reported = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype), []
        ours.shuffle(values, reported.append)
        numpys.shuffle(expected)
        np.testing.assert_array_equal(values, expected, strict=True)
        assert sum(reported) == max(size - 1, 0)


@needs_extension
@given(size=st.sampled_from([0, 128, 624, 1 << 11, 1 << 16]), more=st.integers(-3, 260), seed=st.integers(0, 2**32 - 1))
def test_shuffles_around_borders(size: int, more: int, seed: int) -> None:
    """Of powers of two, where the mask changes, of the blocks that are drawn ahead, and of the generator's."""
    size = max(0, size + more)
    values, expected = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)
    _native.LegacyShuffle(seed).shuffle(values, lambda _: None)
    np.random.RandomState(seed).shuffle(expected)
    np.testing.assert_array_equal(values, expected)


@needs_extension
def test_another_seed_is_another_shuffle() -> None:
    size = (1 << 16) + 77
    values, expected = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)
    np.random.RandomState(3).shuffle(expected)
    _native.LegacyShuffle(4).shuffle(values, lambda _: None)
    assert (values != expected).any()


def test_numpy_draws_the_high_word_first() -> None:
    """What the extension does beyond 2**32 elements, where no test can shuffle."""
    wide = np.random.RandomState(5).randint(0, 2**64, size=9, dtype=np.uint64)
    words = np.random.RandomState(5).randint(0, 2**32, size=18, dtype=np.uint32).astype(np.uint64)
    assert (wide == (words[::2] << np.uint64(32) | words[1::2])).all()


@needs_extension
def test_an_exception_ends_a_shuffle() -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    for builder in (_native, reference):
        with pytest.raises(KeyboardInterrupt):
            builder.LegacyShuffle(1).shuffle(np.arange(5, dtype=np.int32), fail)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_seed_that_is_none(builder: ModuleType) -> None:
    for seed in (-1, 2**32):
        with pytest.raises((ValueError, TypeError)):
            builder.LegacyShuffle(seed)


@pytest.mark.parametrize("builder", BUILDERS)
def test_impossible_requests(builder: ModuleType) -> None:
    lengths, documents = np.array([5, 3], dtype=np.int32), np.array([1, 0], dtype=np.int32)
    row = np.zeros((1, 2), dtype=np.int32)
    builder.fill_sample_index(lengths, documents, 7, (0, 0), row)
    assert row.tolist() == [[1, 4]]
    for start, order in (((0, 1), documents), ((1, 5), documents), ((2, 0), documents), ((0, 0), documents[:0])):
        with pytest.raises(ValueError, match="fewer tokens"):
            builder.fill_sample_index(lengths, order, 7, start, row)
    with pytest.raises(ValueError, match="document 2 does not exist"):
        builder.fill_sample_index(lengths, documents + np.int32(1), 4, (0, 0), row)
    for seq_len, start in ((0, (0, 0)), (4, (-1, 0)), (4, (0, -1))):
        with pytest.raises(ValueError, match="seq_len must be positive"):
            builder.fill_sample_index(lengths, documents, seq_len, start, row)
    for weights, size in (([], 1), ([1.0], -1)):
        with pytest.raises(ValueError, match="1 to 32767"):
            builder.build_blending_indices(np.array(weights, dtype=np.float64), size)


@needs_extension
def test_the_extension_converts_nothing() -> None:
    with pytest.raises(TypeError):
        _native.fill_sample_index(np.array([5]), np.array([0], dtype=np.int32), 4, (0, 0), np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="rows of two"):
        _native.fill_sample_index(np.array([5], np.int32), np.zeros(1, np.int32), 4, (0, 0), np.zeros(2, np.int32))
    with pytest.raises(TypeError):
        _native.LegacyShuffle(1).shuffle(np.arange(5, dtype=np.uint8), print)
    with pytest.raises(ValueError, match="one-dimensional"):
        _native.build_blending_indices(np.ones((1, 1)), 1)


def test_what_runs_is_said() -> None:
    built = _native is not None
    assert native.INDEX_BUILDER.startswith("C++" if built else "numpy")
    assert native.fill_sample_index is (_native if built else reference).fill_sample_index


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy: the module was imported before
def test_numpy_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_aquila._native", None)
    monkeypatch.delattr("megatron_aquila._native", raising=False)
    loaded = runpy.run_module("megatron_aquila.data.native")
    assert loaded["INDEX_BUILDER"].startswith("numpy, slower: the C++ extension is not built")
    assert loaded["fill_sample_index"] is reference.fill_sample_index


@needs_extension
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6),
    mark=st.sampled_from([-1, 0, 3]),
    end=st.sampled_from([-1, 0, 7]),
)
def test_documents_are_split_alike(documents: list[list[int]], mark: int, end: int) -> None:
    ids = np.array([id for document in documents for id in (*document, 10)], dtype=np.uint32)
    special = {"documents": len(documents), "border": 10, "mark": mark, "end": end}
    theirs = reference.split_documents(ids.copy(), **special)
    ours = _native.split_documents(ids, **special)
    kept = [[id for id in document if id != mark] for document in documents]
    whole = [[*tokens, end] if tokens and end >= 0 else tokens for tokens in kept]
    for tokens, lengths in (theirs, ours):
        assert tokens.tolist() == [id for document in whole for id in document]
        assert lengths.tolist() == [len(document) for document in whole]
        assert (tokens.dtype, lengths.dtype) == (np.uint32, np.int64)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("ids", "documents"), [([10, 10], 1), ([10], 2), ([1], 0), ([10, 1], 1)])
def test_borders_must_fit_the_documents(builder: ModuleType, ids: list[int], documents: int) -> None:
    with pytest.raises(ValueError, match="borders"):
        builder.split_documents(np.array(ids, dtype=np.uint32), documents=documents, border=10, mark=-1, end=-1)


@needs_extension
@given(
    samples=st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 3), min_size=width + 1, max_size=width + 1), min_size=1)
    ),
    eod=st.sampled_from([-1, 0]),
    rules=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_batches_are_laid_out_alike(samples: list[list[int]], eod: int, rules: tuple[bool, bool, bool]) -> None:
    given_rules = dict(zip(("reset_positions", "reset_attention", "mask_loss"), rules, strict=True))
    block = np.array(samples, dtype=np.int64)
    theirs = reference.lay_out(block, eod=eod, **given_rules)
    for ours, expected in zip(_native.lay_out(block, eod=eod, **given_rules), theirs, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            assert ours.dtype == expected.dtype
            assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2", "<i4", "<i8", "<f4", "<f8"])
def test_a_sample_is_read(builder: ModuleType, dtype: str) -> None:
    tokens, out = np.arange(9).astype(dtype), np.empty(6, dtype=np.int64)
    lengths, order = np.array([4, 0, 5], dtype=np.int32), np.array([2, 1, 0], dtype=np.int32)
    offsets = np.array([0, 4, 4], dtype=np.int64) * tokens.dtype.itemsize
    read = partial(builder.read_sample, tokens, offsets, lengths, order)
    read((0, 2, 2, 2), out)
    assert out.tolist() == [6, 7, 8, 0, 1, 2]
    wrong = {(0, 2, 3, 2): "order", (0, 2, 2, 1): "few", (0, 1, 2, 2): "its tokens", (2, 2, 2, 9): "its tokens"}
    for range_, why in wrong.items():
        with pytest.raises(ValueError, match=why):
            read(range_, out)
    with pytest.raises(ValueError, match="does not exist"):
        builder.read_sample(tokens, offsets, lengths, np.array([3], dtype=np.int32), (0, 0, 0, 5), out)
