"""Where a run stands: all that is neither a parameter nor an optimizer tensor."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_aquila.errors import CheckpointError
from megatron_aquila.observe.ledger import Ranges, joined
from megatron_aquila.optim.scaler import LossScale
from megatron_aquila.plan.batches import Batches


@dataclass(frozen=True, slots=True)
class Figures:
    """What a step told: its mean loss in nats and the norm of its gradients, both finite."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Upcoming:
    """The samples from ``start`` to ``stop``, which a run is to read next, and the digest of their tokens."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Frozen: a step returns the next one, in two parts, as the host comes to know them.

    Where the next step begins is known as soon as one is launched: ``moved_on``. Whether it was applied, and what
    follows from that, is known once the device says so: ``settled``. The two touch no field in common, so that a step
    may be launched before the one ahead of it is settled; a state is whole when all its steps are.

    The position in the data and every random number follow from it: nothing in a run draws from a generator that has a
    state. ``index_segments`` are lengths in samples: the first is that of the index the run was started with, extending
    a run appends one and never reshuffles what was seen. ``loss_scale`` is the next step's.

    ``skipped_samples`` are half-open ranges that are not trained on, ascending: those of steps that were not applied,
    and those that the user, or a rewind, left out; these may lie ahead, and are then consumed without being read.
    ``recent`` are the figures of the last steps, from which it is told what is a spike. ``run`` is the ledger's name of
    the run, ``parent`` that of the last durable checkpoint that it has made or went on from, ``parent_digest`` the
    digest of the state in it, hence of all that went before. Where a checkpoint is made ``upcoming`` is set, and
    ``taken``, the ranges that steps took since ``parent``. ``batches`` tells which step read what, whatever the
    settings were: an entry where the global batch became another.
    """

    seed: int
    index_segments: tuple[int, ...]
    step: int = 0
    applied_steps: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    loss_scale: LossScale = field(default_factory=LossScale)
    recent: tuple[Figures, ...] = ()
    run: str = ""
    parent: str | None = None
    parent_digest: str | None = None
    taken: Ranges = ()
    upcoming: Upcoming | None = None
    batches: Batches = ()

    def moved_on(self, *, samples: int, tokens: int) -> "TrainState":
        """The state once a step over the next ``samples`` samples is launched."""
        is_another = not self.batches or self.batches[-1][2] != samples
        another = ((self.step, self.consumed_samples, samples),) if is_another else ()
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            batches=(*self.batches, *another),
        )

    def settled(self, samples: tuple[int, int], *, applied: bool, loss_scale: LossScale) -> "TrainState":
        """The state once the step over ``samples``, a half-open range, is known; one not applied is remembered."""
        settled = replace(self, applied_steps=self.applied_steps + applied, loss_scale=loss_scale)
        return settled if applied else settled.without((samples,))

    def without(self, ranges: Ranges) -> "TrainState":
        """The state of a run that does not train on ``ranges``."""
        return replace(self, skipped_samples=joined((*self.skipped_samples, *ranges)))

    def remembering(self, figures: Figures, *, window: int) -> "TrainState":
        """The state with a settled step's figures, and no more than ``window`` of them."""
        return replace(self, recent=(*self.recent, figures)[-window:] if window > 0 else ())

    def extended_to(self, samples: int) -> "TrainState":
        """The state with a sample index for at least ``samples``: unchanged, or with one more segment."""
        missing = samples - sum(self.index_segments)
        return self if missing <= 0 else replace(self, index_segments=(*self.index_segments, missing))

    @property
    def digest(self) -> str:
        """What tells this state, as a checkpoint has it, from all others."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint's manifest; the inverse of ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainState":
        """Raises ``CheckpointError`` where a field is missing or unknown. Older checkpoints lack some."""
        fields = set(cls.__dataclass_fields__)
        values = {
            "loss_scale": asdict(LossScale()),
            "recent": [],
            "run": "",
            "parent": None,
            "parent_digest": None,
            "taken": [],
            "upcoming": None,
            "batches": [],
            **values,
        }
        if set(values) != fields:
            raise CheckpointError(
                f"the checkpoint's training state has fields {sorted(values)}, expected {sorted(fields)}: it was "
                "written by another version; start from its weights with --no-load-optim"
            )
        nested = {
            "index_segments": tuple(values["index_segments"]),
            "skipped_samples": tuple((start, stop) for start, stop in values["skipped_samples"]),
            "taken": tuple((start, stop) for start, stop in values["taken"]),
            "batches": tuple((step, sample, size) for step, sample, size in values["batches"]),
            "loss_scale": LossScale(**values["loss_scale"]),
            "upcoming": None if values["upcoming"] is None else Upcoming(**values["upcoming"]),
            "recent": tuple(Figures(**figures) for figures in values["recent"]),
        }
        return cls(**{**values, **nested})


def digest_of(state: Mapping[str, Any]) -> str:
    """The digest of a state as JSON has it."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
