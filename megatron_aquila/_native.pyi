from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

class LegacyShuffle:
    def __init__(self, seed: int) -> None: ...
    def shuffle(self, values: NDArray[Any], report: Callable[[int], None]) -> None: ...

def adamw(
    param: NDArray[np.float32],
    grad: NDArray[np.float32],
    exp_avg: NDArray[np.float32],
    exp_avg_sq: NDArray[np.float32],
    *,
    factor: float,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    rate: float,
    correction: float,
    eps: float,
    threads: int,
) -> None: ...
def fill_sample_index(
    lengths: NDArray[np.int32], documents: NDArray[np.int32], seq_len: int, start: tuple[int, int], out: NDArray[Any]
) -> None: ...
def build_blending_indices(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
def build_exhaustive_blending_indices(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
def insert_breaks(text: bytes, table: NDArray[np.uint8], mark: int) -> bytes: ...
def join_lines(
    block: bytes,
    start: int,
    *,
    key: bytes,
    longest_and_enough: tuple[int, int],
    border_and_mark: tuple[int, int],
    table: NDArray[np.uint8],
) -> tuple[bytes, int, int, int, int]: ...
def split_documents(
    ids: NDArray[np.uint32], *, documents: int, border: int, mark: int, end: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...
def read_sample(
    tokens: NDArray[Any],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int32],
    order: NDArray[np.int32],
    range: tuple[int, int, int, int],
    out: NDArray[np.int64],
) -> None: ...
def lay_out(
    samples: NDArray[np.int64], *, eod: int, reset_positions: bool, reset_attention: bool, mask_loss: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int32] | None]: ...
