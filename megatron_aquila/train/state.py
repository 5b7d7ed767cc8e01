"""Where a run stands: all that is neither a parameter nor an optimizer tensor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_aquila.errors import CheckpointError
from megatron_aquila.optim.scaler import LossScale


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Frozen: a step returns the next one, in two parts, as the host comes to know them.

    Where the next step begins is known as soon as one is launched: ``moved_on``. Whether it was applied, and what
    follows from that, is known once the device says so: ``settled``. The two touch no field in common, so that a step
    may be launched before the one ahead of it is settled; a state is whole when all its steps are.

    The position in the data and every random number follow from it: nothing in a run draws from a generator that has a
    state. ``index_segments`` are lengths in samples: the first is that of the index the run was started with, extending
    a run appends one and never reshuffles what was seen. ``skipped_samples`` lists the half-open
    ranges whose gradients were not applied. ``loss_scale`` is the next step's.
    """

    seed: int
    index_segments: tuple[int, ...]
    step: int = 0
    applied_steps: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    loss_scale: LossScale = field(default_factory=LossScale)

    def moved_on(self, *, samples: int, tokens: int) -> "TrainState":
        """The state once a step over the next ``samples`` samples is launched."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
        )

    def settled(self, samples: tuple[int, int], *, applied: bool, loss_scale: LossScale) -> "TrainState":
        """The state once the step over ``samples``, a half-open range, is known; one not applied is remembered."""
        return replace(
            self,
            applied_steps=self.applied_steps + applied,
            skipped_samples=self.skipped_samples + (() if applied else (samples,)),
            loss_scale=loss_scale,
        )

    def extended_to(self, samples: int) -> "TrainState":
        """The state with a sample index for at least ``samples``: unchanged, or with one more segment."""
        missing = samples - sum(self.index_segments)
        return self if missing <= 0 else replace(self, index_segments=(*self.index_segments, missing))

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint's manifest; the inverse of ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainState":
        """Raises ``CheckpointError`` where a field is missing or unknown. Older checkpoints have no loss scale."""
        fields = set(cls.__dataclass_fields__)
        values = {"loss_scale": asdict(LossScale()), **values}
        if set(values) != fields:
            raise CheckpointError(
                f"the checkpoint's training state has fields {sorted(values)}, expected {sorted(fields)}: it was "
                "written by another version; start from its weights with --no-load-optim"
            )
        nested = {
            "index_segments": tuple(values["index_segments"]),
            "skipped_samples": tuple((start, stop) for start, stop in values["skipped_samples"]),
            "loss_scale": LossScale(**values["loss_scale"]),
        }
        return cls(**{**values, **nested})
