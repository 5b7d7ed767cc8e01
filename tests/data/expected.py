"""Cases of ``expected_gpt.json`` as arguments and checks."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_aquila.data.blend import Splits, build_datasets, build_datasets_per_split
from megatron_aquila.data.samples import SampleSource


def load_case(folder: Path, name: str) -> dict[str, Any]:
    cases = json.loads((folder / "expected_gpt.json").read_text())
    return next(case for case in cases if case["name"] == name)


def build_case(folder: Path, case: dict[str, Any], cache_path: Path, **settings: Any) -> Splits:
    arguments = {"sizes": tuple(case["sizes"]), "seq_len": case["sequence_length"], "seed": case["random_seed"]}
    if "blend_per_split" in case["options"]:
        paths = tuple(data_path(folder, *blend) for blend in case["options"]["blend_per_split"])
        return build_datasets_per_split(paths, **(arguments | settings), cache_path=cache_path)
    arguments["split"] = case["options"]["split"]
    return build_datasets(data_path(folder, *case["options"]["blend"]), **(arguments | settings), cache_path=cache_path)


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
