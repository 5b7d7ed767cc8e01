"""The loss scale of fp16: a pure state machine with the laws of Megatron-LM's ``DynamicGradScaler``."""

from dataclasses import dataclass, replace

GROWTH = 2.0
BACKOFF = 0.5


@dataclass(frozen=True, slots=True)
class LossScale:
    """What the loss is multiplied with before it is differentiated, and what decides its next change.

    ``good_steps`` counts the finite steps since the last change or overflow. ``hysteresis_left`` is lowered by every
    overflow and restored by growth alone: once it is used up, each further overflow lowers the scale.
    """

    scale: float = 1.0
    good_steps: int = 0
    hysteresis_left: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaling:
    """How the scale moves. ``window`` is ``None`` for a constant one, as everything wider than fp16 has, with 1."""

    initial: float = 1.0
    minimum: float = 1.0
    window: int | None = None
    hysteresis: int = 1

    @classmethod
    def constant(cls, scale: float = 1.0) -> "LossScaling":
        """A scale that never moves."""
        return cls(initial=scale, minimum=scale)

    @property
    def is_constant(self) -> bool:
        """Whether the scale never moves, whatever the gradients are."""
        return self.window is None

    def start(self) -> LossScale:
        """The state before the first step."""
        return LossScale(self.initial, hysteresis_left=self.hysteresis)

    def resumed(self, saved: LossScale) -> LossScale:
        """The state of a run that continues: the saved one, unless the scale is set to a constant."""
        return self.start() if self.is_constant else saved

    def after(self, state: LossScale, *, found_inf: bool) -> LossScale:
        """The state after a step: ``found_inf`` says that its gradients were not finite."""
        if self.window is None:
            return state
        if found_inf:
            left = state.hysteresis_left - 1
            scale = state.scale if left > 0 else max(state.scale * BACKOFF, self.minimum)
            return LossScale(scale, hysteresis_left=left)
        if state.good_steps + 1 == self.window:
            return LossScale(state.scale * GROWTH, hysteresis_left=self.hysteresis)
        return replace(state, good_steps=state.good_steps + 1)

    def is_lowest(self, state: LossScale) -> bool:
        """Whether a further overflow could not lower the scale."""
        return state.scale <= self.minimum
