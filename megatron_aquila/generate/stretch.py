"""A model on longer samples than it was trained on: rotary positions of another form, and what to tell its user."""

import math
from dataclasses import replace

from megatron_aquila.config.rope import stretch_problems
from megatron_aquila.errors import Problem, refuse
from megatron_aquila.plan.shape import NEEDS_TRAINED_LEN, ModelShape, RopeScaling


def stretched(
    shape: ModelShape, *, seq_len: int | None, scaling: RopeScaling | None, factor: float | None, length: int | None
) -> ModelShape:
    """``shape`` with samples of ``seq_len`` and the rotary form ``scaling`` in place of its own; None: as it is.

    ``factor`` and trained ``length`` default to what leads from the positions of its training to ``seq_len``. Raises
    ``ConfigError`` where the three do not go together.
    """
    trained_len = math.ceil(shape.longest_reach)
    longer = shape if seq_len is None else replace(shape, seq_len=seq_len)
    if scaling is None:
        problems = list(stretch_problems("none", 1.0 if factor is None else factor, length))
    else:
        if factor is None:
            factor = 1.0 if scaling == "none" else max(1.0, longer.seq_len / trained_len)
        problems = list(stretch_problems(scaling, factor, length))
        used = 1 if scaling not in NEEDS_TRAINED_LEN else trained_len if length is None else length
        longer = replace(longer, rope_scaling=scaling, rope_factor=factor, rope_trained_len=used)
    if longer.rope_scaling != "none" and shape.position_embedding == "alibi":
        why = "the model has ALiBi: nothing is turned"
        problems.append(Problem("--rope-scaling", longer.rope_scaling, why, "leave it out"))
    refuse(problems)
    return longer


def beyond_training(trained: ModelShape, used: ModelShape) -> str | None:
    """A line for the user where tokens are farther apart in ``used`` than training ever had them; else None."""
    reach, known = used.longest_reach, trained.longest_reach
    if reach <= known:
        return None
    stretch = "" if used.rope_scaling == "none" else f", stretched by {used.rope_scaling} {used.rope_factor:g}"
    return (
        f"warning: samples of {used.seq_len} tokens{stretch}, have tokens that count {reach:g} apart; in training they "
        f"were at most {known:g} apart, and beyond that a model is usually lost: see --rope-scaling"
    )
