"""Where a run starts, and whether what it continues is what the settings describe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.choose import choose
from megatron_aquila.checkpoint.folders import LATEST, holds_run
from megatron_aquila.checkpoint.parts import PART
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.derive import Derived
from megatron_aquila.config.saving import AUTO, CheckpointConfig
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.skips import left_out
from megatron_aquila.errors import CheckpointError
from megatron_aquila.optim.lr import LrSchedule
from megatron_aquila.parallel.context import Group
from megatron_aquila.train.build import loss_scaling, lr_schedule
from megatron_aquila.train.corpus import Identity, first_segments
from megatron_aquila.train.state import TrainState, digest_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The state a run begins with and the checkpoint it takes tensors from.

    ``checkpoint`` is ``None`` where weights come from a Hugging Face folder or the seed; ``with_optimizer`` says
    whether optimizer states and the position in the data are taken too. With ``is_part`` the checkpoint is this rank's
    own part of an ephemeral one.
    """

    state: TrainState
    checkpoint: Path | None = None
    with_optimizer: bool = False
    is_part: bool = False


def resolve_checkpoint(
    settings: CheckpointConfig,
    world: Group,
    warn: Callable[[str], None] = lambda text: None,
    passed_over: Callable[[Path, str], None] = lambda folder, reason: None,
) -> Path | None:
    """The step folder to take tensors from: ``--load``, or with ``--resume`` what ``--save`` holds. Collective.

    Its files are verified; ``--on-corrupt`` says what becomes of a damaged one, and ``warn`` is told, as is
    ``passed_over`` of each one that is not taken and why. Rank 0 follows
    ``latest`` for all, so that a save by another job cannot give ranks different steps. Raises ``CheckpointError`` on
    every rank where ``--load`` names nothing, or where the run would write into a folder that another one has filled.
    """

    def resolve() -> str | None:
        path = None if settings.load == AUTO else settings.load
        if settings.resumes_own and settings.save is not None and holds_run(settings.save):
            path = settings.save
        refuse_to_mix(settings, path if settings.load_optim else None)
        return None if path is None else str(path)

    (name, *_) = together(lambda: resolve() if world.rank == 0 else None, world)
    if name is None:
        return None
    falls_back = settings.on_corrupt == "fallback"
    return choose(Path(name), world, falls_back=falls_back, warn=warn, passed_over=passed_over)


def rope_way_out(problems: Sequence[str]) -> str:
    """What else to do where only rotary positions differ."""
    meant = all(problem.startswith("rope_") for problem in problems)
    return ", or give --override-rope to reach longer samples" if meant else ""


def find_start(
    config: RunConfig, derived: Derived, checkpoint: Path | None, identity: Identity | None, *, is_part: bool = False
) -> Start:
    """The state of the checkpoint, or a fresh one. Reads the manifest. Local.

    ``identity`` of the data and tokenizer is compared where it is given. What an ephemeral checkpoint's part has taken
    since the durable one before it is still to be saved: it stays in the state. Raises ``CheckpointError`` where the
    checkpoint is of another model or run.
    """
    if checkpoint is None:
        return Start(state=fresh_state(config, derived))
    reader = CheckpointReader(checkpoint)
    if PART in reader.state and not is_part:
        raise CheckpointError(f"{checkpoint}: one rank's part of an ephemeral checkpoint: --resume goes on from it")
    problems = reader.shape_problems(derived.shape, same_positions=not config.checkpoint.override_rope)
    if problems:
        raise CheckpointError(
            f"{checkpoint}: another model: {'; '.join(problems)}; use its settings{rope_way_out(problems)}"
        )
    if not config.checkpoint.load_optim:
        return Start(state=fresh_state(config, derived), checkpoint=checkpoint)
    saved: Mapping[str, Any] = reader.state
    missing = {"train", "data", "optimizer", "precision", "lr_schedule"} - set(saved)
    if missing:
        raise CheckpointError(f"{checkpoint}: its state has no {', '.join(sorted(missing))}: give --no-load-optim")
    problems = run_problems(saved, config, identity)
    if problems:
        raise CheckpointError(f"{checkpoint}: " + "; ".join(problems))
    state = TrainState.from_json(saved["train"])
    end = derived.batches.end_of_run(state.consumed_samples, config.train.train_samples)
    state = replace(
        state.extended_to(end),
        loss_scale=loss_scaling(config).resumed(state.loss_scale),
    )
    if not is_part:
        digest = digest_of(saved["train"])
        state = replace(state, parent=checkpoint_name(checkpoint), parent_digest=digest, taken=())
    state = without_left_out(state, config, checkpoint)
    return Start(state=state, checkpoint=checkpoint, with_optimizer=True, is_part=is_part)


def fresh_state(config: RunConfig, derived: Derived) -> TrainState:
    """The state of a run that has seen nothing. Its index is long enough for the last batch, which is a whole one."""
    segments = first_segments(config, derived.batches.end_of_run(0, config.train.train_samples))
    state = TrainState(seed=config.seed, index_segments=segments, loss_scale=loss_scaling(config).start())
    return state.without(left_out(config.train))


def checkpoint_name(folder: Path) -> str:
    """``step_0000100``, also of a folder that is being replaced."""
    return folder.name.removesuffix(".old")


def without_left_out(state: TrainState, config: RunConfig, checkpoint: Path) -> TrainState:
    """The state with ``--skip-samples`` ahead of it. Raises ``CheckpointError`` where it has trained on one of them."""
    for start, stop in left_out(config.train):
        trained = start
        for begin, end in state.skipped_samples:  # ascending
            trained = end if begin <= trained < end else trained
        if trained < min(stop, state.consumed_samples):
            raise CheckpointError(
                f"--skip-samples {start}-{stop - 1}: {checkpoint} stands at sample {state.consumed_samples} and was "
                f"trained on sample {trained}; load a checkpoint from before it"
            )
    return state.without(left_out(config.train))


def refuse_to_mix(settings: CheckpointConfig, continued: Path | None) -> None:
    """Raise ``CheckpointError`` where ``--save`` holds a run that this one does not continue.

    Its checkpoints and its log would be taken for this run's, and pruning would count them.
    """
    if settings.save is None or not holds_run(settings.save):
        return
    inside = continued is not None and settings.save.resolve() in (continued.resolve(), *continued.resolve().parents)
    if not inside:
        pointer = settings.save / LATEST
        latest = pointer.read_text(encoding="utf-8", errors="replace").strip()[:80] if pointer.is_file() else "no step"
        raise CheckpointError(
            f"--save {settings.save}: it already holds a run, at {latest}; continue that with --resume, "
            "or choose another folder"
        )


def run_problems(saved: Mapping[str, Any], config: RunConfig, identity: Identity | None) -> list[str]:
    """Where resuming would silently change the update, the order of the data or the learning rate, and the way out."""
    here = {
        "--seed": (saved["train"]["seed"], config.seed),
        "--optimizer": (saved["optimizer"], config.optim.optimizer),
        "--precision": (saved["precision"], config.train.precision),
    }
    problems = [f"{flag} {new}: the run was started with {old}" for flag, (old, new) in here.items() if new != old]
    old_schedule, new_schedule = LrSchedule(**saved["lr_schedule"]), lr_schedule(config)
    changed = [name for name in relevant(new_schedule) if getattr(old_schedule, name) != getattr(new_schedule, name)]
    if changed and not config.checkpoint.override_lr_schedule:
        pairs = ", ".join(f"{name} {getattr(old_schedule, name)} -> {getattr(new_schedule, name)}" for name in changed)
        problems.append(f"the learning-rate schedule differs ({pairs}): give --override-lr-schedule if that is meant")
    differences = [] if identity is None else identity.differences(saved["data"])
    if differences and not config.checkpoint.override_data:
        problems.append(
            f"the data differs ({'; '.join(differences)}): where that was already read, samples would be seen twice or "
            "never; give --override-data if it is meant"
        )
    return problems


def relevant(schedule: LrSchedule) -> list[str]:
    """The fields that decide the learning rate under the schedule's kind of decay."""
    unused = {
        "constant": {"minimum", "decay_samples", "wsd_decay_samples", "wsd_decay"},
        "cosine": {"wsd_decay_samples", "wsd_decay"},
        "linear": {"wsd_decay_samples", "wsd_decay"},
        "wsd": set[str](),
    }[schedule.decay]
    return [name for name in asdict(schedule) if name not in unused]
