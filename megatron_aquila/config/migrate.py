"""What Megatron-LM's and FlagScale's flags on a command line come to: settings of ours, problems, or nothing to do."""

from collections.abc import Iterator, Mapping

from megatron_aquila.config.megatron_flags import MIGRATIONS, Always, Follows, Meaning, Refused, Sets
from megatron_aquila.config.megatron_values import Values
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import Given, all_settings, flag_names, spell, value_of
from megatron_aquila.errors import Problem


def settings_of(foreign: Mapping[str, Values]) -> Iterator[tuple[str, Given]]:
    """Our settings, by dotted name, that the given Megatron flags stand for."""
    for flag, values in foreign.items():
        meaning = MIGRATIONS[flag]
        if isinstance(meaning, Sets) and not values:
            yield meaning.name, Given(meaning.value, f"flag {flag}")


def migration_problems(foreign: Mapping[str, Values], config: RunConfig) -> list[Problem]:
    """What is wrong with the given Megatron flags, seen beside the settings they came with."""
    problems = []
    for flag, values in foreign.items():
        complaint = _complaint(MIGRATIONS[flag], values, config)
        if complaint is not None:
            problems.append(Problem(flag, spell(values), *complaint))
    return problems


def _complaint(meaning: Meaning, values: Values, config: RunConfig) -> tuple[str, str] | None:
    """Why a flag with these values is not accepted and the way out; ``None`` if it is."""
    match meaning:
        case Refused(why, way_out, exact):
            try:
                return why, way_out if exact is None else exact(values, config)
            except (ValueError, IndexError):  # its own value is malformed: the general advice still holds
                return why, way_out
        case Follows(name):
            wanted = spell(value_of(config, name))
            if len(values) == 1 and _same(values[0], wanted):
                return None
            return f"it is {name} here, which is {wanted}", f"use {all_settings()[name].flags[0]} or leave it out"
        case Always(why, allowed) if allowed:
            if len(values) == 1 and any(_same(values[0], value) for value in allowed):
                return None
            return why, f"use {' or '.join(allowed)} or leave it out"
        case _ if values:
            return "it takes no value", "give the flag alone"
    return None


def _same(given: str, wanted: str) -> bool:
    try:
        return float(given) == float(wanted)
    except ValueError:
        return given == wanted


def known_flags() -> set[str]:
    """Every spelling the command line understands, ours and Megatron's."""
    return {*flag_names(), *MIGRATIONS}
