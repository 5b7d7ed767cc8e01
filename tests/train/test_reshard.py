"""Saved at any layout, loaded at any other: weights, masters and moments of real machines, bit for bit.

``python -m tests.train.test_reshard`` does it once more and writes the matrix into docs/checkpoint.md.
"""

import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk, param_chunks
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.parallel.collectives import barrier
from megatron_aquila.train import build, resume, start
from megatron_aquila.train.build import Machine
from megatron_aquila.verify.page import markdown, put, write
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import split, tiny_config

Pools = Callable[[int], WorkerPool]
LAYOUTS: dict[str, dict[str, object]] = {
    "dp 4": {},
    "tp 2, dp 2": {"tp": 2, "sequence": True},
    "pp 2, dp 2": {"pp": 2},
    "tp 2, pp 2": {"tp": 2, "pp": 2},
    "pp 4": {"pp": 4},
    "pp 2 interleaved x 2, dp 2": {"pp": 2, "chunks": 2},
    "tp 2, pp 2 zb-v": {"tp": 2, "pp": 2, "schedule": "zb-v"},
}


def logical(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole logical tensor of this name; its values depend on nothing else."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def expected(chunk: Chunk) -> torch.Tensor:
    """What the chunk's tensor must hold."""
    places = tuple(slice(a, b) for a, b in zip(chunk.offset, chunk.rectangle.stop, strict=True))
    return logical(chunk.name, chunk.global_shape, chunk.tensor.dtype)[places]


def everything(machine: Machine) -> list[Chunk]:
    """All that a rank holds of the run: whole local weights, and its shard of the optimizer."""
    return [chunk for info in machine.infos for chunk in param_chunks(info)] + resume.optimizer_chunks(machine)


def matrix(folder: Path, precision: str, names: list[str]) -> list[list[str]]:
    """For each pair of layouts how many elements this rank found equal, or what was not. Four ranks."""
    config = tiny_config(folder / str(torch.distributed.get_rank()), precision=precision)
    config = replace(config, model=replace(config.model, num_layers=4))
    machines = [machine_of(split(config, **LAYOUTS[name]), folder / name) for name in names]  # type: ignore[arg-type]
    return [[loaded(source, target) for target in machines] for source in machines]


def machine_of(config: RunConfig, root: Path) -> Machine:
    """Built, filled with the logical tensors, and saved to ``root``."""
    config = replace(config, checkpoint=replace(config.checkpoint, save=root))
    derived = derive(config, 4)
    machine = build.build_machine(config, derived, build.create_context(config, derived, torch.device("cpu")))
    for chunk in everything(machine):
        chunk.tensor.copy_(expected(chunk))
    resume.begin_save(machine, start.fresh_state(config, derived), None).finish()
    return machine


def loaded(source: Machine, target: Machine) -> str:
    """Load what ``source`` saved into ``target``, in which nothing was left of it."""
    for chunk in everything(target):
        chunk.tensor.fill_(7)
    root = source.config.checkpoint.save
    assert root is not None, "saved by machine_of"
    (folder,) = root.glob("step_*")
    state = start.fresh_state(target.config, target.derived)
    resume.load_weights(target, start.Start(state=state, checkpoint=folder, with_optimizer=True))
    chunks = everything(target)
    wrong = [chunk.name for chunk in chunks if not torch.equal(chunk.tensor, expected(chunk))]
    barrier(target.ctx.world)
    return f"differs: {wrong[0]}" if wrong else str(sum(chunk.tensor.numel() for chunk in chunks))


def prepared(folder: Path) -> Path:
    """Each rank's own corpus folder, which no rank reads."""
    for rank in range(4):
        (folder / str(rank)).mkdir()
    return folder


@pytest.mark.parametrize("precision", ["bf16"])
def test_any_layout_loads_what_any_other_saved(precision: str, pool: Pools, tmp_path: Path) -> None:
    for cells in pool(4).run(matrix, prepared(tmp_path), precision, [*LAYOUTS], timeout=300):
        assert all(cell.isdigit() and int(cell) > 0 for row in cells for cell in row), cells
    # in the files, too, is the logical tensor and nothing of the layout
    for name in LAYOUTS:
        (folder,) = (tmp_path / name).glob("step_*")
        reader = CheckpointReader(folder)
        for tensor, stored in reader.tensors.items():
            assert torch.equal(reader.read(tensor), logical(tensor, stored.shape, stored.dtype)), (name, tensor)


def main() -> int:
    """Write the matrix into the page; returns the exit status."""
    names = [*LAYOUTS]
    with tempfile.TemporaryDirectory() as folder, WorkerPool(4) as workers:
        ranks = workers.run(matrix, prepared(Path(folder)), "bf16", names, timeout=300)
    rows = []
    for source, *cells in zip(names, *ranks, strict=True):
        equal = [all(part.isdigit() for part in parts) for parts in zip(*cells, strict=True)]
        rows.append([source, *("equal" if is_equal else "DIFFERS" for is_equal in equal)])
    page = Path(__file__).parents[2] / "docs" / "checkpoint.md"
    write(page, put(page.read_text(encoding="utf-8"), "reshard", markdown(["saved \\ loaded", *names], rows)))
    return 0 if all(cell != "DIFFERS" for row in rows for cell in row) else 1


if __name__ == "__main__":
    sys.exit(main())
