"""Which parameters are trained where not all are: the others have neither gradient nor optimizer state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from megatron_aquila.parallel.params import ParamInfo

PARTS: Final[Mapping[str, tuple[str, ...]]] = {  # what is in the names of the logical tensors
    "embeddings": ("embed_tokens.",),
    "head": ("lm_head.",),
    "vocabulary": ("embed_tokens.", "lm_head."),
    "norms": ("norm.",),
}


def freeze_others(infos: Iterable[ParamInfo], part: str | None) -> Sequence[ParamInfo]:
    """The parameters that ``part`` names, all where it is None; the others need no gradient from here on."""
    infos = list(infos)
    if part is None:
        return infos
    for info in infos:
        info.param.requires_grad_(any(word in info.name for word in PARTS[part]))
    return [info for info in infos if info.param.requires_grad]
