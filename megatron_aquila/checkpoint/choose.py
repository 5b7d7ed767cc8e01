"""Which checkpoint a run goes on from: the one that is asked for if it is whole, else the last good one before it."""

from collections.abc import Callable
from pathlib import Path

from megatron_aquila.checkpoint.agree import agreed, together
from megatron_aquila.checkpoint.folders import MANIFEST, complete_steps, find_checkpoint, step_folder, step_of
from megatron_aquila.checkpoint.manifest import Manifest
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import Group


def choose(
    path: Path,
    world: Group,
    *,
    falls_back: bool,
    warn: Callable[[str], None],
    passed_over: Callable[[Path, str], None] = lambda folder, reason: None,
) -> Path:
    """The step's folder to load, with every file's hash verified. Collective over ``world``: all ranks get the same.

    A ``path`` that is a step means that one or none. Of a run's folder it is the step that ``latest`` names; with
    ``falls_back`` the newest whole one before it where that is damaged, and the newest of all where ``latest`` is lost
    or garbled. ``warn`` is told of all that is passed over, ``passed_over`` of each damaged step and why. Rank 0 looks
    for all; each rank hashes its share of the files. Raises CheckpointError on every rank where no checkpoint is left.
    """

    def look() -> list[str]:
        if not path.is_dir():
            way_out = "name a run's folder or a step of it; to start where none is yet, give --resume instead"
            raise CheckpointError(f"{path}: there is no such folder; {way_out}")
        return [str(folder) for folder in (candidates(path, warn) if falls_back else [find_checkpoint(path)])]

    (names, *_) = together(lambda: look() if world.rank == 0 else None, world)
    for name, following in zip(names, [*names[1:], None], strict=True):
        folder = Path(name)
        try:
            agreed(lambda folder=folder: CheckpointReader(folder), world).verify_files(world)  # type: ignore[misc]
        except CheckpointError as error:
            if following is None:
                raise
            warn(f"DAMAGED CHECKPOINT, passed over: {error}\n  the next older one is tried: {following}")
            passed_over(folder, str(error))
        else:
            return folder
    raise AssertionError(f"{path}: no candidates")


def candidates(path: Path, warn: Callable[[str], None]) -> list[Path]:
    """The steps that may be meant by ``path``, best first; none was verified yet. Raises CheckpointError if none."""
    try:
        named = find_checkpoint(path)
    except CheckpointError as error:
        steps = [step_folder(path, step) for step in complete_steps(path)] if path.is_dir() else []
        if not steps:
            raise
        newest_first = sorted(steps, key=when_saved, reverse=True)
        warn(f"LOST `latest`: {error}\n  going on from the newest checkpoint instead: {newest_first[0]}")
        return newest_first
    if named == path:
        return [named]
    # What lies above it belongs to a run that was abandoned when training went back.
    step = step_of(named)
    assert step is not None, f"{named}: not a step"
    return [named, *(step_folder(path, other) for other in reversed(complete_steps(path)) if other < step)]


def when_saved(folder: Path) -> tuple[float, int]:
    """What orders the steps of a run by age, whichever way their files were copied; one that is damaged is oldest."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except CheckpointError:
        return -1.0, 0
    return manifest.saved, manifest.step
