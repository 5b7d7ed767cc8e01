"""Blends and splits: Megatron-LM's values, and requests that make no sense."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.blend import (
    Blend,
    Share,
    Splits,
    alone,
    build_datasets,
    describe_data,
    open_library,
    parse_blend,
    split_ranges,
)
from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.samples import PackedSamples
from megatron_aquila.errors import DataError
from tests.data.expected import assert_equals, build_case, load_case


@pytest.mark.parametrize("name", ["blend_weighted", "blend_by_size", "blend_per_split", "eod_masks"])
def test_blends_are_megatrons(megatron_fixtures: Path, tmp_path: Path, name: str) -> None:
    case = load_case(megatron_fixtures, name)
    splits = build_case(megatron_fixtures, case, tmp_path)
    for source, expected in zip((splits.train, splits.valid, splits.test), case["splits"], strict=True):
        assert (source is None) == (expected is None)
        if source is not None:
            assert_equals(source, expected)


def test_sources_of_a_blend(megatron_fixtures: Path, tmp_path: Path) -> None:
    blend = build_case(megatron_fixtures, load_case(megatron_fixtures, "blend_weighted"), tmp_path).train
    assert isinstance(blend, Blend)
    assert [Path(name).name for name in blend.names] == ["gpt_a", "gpt_b", "gpt_c"]
    assert [blend[i].source for i in range(300)] == blend.dataset_index.tolist()
    assert blend.describe().startswith("blend of 3 data sets, 300 samples:\n   50.00% ")
    for index in (-1, 300):
        with pytest.raises(IndexError, match=f"sample {index} of a blend of 300"):
            blend[index]


def test_a_split_without_documents_is_an_error(megatron_fixtures: Path, tmp_path: Path) -> None:
    """Megatron-LM loops for ever on this one."""
    with pytest.raises(DataError, match=r"test split, sequences 300 to 300 of 300, holds no tokens.*--split, or 0"):
        build_case(megatron_fixtures, load_case(megatron_fixtures, "empty_split"), tmp_path)


def test_a_split_shorter_than_a_sample(megatron_fixtures: Path, tmp_path: Path) -> None:
    case = load_case(megatron_fixtures, "size_none_one_epoch")
    with pytest.raises(
        DataError, match=r"valid split.* holds 2816 tokens, fewer than the 3001 of one sample.*--seq-len"
    ):
        build_case(megatron_fixtures, case, tmp_path, seq_len=3000)
    repeated = build_case(megatron_fixtures, case, tmp_path, seq_len=3000, sizes=(1, 1, 1))
    assert repeated.valid is not None
    assert len(repeated.valid[0].tokens) == 3001  # with a number of samples the documents repeat


def test_a_blend_cannot_take_more_than_there_is(megatron_fixtures: Path, tmp_path: Path) -> None:
    case = load_case(megatron_fixtures, "blend_weighted")
    blend = build_case(megatron_fixtures, case, tmp_path).train
    assert isinstance(blend, Blend)
    with pytest.raises(DataError, match=r"gpt_c: the blend takes 1\d\d samples, but there are 70"):
        Blend(blend.parts, [0.3, 0.2, 0.5], 300, IndexCache(folder=tmp_path))


def test_a_split_with_data_of_its_own(megatron_fixtures: Path, tmp_path: Path) -> None:
    a, small = str(megatron_fixtures / "gpt_a"), str(megatron_fixtures / "gpt_c")
    library = open_library([a], seq_len=8, seed=1, cache_path=tmp_path)
    train = library.blend([a], Share("train"), 9)
    assert "300 sequences" in train.describe(), "all of it"
    lone = library.blend(alone(["2", a]), Share("train"), 9)
    assert isinstance(lone, PackedSamples), "the weight of a lone set says nothing"
    assert lone[3].tokens.tolist() == train[3].tokens.tolist()
    with pytest.raises(DataError, match=r"gpt_c: the test split, .*; leave the data set out, or lower --seq-len"):
        replace(library, seq_len=10**6).blend([small], Share("test"), None)


def test_nothing_wanted_of_a_split(megatron_fixtures: Path, tmp_path: Path) -> None:
    case = load_case(megatron_fixtures, "blend_weighted")
    splits = build_case(megatron_fixtures, case, tmp_path, sizes=(10, 0, 0), split="90,10,0")
    assert isinstance(splits, Splits)
    assert splits.valid is not None
    assert (len(splits.valid), splits.test) == (0, None)


def test_the_cache_stands_beside_the_data_by_default(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.arange(90), np.full(9, 10))
    build_datasets([str(tmp_path / "data")], sizes=(4, 0, 0), split="1", seq_len=8, seed=1, cache_path=None)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_weighted_blend_needs_sizes(megatron_fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a number of samples"):
        build_case(megatron_fixtures, load_case(megatron_fixtures, "blend_weighted"), tmp_path, sizes=(None, 1, 1))


def test_paths() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b", "c"]) == (["a", "b", "c"], None)
    assert parse_blend(["0.5", "a", "2", "b"]) == (["a", "b"], [0.5, 2.0])
    assert parse_blend(["1", "a"]) == (["a"], [1.0])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no data set given"),
        (["0.5", "a", "0.5"], "do not pair up"),
        (["0.5", "a", "b", "c"], "the weight 'b' is not a positive number"),
        (["0", "a"], "the weight '0' is not a positive number"),
        (["nan", "a"], "the weight 'nan' is not a positive number"),
        (["-1", "a", "1", "b"], "the weight '-1'"),
        (["a", "b", "./a"], r"\./a is named twice; name it once, with the sum of its weights"),
    ],
)
def test_paths_that_make_no_sense(paths: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_blend(paths)


def test_ranges_of_splits() -> None:
    assert split_ranges("90,5,5") == ((0, 0.9), (0.9, 0.9500000000000001), (0.9500000000000001, 1.0))
    assert split_ranges("1") == ((0, 1), None, None)
    assert split_ranges("98,2,0") == ((0, 0.98), (0.98, 1.0), None)
    assert split_ranges("0,1,0") == (None, (0, 1), None)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "1,,2", "inf", "nan,1"])
def test_splits_that_make_no_sense(split: str) -> None:
    with pytest.raises(DataError, match=r"--split .*: give one to three shares"):
        split_ranges(split)


def test_the_identity_of_the_data(megatron_fixtures: Path, tmp_path: Path) -> None:
    a, b = (str(megatron_fixtures / name) for name in ("gpt_a", "gpt_b"))
    found = describe_data(["3", a, "1", b], "90,10,0")
    assert json.loads(json.dumps(found)) == found
    assert str(megatron_fixtures) not in json.dumps(found)
    assert [part["weight"] for part in found] == [0.75, 0.25]
    assert (found[0]["sequences"], found[0]["tokens"]) == (300, 30347)
    assert found[0]["splits"] == {"train": [0, 270], "valid": [270, 300], "test": None}
    index = (megatron_fixtures / "gpt_a.idx").read_bytes()
    assert found[0]["index_sha256"] == hashlib.sha256(index).hexdigest()
    for end in ("bin", "idx"):
        shutil.copy(f"{a}.{end}", tmp_path / f"moved.{end}")
    assert describe_data(["6", str(tmp_path / "moved"), "2", b], "9,1") == found  # the same, written otherwise
    assert [part["weight"] for part in describe_data([a, b], "1")] == [None, None]
    for paths, split in ((["1", b, "3", a], "90,10,0"), (["1", a, "1", b], "90,10,0"), (["3", a, "1", b], "80,20")):
        assert describe_data(paths, split) != found
    with pytest.raises(DataError, match=r"nowhere.idx: cannot be read"):
        describe_data([str(tmp_path / "nowhere")], "1")
