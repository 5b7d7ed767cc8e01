"""Where a run stands: all that is neither a parameter nor an optimizer tensor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_aquila.errors import CheckpointError
from megatron_aquila.optim.scaler import LossScale


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Frozen: a step returns the next one.

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

    def advance(self, *, samples: int, tokens: int, applied: bool, loss_scale: LossScale) -> "TrainState":
        """The state after a step over ``samples`` samples; one that was not applied is remembered as skipped."""
        stop = self.consumed_samples + samples
        skipped = () if applied else ((self.consumed_samples, stop),)
        return replace(
            self,
            step=self.step + 1,
            applied_steps=self.applied_steps + applied,
            consumed_samples=stop,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_samples=self.skipped_samples + skipped,
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
