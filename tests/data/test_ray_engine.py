"""The same bytes from a Ray cluster; it is started here, in a process of its own."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_aquila.data import ray_engine
from megatron_aquila.data.encoders import ReferenceEncoder
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.preprocess import preprocess
from megatron_aquila.data.preprocess_settings import PreprocessSettings
from megatron_aquila.data.records import ReadOptions
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.errors import DataError

SCRIPT = """
import os, signal, sys
from pathlib import Path
import ray
from megatron_aquila.data import preprocess as module
from megatron_aquila.data.encoders import ReferenceEncoder
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.preprocess import preprocess
from megatron_aquila.data.preprocess_settings import PreprocessSettings
from megatron_aquila.data.records import ReadOptions
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.errors import DataError

source, packed, bad, prefix, model = sys.argv[1:]
module.SMALLEST_PIECE = 1 << 15
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=Path(model))

encode = ReferenceEncoder.encode
class Dies(ReferenceEncoder):  # once, so that Ray tries again
    def encode(self, texts, end):
        try:
            Path(prefix + ".died").open("x").close()
        except FileExistsError:
            return super().encode(texts, end)
        os.kill(os.getpid(), signal.SIGKILL)

module.choose_encoder = lambda *_: type("Choice", (), {"encoder": Dies(tokenizer), "why": "it dies"})
few = {"deduplicate": True, "limits": LengthLimits(min_chars=5, max_chars=2000), "read": ReadOptions(keep_meta=("id",))}
for path, end, more in ((source, "", {}), (bad, "bad", {}), (source, "few", few), (packed, "packed", {})):
    settings = PreprocessSettings(inputs=(path,), output_prefix=prefix + end, engine="ray", append_eod=True, **more)
    try:
        done = preprocess(settings, tokenizer, report=lambda _: None, say=lambda _: None)
        print(done.progress.counts.documents)
    except DataError as error:
        print(error)
"""


def test_rays_bytes_are_one_processs(tmp_path: Path, tokenizer_files: dict[str, Path], megatron_fixtures: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'megatron_aquila[ray]'")
    texts = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    source, packed, bad = tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz", tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts * 3)]
    source.write_text("".join(lines), encoding="utf-8")
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert packed.stat().st_size > 1 << 15, "its blocks are sent to the cluster"
    bad.write_text('{"text": 1}\n')
    model = tokenizer_files["tokenizer_model"]
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=model)
    settings = PreprocessSettings(inputs=(str(source),), output_prefix=str(tmp_path / "one"), append_eod=True)
    few = replace(
        settings,
        output_prefix=str(tmp_path / "onefew"),
        deduplicate=True,
        limits=LengthLimits(min_chars=5, max_chars=2000),
        read=ReadOptions(keep_meta=("id",)),
    )
    _, kept = (preprocess(each, tokenizer, report=lambda _: None, say=lambda _: None) for each in (settings, few))
    command = [sys.executable, "-c", SCRIPT, str(source), str(packed), str(bad), str(tmp_path / "ray"), str(model)]
    patient = os.environ | {"RAY_raylet_start_wait_time_s": "300"}  # a busy machine is slow to start a node
    told = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=patient)
    assert told.returncode == 0, told.stderr
    count, error, few_count, packed_count = [line for line in told.stdout.splitlines() if "(raylet)" not in line]
    assert count == packed_count == str(len(texts) * 3)
    assert error.startswith(f"{bad}:1: 'text' is not a string but a int; mend the line")
    assert (tmp_path / "ray.died").exists()
    left_out = kept.progress.counts
    assert left_out.duplicates >= 2 * left_out.documents > 0
    assert left_out.too_short > 0
    assert few_count == str(left_out.documents)
    ends = [f"{more}_text_document.{end}" for more in ("", "few") for end in ("bin", "idx")]
    for end in (*ends, "few.meta.jsonl"):
        assert (tmp_path / f"ray{end}").read_bytes() == (tmp_path / f"one{end}").read_bytes()
    for end in ends[:2]:
        assert (tmp_path / f"raypacked{end}").read_bytes() == (tmp_path / f"one{end}").read_bytes()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object, **__: object) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setitem(sys.modules, "ray", None)
    no_pieces: Sequence[object] = []
    with pytest.raises(DataError, match=r"--engine ray needs the ray package: pip install 'megatron_aquila\[ray\]'"):
        list(ray_engine.ray_map(ReferenceEncoder, no_pieces, tell=refuse))  # type: ignore[arg-type]
