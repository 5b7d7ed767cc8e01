"""What settings are made of: types that bound a value, and a field that carries its help and its spellings."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Lt(1)]


def setting(default: Any, help: str, *flags: str) -> Any:
    """A field with its help text and its spellings on the command line.

    The first spelling is ours; further ones are Megatron-LM's and FlagScale's. With none given the flag is the field's
    name in kebab case. A tuple field takes several values; a bool field also gets ``--no-...``.
    """
    metadata: Mapping[str, Any] = {"help": help, "flags": flags}
    return field(default=default, metadata=metadata)
