"""Cases of ``expected_gpt.json`` as arguments and checks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_aquila.data.blend import SPLITS, Share, Splits, alone, build_datasets, open_library, shares_of
from megatron_aquila.data.samples import SampleSource


def load_case(folder: Path, name: str) -> dict[str, Any]:
    cases = json.loads((folder / "expected_gpt.json").read_text())
    return next(case for case in cases if case["name"] == name)


def build_case(folder: Path, case: dict[str, Any], cache_path: Path, **settings: Any) -> Splits:
    arguments = {"sizes": tuple(case["sizes"]), "seq_len": case["sequence_length"], "seed": case["random_seed"]}
    if "blend_per_split" in case["options"]:
        paths = tuple(data_path(folder, *blend) for blend in case["options"]["blend_per_split"])
        return build_per_split(paths, **(arguments | settings), cache_path=cache_path)
    arguments["split"] = case["options"]["split"]
    path = data_path(folder, *case["options"]["blend"])
    if not case["options"].get("drop_last_partial_validation_sequence", True):
        return build_partial_validation(path, **(arguments | settings), cache_path=cache_path)
    return build_datasets(path, **(arguments | settings), cache_path=cache_path)


def build_per_split(paths: Sequence[Sequence[str]], *, sizes: Sequence[int | None], **settings: Any) -> Splits:
    """Each split with data sets of its own, of which it takes all, as the flags of a run for that do."""
    named = zip(SPLITS, paths, sizes, strict=True)
    return Splits(*(open_library(own, **settings).blend(alone(own), Share(name), size) for name, own, size in named))


def build_partial_validation(path: list[str], *, split: str, sizes: Sequence[int | None], **settings: Any) -> Splits:
    """``build_datasets``, but for the last sample of the validation, which is kept though it is not whole."""
    train, valid, test = shares_of(split)
    assert train is not None
    assert valid is not None
    assert test is None
    library = open_library(path, **settings)
    shares = (train, replace(valid, keep_partial=True))
    return Splits(*(library.blend(path, share, size) for share, size in zip(shares, sizes, strict=False)), None)


def data_path(folder: Path, names: list[str], weights: list[float] | None) -> list[str]:
    prefixes = [str(folder / name) for name in names]
    return prefixes if weights is None else [str(x) for pair in zip(weights, prefixes, strict=True) for x in pair]


def assert_equals(source: SampleSource, expected: dict[str, Any]) -> None:
    """Every index value, the samples that are written out, and the hash over all of them."""
    assert len(source) == expected["len"]
    for name, values in expected.items():
        if name.endswith("_index"):
            assert getattr(source, name).tolist() == values, name
    for number, sample in expected.get("samples", {}).items():
        tokens = source[int(number)].tokens
        assert (tokens[:-1].tolist(), tokens[1:].tolist()) == (sample["tokens"], sample["labels"])
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source[number].tokens[:-1].astype("<i8").tobytes())
    assert digest.hexdigest() == expected["sha256_tokens_of_all_samples_int64_le"]
    for part, wanted in zip(getattr(source, "parts", ()), expected.get("datasets", ()), strict=True):
        assert_equals(part, wanted)
