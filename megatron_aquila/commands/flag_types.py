"""Types of flags that tyro knows by itself: of others it asks typeguard, whose import takes as long as tyro's own."""

from pathlib import Path
from typing import Annotated, Final, Optional

from tyro.constructors import PrimitiveConstructorSpec

OptionalText = Optional[str]  # noqa: UP045  # ``str | None`` is another type, of which tyro knows nothing
OptionalNumber = Optional[int]  # noqa: UP045
OptionalPath = Optional[Path]  # noqa: UP045


class WordTuple(tuple[str, ...]):
    """``tuple[str, ...]`` as a class."""

    __slots__ = ()


NO_WORDS: Final = WordTuple()

# Any number of words behind one flag.
Words = Annotated[
    WordTuple,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=WordTuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]
