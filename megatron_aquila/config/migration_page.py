"""The page ``docs/from-megatron.md``, made from the tables that the command line uses."""

from collections.abc import Iterator

from megatron_aquila.config.megatron_flags import DIFFERENCES, MIGRATIONS, Always, Follows, Refused, Sets
from megatron_aquila.config.settings import all_settings

_HEAD = """# From Megatron-LM and FlagScale

Printed by `aquila config from-megatron`; a test keeps this copy current.

The flags of a Megatron-LM or FlagScale script can be passed as they are. Each is a setting here, is accepted because it
is always so here, or is refused with what to use instead; all refusals are printed at once. Underscores are as good as
hyphens. `aquila config show FLAGS` prints what a script comes to. Those of `preprocess_data.py` are in
[data.md](data.md#flags-of-preprocess_datapy).

The presets `aquila2-7b-continue`, `aquila2-34b` and `aquila2-70b` are FlagScale's published scripts; `aquila2-7b` is
the 7B from scratch.
"""


def migration_page() -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            _HEAD,
            "## The same setting",
            "",
            "| Megatron-LM, FlagScale | here | in a file |",
            "|---|---|---|",
            *_same(),
            "",
            f"The same name in both, or only here: {_one_name()}.",
            "",
            "## Settings that behave differently",
            "",
            "| flag | here |",
            "|---|---|",
            *(f"| `{flag}` | {difference} |" for flag, difference in DIFFERENCES.items()),
            "",
            "## Accepted, because it is always so, or as far as it is",
            "",
            "| flag | here |",
            "|---|---|",
            *_accepted(),
            "",
            "## Refused, with what to do instead",
            "",
            "| flag | why | instead |",
            "|---|---|---|",
            *_refused(),
            "",
        ]
    )


def _same() -> Iterator[str]:
    for setting in all_settings().values():
        main, *others = setting.flags
        if others:
            yield f"| {' '.join(f'`{flag}`' for flag in others)} | `{main}` | `{setting.name}` |"
    for flag, meaning in MIGRATIONS.items():
        if isinstance(meaning, Sets):
            main = all_settings()[meaning.name].flags[0]
            yield f"| `{flag}` | `{main} {meaning.value}` | `{meaning.name}` |"


def _one_name() -> str:
    flags = sorted(setting.flags[0] for setting in all_settings().values() if len(setting.flags) == 1)
    return ", ".join(f"`{flag}`" for flag in flags)


def _accepted() -> Iterator[str]:
    for flag, meaning in MIGRATIONS.items():
        if isinstance(meaning, Always):
            spelled = f"{flag} {' or '.join(meaning.values)}".rstrip()
            yield f"| `{spelled}` | {meaning.why} |"
        elif isinstance(meaning, Follows):
            yield f"| `{flag}` | must equal `{all_settings()[meaning.name].flags[0]}` |"


def _refused() -> Iterator[str]:
    families: dict[Refused, list[str]] = {}
    for flag, meaning in MIGRATIONS.items():
        if isinstance(meaning, Refused):
            families.setdefault(meaning, []).append(f"`{flag}`")
    for meaning, flags in families.items():
        yield f"| {' '.join(flags)} | {meaning.why} | {meaning.way_out} |"
