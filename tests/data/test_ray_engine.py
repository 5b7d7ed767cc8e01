"""The same bytes from a Ray cluster; it is started here, in a process of its own."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_aquila.commands.preprocess import main as command
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
os.chdir(Path(source).parent)  # the workers were started elsewhere
runs = [(source, "", {}), (bad, "bad", {}), (source, "few", few), (packed, "packed", {})]
for path, end, more in (*runs, (Path(source).name, "relative", {})):
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
    script = [sys.executable, "-c", SCRIPT, str(source), str(packed), str(bad), str(tmp_path / "ray"), str(model)]
    patient = os.environ | {"RAY_raylet_start_wait_time_s": "300"}  # a busy machine is slow to start a node
    told = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False, env=patient)
    assert told.returncode == 0, told.stderr
    printed = [line for line in told.stdout.splitlines() if "(raylet)" not in line]
    count, error, few_count, packed_count, relative_count = printed
    assert count == packed_count == relative_count == str(len(texts) * 3)
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
        for more in ("packed", "relative"):
            assert (tmp_path / f"ray{more}{end}").read_bytes() == (tmp_path / f"one{end}").read_bytes()


class Task:
    """Of a cluster that was started in ``folder``: done at once, there."""

    def __init__(self, function: Callable[..., object], folder: Path) -> None:
        self.function, self.folder = function, folder

    def remote(self, *arguments: object) -> Callable[[], object]:
        def done() -> object:
            with chdir(self.folder):
                return self.function(*arguments)

        return done


class RayTaskError(Exception):
    """As Ray wraps what a task raised."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class StubRay(ModuleType):
    """What the engine asks of Ray, by one worker in this process; references are functions that do the work."""

    exceptions = SimpleNamespace(RayTaskError=RayTaskError, RayError=RayTaskError)

    def __init__(self, folder: Path, refused: Exception | None = None) -> None:
        super().__init__("ray")
        self.folder, self.refused = folder, refused

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        if self.refused is not None:
            raise self.refused

    def remote(self, **_: object) -> Callable[[Callable[..., object]], Task]:
        return lambda function: Task(function, self.folder)

    def put(self, value: object) -> object:
        return value

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def wait(self, references: list[object], **_: object) -> tuple[list[object], list[object]]:
        return references, []

    def get(self, reference: Callable[[], object]) -> object:
        try:
            return reference()
        except DataError as error:
            raise RayTaskError(error) from error

    def cancel(self, reference: object, *, force: bool) -> None:
        pass


def preprocessed(tokenizer_files: dict[str, Path], source: str, prefix: str, *more: str) -> int:
    arguments = ["--input", source, "--output-prefix", prefix, "--tokenizer-backend", "tokenizers", "--append-eod"]
    model = str(tokenizer_files["tokenizer_model"])
    return command([*arguments, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model, *more])


def test_relative_inputs_are_the_commands_not_the_clusters(
    tmp_path: Path, tokenizer_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "cluster").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.jsonl").write_text(f'{{"text": "text {name}"}}\n' * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", StubRay(tmp_path / "cluster"))
    for engine in ("local", "ray"):
        assert preprocessed(tokenizer_files, "in", f"out/{engine}", "--keep-meta", "text", "--engine", engine) == 0
    for end in ("_text_document.bin", "_text_document.idx", ".meta.jsonl"):
        assert (tmp_path / f"out/ray{end}").read_bytes() == (tmp_path / f"out/local{end}").read_bytes()
    assert list((tmp_path / "cluster").iterdir()) == []


def test_a_machine_without_the_commands_folder(
    tmp_path: Path,
    tokenizer_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Absolute paths do not need it."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", StubRay(tmp_path))
    monkeypatch.setattr(ray_engine.Path, "cwd", lambda: Path("/nowhere/home"))
    assert preprocessed(tokenizer_files, "in.jsonl", f"{tmp_path}/out", "--engine", "ray") == 2
    assert "error: in.jsonl: a relative path of /nowhere/home, which is not there on " in capsys.readouterr().err
    assert preprocessed(tokenizer_files, f"{tmp_path}/in.jsonl", f"{tmp_path}/out", "--engine", "ray") == 0


@pytest.mark.parametrize("address", ["10.0.0.9:6379", None])
def test_no_cluster(
    tmp_path: Path,
    tokenizer_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str | None,
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    where = "none can be started here"
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
        where = f"none answers at RAY_ADDRESS={address}"
    for refused in (ConnectionError("no answer"), RuntimeError("no answer"), ValueError("no answer")):
        monkeypatch.setitem(sys.modules, "ray", StubRay(tmp_path, refused))
        assert preprocessed(tokenizer_files, f"{tmp_path}/in.jsonl", f"{tmp_path}/out", "--engine", "ray") == 2
        assert f"error: --engine ray: no Ray cluster: {where}: no answer; start one" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object, **__: object) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setitem(sys.modules, "ray", None)
    no_pieces: Sequence[object] = []
    with pytest.raises(DataError, match=r"--engine ray needs the ray package: pip install 'megatron_aquila\[ray\]'"):
        list(ray_engine.ray_map(ReferenceEncoder, no_pieces, tell=refuse))  # type: ignore[arg-type]
