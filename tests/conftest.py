"""Fixtures that every room's tests share."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from megatron_aquila.verify.pool import WorkerPool

torch.set_num_threads(1)


def interpreter_loops() -> bool:
    """Whether Triton's interpreter can run a loop: that of 3.6 cannot under NumPy 2.4 (triton-lang/triton#9171)."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return False
    return not triton.startswith("3.6.") or np.lib.NumpyVersion(np.__version__) < "2.4.0"


if not torch.cuda.is_available():  # before anything imports Triton, which reads it then: kernels run on CPU memory
    os.environ["TRITON_INTERPRET"] = "1"
    if not interpreter_loops():
        sys.modules["triton"] = None  # type: ignore[assignment]  # not there, as far as tests are concerned
settings.register_profile("aquila", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("aquila")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """``pool(world)``: gloo workers, started at the first request and shared by all tests."""
    pools: dict[int, WorkerPool] = {}

    def get(world: int) -> WorkerPool:
        if world not in pools:
            pools[world] = WorkerPool(world)
        return pools[world]

    yield get
    for one in pools.values():
        one.close()


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if value is None:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    assert folder.is_dir(), f"{variable}={value} is not a folder"
    return folder


@pytest.fixture(scope="session")
def megatron_fixtures() -> Path:
    """Folder of .bin/.idx files and expected values made with Megatron-LM."""
    return _folder("AQUILA_TEST_FIXTURES")


@pytest.fixture(scope="session")
def aquila_tokenizer_dir() -> Path:
    """Folder of Aquila's vocab.json, merges.txt and special_tokens.txt."""
    return _folder("AQUILA_TEST_TOKENIZER")
