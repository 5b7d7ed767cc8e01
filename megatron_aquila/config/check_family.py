"""What the settings by which model families differ demand of the others."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_family(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Scores that change need them in one piece, and distances know of no positions that begin anew."""
    model, data = config.model, config.data
    changes = [
        ("--position-embedding", "alibi", model.position_embedding == "alibi"),
        ("--score-clamp", model.score_clamp, model.score_clamp is not None),
    ]
    for flag, value, is_on in changes:
        if is_on and config.parallel.context > 1:
            why = "scores are not changed where a sequence is split over ranks"
            yield Problem(flag, value, why, "use --cp 1, with --sp and more --tp for long sequences")
    if model.position_embedding == "alibi" and data.reset_position_ids and not data.reset_attention_mask:
        why = "ALiBi counts the tokens in between, and has no positions to begin anew"
        yield Problem("--reset-position-ids", True, why, "leave it out, or add --reset-attention-mask")
