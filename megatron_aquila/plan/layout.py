"""Megatron-LM's words for a pipeline's stages: ``Et*3|(tt|)*29,L``."""

import re


class LayoutError(ValueError):
    """A layout that is none; the message says why."""


def layout_layers(layout: str) -> tuple[int, ...]:
    """Layers of every stage, in the order of the model: ``layout_layers("Ett|(t|)*2L") == (2, 1, 1, 0)``.

    ``|`` ends a stage; E is the embedding, t a layer, L the head with the loss; ``x*3`` and ``(...)*3`` repeat, and
    commas and blanks are for the eye. Parentheses do not nest. Raises ``LayoutError`` where a part is unknown, E is not
    the first or L not the last, or a stage holds nothing.
    """
    text = re.sub(r"[,\s]", "", layout)
    for repeated in (r"\(([^()]*)\)\*(\d{1,3})(?!\d)", r"([^*()\d])\*(\d{1,3})(?!\d)"):
        text = re.sub(repeated, lambda match: match[1] * int(match[2]), text)
    unknown = sorted(set(text) - set("EtL|"))
    if "m" in unknown:
        raise LayoutError("multi-token prediction, its m, is not offered")
    if unknown:
        raise LayoutError(f"{' '.join(unknown)} is neither E, t, L or | nor a part or a group in ( ) repeated by *n")
    if re.fullmatch("Et*L", text.replace("|", "")) is None:
        raise LayoutError("the model is one E first, then every layer's t, then one L")
    stages = text.split("|")
    if "" in stages:
        raise LayoutError(f"stage {stages.index('')} of {len(stages)} holds nothing")
    return tuple(stage.count("t") for stage in stages)
