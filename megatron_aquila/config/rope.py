"""What is wrong with the settings of rotary positions."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem
from megatron_aquila.plan.shape import NEEDS_TRAINED_LEN, RopeScaling


def check_rope(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """A stretch has a form and a factor, and a trained length only where the form reads it."""
    model = config.model
    yield from stretch_problems(model.rope_scaling, model.rope_factor, model.rope_trained_len)
    if model.position_embedding == "alibi" and model.rope_scaling != "none":
        why = "with --position-embedding alibi nothing is turned"
        yield Problem("--rope-scaling", model.rope_scaling, why, "leave it out: ALiBi has no longest sample")


def check_two_range(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Distances decide which pairs are far: they must be those of the tokens at hand."""
    model, data = config.model, config.data
    if model.rope_scaling != "two-range":
        return
    if data.reset_position_ids and not data.reset_attention_mask:
        why = "--rope-scaling two-range counts the tokens in between, and has no positions to begin anew"
        yield Problem("--reset-position-ids", True, why, "leave it out, or add --reset-attention-mask")


def stretch_problems(kind: RopeScaling, factor: float, length: int | None) -> Iterator[Problem]:
    """What is wrong with a form, its factor and its trained length."""
    if kind == "none" and factor != 1:
        why = "positions are not stretched: --rope-scaling is none"
        yield Problem(
            "--rope-factor", factor, why, "give --rope-scaling linear, ntk, yarn, llama3 or two-range, or use 1"
        )
    if kind != "none" and factor == 1:
        yield Problem(
            "--rope-scaling", kind, "--rope-factor is 1, which stretches nothing", "give e.g. --rope-factor 4"
        )
    if length is not None and kind not in NEEDS_TRAINED_LEN:
        why = f"--rope-scaling {kind} does not read it"
        yield Problem("--rope-trained-len", length, why, "leave it out, or use yarn, llama3 or two-range")
