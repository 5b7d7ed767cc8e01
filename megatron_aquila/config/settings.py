"""The fields of ``RunConfig`` as one flat table: dotted name, flags, type and default of every setting."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from megatron_aquila.config.schema import Phase, RunConfig

_WORDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    str: "text",
    Phase: "phase SAMPLES BLEND",
}
_EXAMPLES = {
    "INT": "1",
    "FLOAT": "1.0",
    "PATH": "a/folder",
    "STR": "a name",
    "INT [INT ...]": "8 8",
    "INT INT INT": "32 32 2000000",
    "STR [STR ...]": "a/prefix",
    "PHASE [PHASE ...]": '"1000000 0.5 a/prefix 0.5 b/prefix"',
}


@dataclass(frozen=True, slots=True)
class Given:
    """A setting's value as someone wrote it, and where: ``preset NAME``, ``file PATH:LINE`` or ``flag --tp``."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of ``RunConfig``. ``section`` is empty for a setting of the run itself, such as the seed."""

    section: str
    field: str
    flags: tuple[str, ...]
    type: Any
    default: object
    help: str

    @property
    def name(self) -> str:
        """The name in a file and in messages: ``parallel.tensor``."""
        return f"{self.section}.{self.field}" if self.section else self.field

    @property
    def is_optional(self) -> bool:
        """Whether the setting may be left to be derived; on the command line the word ``none`` says so."""
        return type(None) in typing.get_args(self.type)

    @property
    def kind(self) -> Any:
        """The type without ``None`` and without bounds."""
        return _bare(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a setting that has only a few; else empty."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def is_tuple(self) -> bool:
        """Whether the setting takes several values."""
        return typing.get_origin(self.kind) is tuple

    @property
    def metavar(self) -> str:
        """What ``--help`` shows for the value: ``INT``, ``{1f1b,gpipe}``, ``INT INT INT``, ``PATH [PATH ...]``."""
        if self.choices:
            return f"{{{','.join(self.choices)}}}"
        if not self.is_tuple:
            return str(self.kind.__name__).upper()
        items = [_bare(item).__name__.upper() for item in typing.get_args(self.kind) if item is not Ellipsis]
        return " ".join(items) if len(items) > 1 else f"{items[0]} [{items[0]} ...]"

    @property
    def example(self) -> str:
        """A value that is allowed, for messages."""
        if self.default not in (None, ()):
            return spell(self.default)
        return self.choices[0] if self.choices else _EXAMPLES[self.metavar]

    @property
    def wanted(self) -> str:
        """In words, the values that are allowed: ``a whole number of at least 1``."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if not self.is_tuple:
            word = _describe(self.type)
            return word if self.kind is bool or self.kind is str else f"a {word}"
        items = typing.get_args(self.kind)
        if items[-1] is Ellipsis:
            return f"a list, each a {_describe(items[0])}"
        return f"{len(items)} values, each a {_describe(items[0])}"


@cache
def all_settings() -> Mapping[str, Setting]:
    """Every setting by its dotted name, in the order of the schema."""
    sections = typing.get_type_hints(RunConfig, include_extras=True)
    found = []
    for name, kind in sections.items():
        if is_dataclass(kind):
            found += _leaves(name, kind)
    found += [setting for setting in _leaves("", RunConfig) if not is_dataclass(setting.type)]
    return {setting.name: setting for setting in found}


@cache
def flag_names() -> Mapping[str, str]:
    """The dotted name of the setting behind every spelling on the command line, ``--no-...`` included."""
    names = {}
    for setting in all_settings().values():
        for flag in setting.flags:
            names[flag] = setting.name
            if setting.kind is bool:
                names[flag.replace("--", "--no-", 1)] = setting.name
    return names


def described_as(words: str, section: str = "") -> list[str]:
    """Names of at most two settings, those of ``section`` first, whose help holds ``words``: ``learning_rate``."""
    phrase = words.strip("-").replace("_", " ").replace("-", " ")
    if len(phrase) < 5:  # shorter ones are in half of all helps
        return []
    found = [setting for setting in all_settings().values() if phrase in setting.help.replace("-", " ")]
    return [setting.name for setting in sorted(found, key=lambda setting: setting.section != section)[:2]]


def value_of(config: RunConfig, name: str) -> Any:
    """The value of the setting ``name`` in ``config``."""
    section, _, field = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, field)


def spell(value: object) -> str:
    """A value as it is written on the command line: tuples as words."""
    if isinstance(value, tuple | list):
        return " ".join(str(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(section: str, owner: Any) -> list[Setting]:
    hints = typing.get_type_hints(owner, include_extras=True)
    return [
        Setting(
            section,
            field.name,
            field.metadata.get("flags") or (f"--{field.name.replace('_', '-')}",),
            hints[field.name],
            None if field.default is MISSING else field.default,
            field.metadata.get("help", ""),
        )
        for field in fields(owner)
    ]


def _bare(kind: Any) -> Any:
    """``int`` of ``Annotated[int, Ge(1)] | None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _describe(kind: Any) -> str:
    """A scalar type in words, its bounds included."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    words: str = _WORDS[_bare(kind)]
    least: Any = None
    for bound in typing.get_args(kind)[1:]:  # the lower one comes first
        match bound:
            case Ge(ge=least):
                words += f" of at least {least}"
            case Gt(gt=most):
                words += f" above {most}"
            case Le(le=most):
                words = words.replace(f"of at least {least}", f"from {least} to {most}")
            case Lt(lt=math.inf):
                words = f"finite {words}"
            case Lt(lt=most):
                words += f" and below {most}"
    return words
