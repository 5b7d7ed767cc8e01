"""Whatever bytes a file holds, its reader gives a valid object or the error that a user can act on."""

import ast
import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_aquila.checkpoint.folders import find_checkpoint
from megatron_aquila.checkpoint.integrity import examine
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Manifest
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.files import read_file
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.manifest import read_manifest
from megatron_aquila.errors import AquilaError, CheckpointError
from tests.checkpoint.numbers import FILE, forge, numbers, save_numbers
from tests.test_architecture import SCRIPTS, SOURCES

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner))
MOST_BYTES = 50 * 2**20  # of memory, for files of a few hundred bytes


@contextmanager
def valid_or_refused(*names: str) -> Iterator[None]:
    """The body ends well, or raises the error that names one of these files."""
    message = names[0]
    try:
        yield
    except AquilaError as error:
        message = str(error)
    assert any(name in message for name in names), message


@pytest.fixture
def no_huge_allocation() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


@st.composite
def spoiled(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, cut or put in between."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


def test_manifests_of_any_bytes(tmp_path: Path) -> None:
    path = save_numbers(tmp_path, 1, 1.0) / "manifest.json"
    whole = path.read_bytes()

    @FUZZ
    @given(st.binary(max_size=200) | spoiled(whole) | JSON.map(lambda value: json.dumps(value).encode()))
    def fuzz(data: bytes) -> None:
        path.write_bytes(data)
        with valid_or_refused(str(path)):
            Manifest.read(path)

    fuzz()
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="it is damaged"):
        Manifest.read(path)


@FUZZ
@given(place=st.sampled_from(["step", "saved", "state", "files", "tensors", FILE, "weight", "pieces"]), value=JSON)
def test_manifests_with_a_right_hash_and_anything_in_them(tmp_path: Path, place: str, value: object) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)

    def change(body: dict[str, dict[str, dict[str, object]]]) -> None:
        inner = {"weight": body["tensors"], FILE: body["files"], "pieces": body["tensors"]["weight"]}.get(place, body)
        inner[place] = value  # type: ignore[index,assignment]

    forge(folder, change)  # type: ignore[arg-type]
    examine(folder)
    with valid_or_refused(str(folder)):
        reader = CheckpointReader(folder)
        reader.read_into(numbers(0.0))


def test_safetensors_of_any_bytes(tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    path = folder / FILE
    whole = path.read_bytes()
    manifest = Manifest.read(folder / "manifest.json")
    header = struct.unpack("<Q", whole[:8])[0]

    @FUZZ
    @given(st.binary(max_size=200) | spoiled(whole[: 8 + header]).map(lambda start: start + whole[8 + header :]))
    def fuzz(data: bytes) -> None:
        path.write_bytes(data)
        assert examine(folder) or data == whole
        reader = CheckpointReader(folder, verified=True)  # as a file that changes after it was verified
        chunk = Chunk("weight", (6,), (0,), torch.zeros(6))
        with valid_or_refused(str(path)):
            reader.read_into([chunk])

    fuzz()
    assert manifest.step == 1


@FUZZ
@given(data=st.binary(max_size=40))
def test_latest_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    save_numbers(tmp_path, 1, 1.0)
    (tmp_path / "latest").write_bytes(data)
    with valid_or_refused(str(tmp_path)):
        assert find_checkpoint(tmp_path).parent == tmp_path


@pytest.mark.usefixtures("no_huge_allocation")
@FUZZ
@given(data=st.binary(max_size=120) | st.binary(max_size=80).map(lambda rest: b"MMIDIDX\x00\x00" + rest))
def test_indices_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.idx").write_bytes(data)
    (tmp_path / "x.bin").write_bytes(b"\0" * 64)
    with valid_or_refused("x.idx", "x.bin"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.usefixtures("no_huge_allocation")
@FUZZ
@given(
    version=st.integers(0, 3),
    code=st.integers(0, 12),
    counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    rest=st.binary(max_size=64),
)
def test_indices_with_any_counts(tmp_path: Path, version: int, code: int, counts: tuple[int, int], rest: bytes) -> None:
    header = b"MMIDIDX\x00\x00" + struct.pack("<QB", version, code) + struct.pack("<QQ", *counts)
    (tmp_path / "x.idx").write_bytes(header + rest)
    (tmp_path / "x.bin").write_bytes(b"\0" * 64)
    with valid_or_refused("x.idx", "x.bin"):
        IndexedDataset(tmp_path / "x")


@FUZZ
@given(data=st.binary(max_size=120) | JSON.map(lambda value: json.dumps(value).encode()))
def test_data_manifests_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.manifest.json").write_bytes(data)
    with valid_or_refused("x.manifest.json"):
        read_manifest(tmp_path / "x")


WORDS = st.sampled_from(
    ["model:", "  num_layers: ", "train:", "- ", "{", "}", "[", "]", "&a ", "*a", "!!python/name:os.system", "\n", "'"]
)


@FUZZ
@given(data=st.binary(max_size=120) | st.lists(WORDS, max_size=12).map(lambda words: "".join(words).encode()))
def test_configs_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    assert all(problem.value == path or str(path) in str(problem) for problem in read_file(path).problems)


@pytest.mark.parametrize("text", ["[" * 5000, "data:\n  path: &a [*a]\n"], ids=["deep", "in itself"])
def test_a_config_without_end_is_a_problem(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    (problem,) = read_file(path).problems
    assert "nested without end" in str(problem)


def unsafe_loads(source: str) -> list[str]:
    """Calls that would run what a file holds."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name.endswith("torch.load") and words.get("weights_only") != "True":
            wrong.append(f"{node.lineno}: {name}")
        if name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            wrong.append(f"{node.lineno}: {name}")
        if words.get("allow_pickle", "False") != "False":
            wrong.append(f"{node.lineno}: allow_pickle")
        if name in {"os.system", "os.popen", "subprocess.getoutput", "eval", "exec", "__import__"}:
            wrong.append(f"{node.lineno}: {name}")
    return wrong


@pytest.mark.parametrize("relative", SOURCES | SCRIPTS)
def test_no_file_is_ever_run(relative: str) -> None:
    assert not unsafe_loads((SOURCES | SCRIPTS)[relative])


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "os.system('ls')",
        "exec(text)",
    ],
)
def test_what_would_run_a_file_is_caught(source: str) -> None:
    assert unsafe_loads(source)


def test_what_would_not_passes() -> None:
    assert not unsafe_loads("torch.load(p, weights_only=True)\nyaml.safe_load(t)\nnp.load(p)")
