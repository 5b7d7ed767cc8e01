"""Which data sets the settings name, and what they say of each."""

from collections.abc import Sequence

from megatron_aquila.config.schema import DataConfig


def prefixes_of(path: Sequence[str]) -> Sequence[str]:
    """The prefixes in a blend that is written as ``--data-path`` is."""
    return path[1::2] if len(path) > 1 and number(path[0]) is not None else path


def sources(*blends: Sequence[str]) -> list[str]:
    """The prefixes in several blends, each once."""
    return list(dict.fromkeys(prefix for path in blends for prefix in prefixes_of(path)))


def training_blends(data: DataConfig) -> list[tuple[int, tuple[str, ...]]]:
    """The blends that are trained on, each with the sample of the run that it starts at."""
    return [(0, data.train_path or data.path), *((phase.from_samples, phase.path) for phase in data.phases)]


def sources_read(data: DataConfig) -> list[str]:
    """The prefixes that a run reads, to train or to validate on, each once."""
    return sources(*(path for _, path in training_blends(data)), data.valid_path, *valid_sets(data).values())


def split_of(data: DataConfig) -> str:
    """How the training data is split: all of it is trained on where a part is named by a path of its own."""
    return "1" if is_split_by_path(data) else data.split


def is_split_by_path(data: DataConfig) -> bool:
    """Whether paths, not shares, say what is trained and validated on."""
    return bool(data.train_path or data.valid_path or data.test_path)


def valid_sets(data: DataConfig) -> dict[str, list[str]]:
    """The prefixes of each named validation set; those of one name belong together."""
    named: dict[str, list[str]] = {}
    for word in data.valid_sets:
        name, _, prefix = word.partition("=")
        named.setdefault(name, []).append(prefix)
    return named


def epoch_limits(data: DataConfig) -> dict[str, float]:
    """The largest number of epochs of each data set that has one, by prefix."""
    limits: dict[str, float] = {}
    own: dict[str, float] = {}
    for word in data.max_epochs_per_source:
        prefix, equals, limit = word.rpartition("=")
        if equals:
            own[prefix] = float(limit)
        else:
            limits = dict.fromkeys(sources(*(path for _, path in training_blends(data))), float(limit))
    return limits | own


def number(written: str) -> float | None:
    """The number that a word is, if it is one."""
    try:
        return float(written)
    except ValueError:
        return None
