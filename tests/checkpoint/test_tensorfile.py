import hashlib
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_aquila.checkpoint import tensorfile
from megatron_aquila.checkpoint.tensorfile import DTYPES, Entry, file_sha256, write_tensors


def entries(tensors: dict[str, Tensor]) -> list[Entry]:
    return [
        Entry(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in tensors.items()
    ]


@pytest.mark.parametrize("piece_bytes", [16, 2**26])
def test_files_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """Every type, an odd number of bytes among them, and an empty tensor."""
    monkeypatch.setattr(tensorfile, "_PIECE_BYTES", piece_bytes)
    tensors = {f"t{name}@0,0": torch.arange(15).view(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    tensors["empty"] = torch.empty(0, 4)
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    record = write_tensors(tmp_path / "ours", entries(tensors), metadata={"format": "pt"})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
        assert tensor.numel() == 0 or tensor.data_ptr() % tensor.itemsize == 0, f"{key} is not aligned"
    data = (tmp_path / "ours").read_bytes()
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert file_sha256(tmp_path / "ours") == record.sha256


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Twenty tensors made when their turn comes: each one's memory is free before the next."""
    last: list[weakref.ref[np.ndarray]] = []

    def load() -> Tensor:
        assert not last or last.pop()() is None, "the memory of the tensor before is still held"
        memory = np.zeros(2**18, dtype=np.float32)
        last.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    write_tensors(tmp_path / "f", [Entry(f"t{i:02d}", torch.float32, (2**18,), load) for i in range(20)])
    assert len(load_file(tmp_path / "f")) == 20


def test_mistakes_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"loaded \(torch.float32, \(2,\)\), announced \(torch.float64"):
        write_tensors(tmp_path / "f", [Entry("a", torch.float64, (2,), lambda: torch.zeros(2))])
    with pytest.raises(AssertionError, match="two tensors are called a"):
        write_tensors(tmp_path / "f", entries({"a": torch.zeros(1)}) * 2)
