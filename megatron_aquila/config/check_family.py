"""What the settings by which model families differ demand of the others."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_family(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Distances know of no positions that begin anew."""
    model, data = config.model, config.data
    if model.position_embedding == "alibi" and data.reset_position_ids and not data.reset_attention_mask:
        why = "ALiBi counts the tokens in between, and has no positions to begin anew"
        yield Problem("--reset-position-ids", True, why, "leave it out, or add --reset-attention-mask")
