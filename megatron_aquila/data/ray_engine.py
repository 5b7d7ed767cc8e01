"""The pieces of a corpus on an existing Ray cluster; its machines share the file system of the output."""

import os
import socket
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import chdir, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.inputs import Piece
from megatron_aquila.data.shards import Shard, ShardWriter, Step, read_shard, shard_folder
from megatron_aquila.data.workers import Tell
from megatron_aquila.errors import AquilaError, DataError

RETRIES: Final = 3  # of a piece whose worker or machine died
AHEAD: Final = 2  # pieces under way per core of the cluster


def ray_map(writer: ShardWriter, pieces: Iterable[Piece], *, tell: Tell) -> Generator[Shard, None, None]:
    """``writer`` of each piece as a Ray task; shards in their order, at most a few pieces a core under way.

    Joins the cluster of ``RAY_ADDRESS``, or the one of this machine, or starts one here. A task whose worker dies is
    tried again by Ray; a shard appears whole or not at all, so that a retry makes the same bytes. Relative paths begin
    in this process's working folder, wherever the workers were started.

    Raises:
        DataError: ray is not installed, no cluster can be joined, a task failed, or a machine writes its shards
            elsewhere.
    """
    ray = _joined(_ray())
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_write)
    shared, folder = ray.put(writer), Path.cwd()
    limit = AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    waiting = iter(pieces)
    pending: deque[tuple[Path, Any]] = deque()
    try:
        while True:
            for piece in islice(waiting, limit - len(pending)):
                pending.append((piece.path, task.remote(shared, piece, folder)))
            if not pending:
                return
            ray.wait([reference for _, reference in pending], num_returns=1)
            _raise_failed(ray, pending)
            while pending and ray.wait([pending[0][1]], timeout=0)[0]:
                _, reference = pending.popleft()
                shard: Shard = ray.get(reference)
                tell(Step(shard.counts, shard.file_bytes))
                yield _seen(writer, shard)
    finally:
        for _, reference in pending:
            ray.cancel(reference, force=True)


def _joined(ray: Any) -> Any:
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS")
            where = "none can be started here" if address is None else f"none answers at RAY_ADDRESS={address}"
            raise DataError(
                f"--engine ray: no Ray cluster: {where}: {error}; start one (ray start --head), say it by RAY_ADDRESS, "
                "or use --engine local"
            ) from error
    return ray


def _write(writer: ShardWriter, piece: Piece, folder: Path) -> Shard:
    """On a worker: the piece, whose path is as it was given to the process that works in ``folder``."""
    relative = [path for path in piece.paths if not path.is_absolute()]
    if not folder.is_dir() and piece.unpacked is None and relative:
        raise DataError(
            f"{relative[0]}: a relative path of {folder}, which is not there on {socket.gethostname()}; name the "
            "inputs by absolute paths, on a disk that all machines share"
        )
    with chdir(folder) if folder.is_dir() else nullcontext():
        return writer(piece, lambda _: None)


def _raise_failed(ray: Any, pending: Sequence[tuple[Path, Any]]) -> None:
    """Raise the error of the first task that ended with one, although earlier pieces are under way."""
    references = [reference for _, reference in pending]
    done, _ = ray.wait(references, num_returns=len(references), timeout=0)
    for path, reference in pending:
        if reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, AquilaError) else DataError(f"{path}: {cause}") from error
            except ray.exceptions.RayError as error:
                raise DataError(f"{path}: its Ray task was given up after {RETRIES} retries: {error}") from error


def _seen(writer: ShardWriter, shard: Shard) -> Shard:
    folder = shard_folder(writer.folder, shard.place)
    if read_shard(folder) is None:
        raise DataError(f"{folder}: written by a Ray worker but not to be seen here; put the output on a shared disk")
    return shard


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DataError("--engine ray needs the ray package: pip install 'megatron_aquila[ray]'") from error
    return ray
