"""From the command line, a file and a preset to one validated ``RunConfig``, with the source of every setting.

Precedence: default < preset < file < flag. Flags are parsed by tyro and typed by pydantic; all problems are collected
and raised together.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro
from pydantic import TypeAdapter, ValidationError

from megatron_aquila.config.check import check
from megatron_aquila.config.files import FileSettings, read_file
from megatron_aquila.config.inputs import missing
from megatron_aquila.config.megatron_flags import MIGRATIONS
from megatron_aquila.config.migrate import known_flags, migration_problems, settings_of
from megatron_aquila.config.presets import PRESETS
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import Given, Setting, all_settings, described_as, flag_names, spell
from megatron_aquila.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The settings of a run and, by dotted name, where each came from: ``default``, ``preset aquila2-7b``,
    ``file run.yaml:7`` or ``flag --tp``. ``options`` are the command's own, outside of ``RunConfig``; ``missing`` is
    what training would still need.
    """

    config: RunConfig
    sources: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """The command line as given, not yet typed: settings by dotted name, Megatron's flags, the command's options."""

    preset: str | None
    given: Mapping[str, Given]
    foreign: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]
    problems: tuple[Problem, ...]


def load_config(
    argv: Sequence[str],
    *,
    world_size: int | None = None,
    prog: str = "aquila",
    options: type | None = None,
    to_train: bool = False,
) -> LoadedConfig:
    """The settings that ``argv`` asks for, checked for a world of ``world_size`` ranks (``None``: not known yet).

    ``options`` is a ``TypedDict(total=False)`` with flags of the command's own. With ``to_train`` what training needs
    must be given too, the data first of all. ``--help`` prints and exits. Raises ``ConfigError`` with every problem at
    once.
    """
    return resolve(parse(argv, prog=prog, options=options), world_size=world_size, to_train=to_train)


def parse(argv: Sequence[str], *, prog: str = "aquila", options: type | None = None) -> Parsed:
    """Reads flags, file and preset without typing or checking them."""
    words, valued = _without_values_of_bools(argv)
    answers, unknown = tyro.cli(
        _flags_type(options), args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,), return_unknown_args=True
    )
    foreign, rest = _read_foreign(unknown)
    file = read_file(Path(answers["config"])) if "config" in answers else FileSettings()
    preset, flags = answers.get("preset", file.preset), _flags_given(answers, argv)
    problems = [*valued, *_unknown_flags(rest), *file.problems]
    if preset is not None and preset not in PRESETS:
        problems.append(Problem("--preset", preset, "no preset has this name", _suggest(preset, PRESETS)))
    for name, given in settings_of(foreign):
        if name in flags and flags[name].value != given.value:
            source = flags[name].source.removeprefix("flag ")
            why = f"contradicts {source} {spell(flags[name].value)}"
            problems.append(Problem(given.source.removeprefix("flag "), "", why, "give one of them"))
        flags.setdefault(name, given)
    from_preset = {name: Given(value, f"preset {preset}") for name, value in PRESETS.get(preset or "", {}).items()}
    own = {name: answers[name] for name in _option_types(options) if name in answers}
    return Parsed(preset, from_preset | file.given | flags, foreign, own, tuple(problems))


def resolve(parsed: Parsed, *, world_size: int | None = None, to_train: bool = False) -> LoadedConfig:
    """Types and checks what was parsed; raises ``ConfigError`` with every problem of parsing, typing and checking."""
    problems = list(parsed.problems)
    values = {name: _untyped(all_settings()[name], given.value) for name, given in parsed.given.items()}
    try:
        config = _adapter().validate_python(_nested(values))
    except ValidationError as error:
        untyped = {_name_of(detail["loc"]) for detail in error.errors()}
        problems += [_type_problem(all_settings()[name], parsed.given[name]) for name in values if name in untyped]
        typed = {name: value for name, value in values.items() if name not in untyped}
        config = _adapter().validate_python(_nested(typed))
    else:
        untyped = set()
    problems += migration_problems(parsed.foreign, config)
    problems += [_located(problem, parsed.given) for problem in check(config, world_size, without=untyped)]
    needed = missing(config, parsed.preset, without=untyped)
    if to_train:
        problems += needed
    if problems:
        raise ConfigError(problems)
    sources = {name: parsed.given[name].source if name in parsed.given else "default" for name in all_settings()}
    return LoadedConfig(config, sources, parsed.options, tuple(needed))


def with_config_flag(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with ``--config`` before a file that stands alone: the first word, or a name in .yaml anywhere."""
    words: list[str] = []
    for word in arguments:
        stands_alone = not words or word.endswith((".yaml", ".yml"))
        if stands_alone and not word.startswith("-") and words[-1:] != ["--config"]:
            words.append("--config")
        words.append(word)
    return words


@cache
def _flags_type(options: type | None) -> Any:
    """A ``TypedDict`` of ``TypedDict``s, one a section, all their values optional and still text."""
    typed_dict: Any = TypedDict  # made at run time, which mypy cannot follow
    groups: dict[str, dict[str, Any]] = {}
    for setting in all_settings().values():
        groups.setdefault(setting.section, {})[setting.field] = _flag_type(setting)
    sections = typing.get_type_hints(RunConfig)
    members: dict[str, Any] = {
        "config": _word("YAML file of settings", "FILE"),
        "preset": _word(f"start from {', '.join(PRESETS)}", "NAME"),
        **_option_types(options),
        **groups.pop(""),
    }
    for section, flags in groups.items():
        about = tyro.conf.arg(help=(sections[section].__doc__ or "").replace("`", ""))
        members[section] = Annotated[typed_dict(section, flags, total=False), about]
    group = typed_dict("settings", members, total=False)
    group.__doc__ = "Settings of a run. Precedence: default < preset < file < flag."
    return group


def _option_types(options: type | None) -> dict[str, Any]:
    """The types of a command's own flags by name."""
    return {} if options is None else typing.get_type_hints(options, include_extras=True)


def _word(help: str, metavar: str) -> Any:
    return Annotated[str, tyro.conf.arg(help=help, metavar=metavar, help_behavior_hint="")]


def _flag_type(setting: Setting) -> Any:
    *others, last = setting.flags  # --help shows the name after its aliases: the order is ours, then Megatron's
    kind: Any = bool if setting.kind is bool else tuple[str, ...] if setting.is_tuple else str
    default = "" if setting.default is None else f" [{spell(setting.default)}]" if setting.default != () else ""
    about = tyro.conf.arg(
        name=last.removeprefix("--"),
        aliases=others,
        help=setting.help + default,
        help_behavior_hint="",
        metavar=None if setting.kind is bool else setting.metavar,
    )
    return Annotated[kind, about]


def _without_values_of_bools(argv: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """``argv`` without flags that were given a value and take none, and a problem for each: ``--load-optim false``."""
    words: list[str] = []
    problems = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        setting = all_settings().get(flag_names().get(flag.replace("_", "-"), ""))
        if setting is not None and setting.kind is bool and (equals or (rest and not rest[0].startswith("-"))):
            on = setting.flags[0]
            way_out = f"use {on} or {on.replace('--', '--no-', 1)}"
            problems.append(Problem(flag, value if equals else rest.pop(0), "takes no value", way_out))
        else:
            words.append(word)
    return words, problems


def _read_foreign(words: Sequence[str]) -> tuple[Mapping[str, tuple[str, ...]], Sequence[str]]:
    """Megatron's flags among ``words``, each with any number of values, and the words that are neither."""
    if not words:
        return {}, ()
    typed_dict: Any = TypedDict
    arg = tyro.conf.arg
    flags = {flag: Annotated[tuple[str, ...], arg(name=flag.removeprefix("--"), help="")] for flag in MIGRATIONS}
    found, rest = tyro.cli(
        typed_dict("foreign", flags, total=False), args=words, add_help=False, return_unknown_args=True
    )
    return found, rest


def _flags_given(answers: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Given]:
    """The settings given as flags, each with the spelling that was used."""
    spelled = {}
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in flag_names():
            spelled[flag_names()[flag]] = flag
    given = {}
    for name, setting in all_settings().items():
        group = answers.get(setting.section, {}) if setting.section else answers
        if setting.field in group:
            given[name] = Given(group[setting.field], f"flag {spelled.get(name, setting.flags[0])}")
    return given


def _unknown_flags(rest: Sequence[str]) -> list[Problem]:
    """A problem for each flag nobody knows, with the words that followed it, and for each stray word."""
    problems: list[Problem] = []
    for word in rest:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            problems.append(Problem(flag, value, "is no setting", _suggest_flag(flag.replace("_", "-"))))
        elif problems and problems[-1].flag.startswith("--"):
            problems[-1] = replace(problems[-1], value=f"{problems[-1].value} {word}".lstrip())
        else:
            problems.append(Problem(word, "", "belongs to no flag", "settings are given as --flag value"))
    return problems


def _suggest_flag(flag: str) -> str:
    """The setting that is described in the flag's words, or the flags of a similar spelling."""
    described = [all_settings()[name].flags[0] for name in described_as(flag)]
    return f"did you mean {' or '.join(described)}?" if described else _suggest(flag, known_flags())


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    close = get_close_matches(word, known := sorted(known), n=2, cutoff=0.7)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "see --help for every flag" if word.startswith("-") else f"use {', '.join(known)}"


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Dotted names as dictionaries in dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested


def _untyped(setting: Setting, value: object) -> object:
    """``value`` as pydantic is to read it.

    The word ``none`` means that an optional setting is left to be derived; several values may be one text with blanks.
    A phase in words is its samples and its blend.
    """
    match value:
        case [*phases] if setting.metavar.startswith("PHASE"):
            return [_phase(phase) for phase in phases]
        case "none" | ["none"] if setting.is_optional:
            return None
        case str(text) | [str(text)] if setting.is_tuple:
            return text.split()
        case {**named} if setting.is_tuple:
            return [f"{name}={word}" for name, words in named.items() for word in _words(words)]
    return value


def _words(value: object) -> Sequence[object]:
    """A list's items, or the words of a text."""
    return value if isinstance(value, list) else str(value).split()


def _phase(written: object) -> object:
    """What makes a ``Phase``, of ``"1000 0.5 a 0.5 b"`` or of a file's ``{from_samples: 1000, path: 0.5 a 0.5 b}``."""
    match written:
        case str(text):
            samples, *path = text.split() or [""]
            return {"from_samples": samples, "path": path}
        case {"path": str(text), **others}:
            return {**others, "path": text.split()}
    return written


def _name_of(location: tuple[int | str, ...]) -> str:
    """The setting's dotted name in an error's location, which goes on into a tuple's items."""
    words = [str(word) for word in location]
    return words[0] if words[0] in all_settings() else ".".join(words[:2])


def _type_problem(setting: Setting, given: Given) -> Problem:
    value = spell(given.value)
    way_out = f"{setting.help}, e.g. {setting.example}"
    if setting.choices:
        way_out = _suggest(value, setting.choices)
    return Problem(_where(setting, given), value, f"is not {setting.wanted}", way_out)


def _where(setting: Setting, given: Given) -> str:
    """How a message names a setting: by its flag, or by file, line and name."""
    kind, _, place = given.source.partition(" ")
    return {"flag": place, "file": f"{place}: {setting.name}"}.get(kind, setting.flags[0])


def _located(problem: Problem, given: Mapping[str, Given]) -> Problem:
    """The problem with its flag as the user spelled it, or with the line of the file that set it."""
    name = flag_names().get(problem.flag, "")
    return problem if name not in given else replace(problem, flag=_where(all_settings()[name], given[name]))
