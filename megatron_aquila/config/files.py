"""Settings from a YAML file. Scalars are read as text and typed by the schema, exactly as on the command line."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import yaml

from megatron_aquila.config.settings import Given, all_settings, described_as, flag_names
from megatron_aquila.errors import Problem


@dataclass(slots=True)
class FileSettings:
    """What one file says: the preset it starts from, its settings by dotted name, and what is wrong with it."""

    preset: str | None = None
    given: dict[str, Given] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_file(path: Path) -> FileSettings:
    """The settings of a YAML file with sections as in ``RunConfig``, e.g. ``parallel: {tensor: 4}``.

    Unknown and repeated keys and a file that cannot be read become problems with the line.
    """
    found = FileSettings()
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None:
            _read_mapping(root, "", path, found)
    except OSError as error:
        found.problems.append(Problem("--config", path, error.strerror or "cannot be read", "give a YAML file"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = f"not valid YAML: {' '.join(str(error).split())}"
        found.problems.append(Problem("--config", path, why, "correct the file"))
    except RecursionError:
        found.problems.append(Problem("--config", path, "nested without end", "settings are two levels deep"))
    return found


def _read_mapping(node: yaml.Node, section: str, path: Path, found: FileSettings) -> None:
    """Adds the settings of one mapping, the file's root (``section`` empty) or one section."""
    if not isinstance(node, yaml.MappingNode):
        what = f"{section} holds" if section else "the file holds"
        why = f"{what} no settings by name"
        found.problems.append(Problem(_at(path, node), section, why, "write e.g. parallel: {tensor: 2}"))
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = f"{section}.{key.value}" if section else str(key.value)
        if name in seen:
            found.problems.append(Problem(_at(path, key), name, "is given twice", "keep one of them"))
        seen.add(name)
        if name == "preset" and isinstance(value, yaml.ScalarNode):
            found.preset = value.value
        elif name in all_settings():
            found.given[name] = Given(_plain(value), f"file {_at(path, key)}")
        elif name in _sections():
            _read_mapping(value, name, path, found)
        else:
            found.problems.append(_unknown(_at(path, key), name, section))


def _plain(node: yaml.Node) -> object:
    """A scalar's text, ``None`` for null, or a list of texts."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return {key.value: _plain(value) for key, value in node.value}


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _sections() -> set[str]:
    return {setting.section for setting in all_settings().values()} - {""}


def _unknown(where: str, name: str, section: str) -> Problem:
    """The problem of a key that is no setting, with the nearest keys of its section and of all others."""
    known = [other for other in (*all_settings(), *_sections(), "preset") if other != name]
    leaf = name.rpartition(".")[2]
    close = [other for other in known if other.rpartition(".")[2] == leaf]
    flag = f"--{leaf.replace('_', '-')}"
    close = close or ([flag_names()[flag]] if flag in flag_names() else described_as(leaf, section))
    close = close or get_close_matches(name, known, n=2, cutoff=0.75)
    if close:
        return Problem(where, name, "is no setting", f"did you mean {' or '.join(close)}?")
    owner = [other for other in known if other.rpartition(".")[0] == section]
    return Problem(where, name, "is no setting", f"{section or 'a file'} has {', '.join(sorted(owner))}")
