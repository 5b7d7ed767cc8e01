"""Packing: Megatron-LM's indices, and the laws they obey."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.native import LegacyShuffle
from megatron_aquila.data.samples import PackedSamples, Packing, _shuffled_ranges
from tests.data.expected import assert_equals, build_case, load_case


@pytest.mark.parametrize(
    "name",
    ["one_epoch", "many_epochs_separate_final", "size_none_one_epoch", "keep_last_partial_validation_sized"],
)
def test_indices_and_samples_are_megatrons(megatron_fixtures: Path, tmp_path: Path, name: str) -> None:
    case = load_case(megatron_fixtures, name)
    splits = build_case(megatron_fixtures, case, tmp_path)
    for source, expected in zip((splits.train, splits.valid, splits.test), case["splits"], strict=True):
        assert (source is None) == (expected is None)
        if source is not None:
            assert_equals(source, expected)
            assert isinstance(source, PackedSamples)
            assert (source.epoch_tokens, source.num_epochs) == (
                expected["num_tokens_per_epoch"],
                expected["num_epochs"],
            )


def test_another_seed_is_another_order(megatron_fixtures: Path, tmp_path: Path) -> None:
    case = load_case(megatron_fixtures, "one_epoch")
    other = build_case(megatron_fixtures, case, tmp_path, seed=1).train
    with pytest.raises(AssertionError):
        assert_equals(other, case["splits"][0])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 0),
    wanted=st.none() | st.integers(0, 60),
    seq_len=st.integers(1, 6),
)
def test_laws(lengths: list[int], wanted: int | None, seq_len: int) -> None:
    packing = Packing(first=0, end=len(lengths), num_samples=wanted, seq_len=seq_len, seed=3)
    built = dict(packing.build(np.array(lengths, dtype=np.int32)))
    rows = list(built["sample_index"].rows)
    epochs = packing.num_epochs(sum(lengths))
    assert np.bincount(built["document_index"], minlength=len(lengths)).tolist() == [epochs] * len(lengths)
    count = len(built["shuffle_index"])
    assert sorted(built["shuffle_index"].tolist()) == list(range(count))
    assert np.concatenate(rows).shape == built["sample_index"].shape == (count + 1, 2)
    assert wanted is None or count >= wanted
    if wanted is not None and epochs > 1:  # an epoch less would not have been enough
        assert packing.samples_in((epochs - 1) * sum(lengths)) < wanted
    assert (
        dict(packing.build(np.array(lengths, dtype=np.int32)))["shuffle_index"].tolist()
        == built["shuffle_index"].tolist()
    )


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 1),
    wanted=st.none() | st.integers(0, 60),
    seq_len=st.integers(1, 12),
)
def test_nothing_is_lost_where_the_last_sample_is_kept(lengths: list[int], wanted: int | None, seq_len: int) -> None:
    """Every token but the first is a label once an epoch; the whole samples are where they are without the last."""
    with tempfile.TemporaryDirectory() as name:
        with IndexedDatasetWriter(Path(name) / "data", np.uint16) as writer:
            for number, length in enumerate(lengths):
                writer.add_sequence(np.full(length, number + 1))
                writer.end_document()
        data, cache = IndexedDataset(Path(name) / "data"), IndexCache(folder=Path(name))
        packing = Packing(first=0, end=len(lengths), num_samples=wanted, seq_len=seq_len, seed=3)
        kept = PackedSamples(data, replace(packing, keep_partial=True), cache, split="valid")
        samples = [kept[number] for number in range(len(kept))]
        labels = [sample.tokens[1 : len(sample.tokens) - sample.padding] for sample in samples]
        in_order = sorted(zip(kept.shuffle_index, labels, samples, strict=True), key=lambda each: each[0])
        order = np.concatenate([np.full(lengths[number], number + 1) for number in kept.document_index])
        assert np.concatenate([labels for _, labels, _ in in_order]).tolist() == order[1:].tolist()
        assert [sample.padding > 0 for _, _, sample in in_order[:-1]] == [False] * (len(kept) - 1)
        assert (in_order[-1][2].padding > 0) == ((len(order) - 1) % seq_len > 0)
        assert all((sample.tokens[len(sample.tokens) - sample.padding :] == 0).all() for sample in samples)
        for number in range(len(kept)):
            spans = kept.spans(number)
            assert sum(span.stop - span.start for span in spans) == seq_len + 1 - samples[number].padding
        if len(kept.sample_index) > 2 or (len(order) - 1) % seq_len == 0:
            whole = PackedSamples(data, packing, cache, split="valid")
            np.testing.assert_array_equal(whole.sample_index, kept.sample_index[: len(whole) + 1])


def test_long_shuffles_are_wide() -> None:
    assert _shuffled_ranges([0, 3], LegacyShuffle(0)).dtype == np.uint32
    limit = 2**32 - 2
    assert _shuffled_ranges([limit - 1, limit], LegacyShuffle(0)).dtype == np.int64


def test_the_cache_knows_what_the_indices_depend_on(megatron_fixtures: Path, tmp_path: Path) -> None:
    packing = Packing(first=0, end=9, num_samples=4, seq_len=8, seed=1)
    changes = [{}, {"first": 1}, {"end": 8}, {"num_samples": 5}, {"seq_len": 7}, {"seed": 2}]
    cache = IndexCache(folder=tmp_path)
    for change in [*changes, *changes]:
        PackedSamples(IndexedDataset(megatron_fixtures / "gpt_a"), replace(packing, **change), cache, split="train")
    PackedSamples(IndexedDataset(megatron_fixtures / "gpt_b"), packing, cache, split="train")
    assert len(list(tmp_path.iterdir())) == len(changes) + 1


def test_samples_outside(megatron_fixtures: Path, tmp_path: Path) -> None:
    train = build_case(megatron_fixtures, load_case(megatron_fixtures, "one_epoch"), tmp_path).train
    assert train is not None
    assert train[0].source == 0
    assert train.names == (str(megatron_fixtures / "gpt_a"),)
    assert "(train): 270 sequences, 27,225 tokens, 1 epoch, 425 samples" in train.describe()
    for index in (-1, 425):
        with pytest.raises(IndexError, match=f"sample {index} of .* it has 425"):
            train[index]
