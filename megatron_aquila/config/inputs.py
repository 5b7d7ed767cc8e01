"""What the settings say of a run's inputs: the token files, and the weights and the position it starts from.

Nothing is opened here; that the files exist and fit is seen when they are.
"""

import math
import os
from collections.abc import Collection, Iterator, Sequence

from megatron_aquila.config.presets import CONTINUATIONS
from megatron_aquila.config.saving import AUTO
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.config.sources import is_split_by_path, number, prefixes_of, sources, training_blends, valid_sets
from megatron_aquila.errors import Problem


def missing(config: RunConfig, preset: str | None, *, without: Collection[str] = ()) -> list[Problem]:
    """What training needs and is not given. Showing the settings, or proving a layout, needs none of it.

    Settings named in ``without`` were given, though not as they should be.
    """
    problems = []
    named = config.data.path or config.data.train_path
    if not named and {"data.path", "data.train_path"}.isdisjoint(without):
        why = "no tokens to train on are named"
        problems.append(Problem("--data-path", "", why, "give the prefix of a .bin/.idx pair, or weight prefix pairs"))
    begins = config.checkpoint.load is not None or config.checkpoint.init_from_hf is not None
    begins = begins or not {"checkpoint.load", "checkpoint.init_from_hf"}.isdisjoint(without)
    if preset is not None and preset in CONTINUATIONS and not begins:
        why = "it continues published weights, and none are named: the run would start from random ones"
        way_out = f"give --init-from-hf FOLDER or --load FOLDER, or use --preset {CONTINUATIONS[preset]}"
        problems.append(Problem("--preset", preset, why, way_out))
    return problems


def check_data_path(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """One prefix, prefixes alone, or a positive weight before each; none twice."""
    for flag, path in _blends(config.data):
        why = _blend_problem(path)
        if why is not None:
            yield Problem(flag, spell(path), why, "give weight prefix weight prefix ..., or prefixes alone")
            continue
        names = [os.path.normpath(prefix) for prefix in prefixes_of(path)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            yield Problem(flag, spell(path), f"{twice} is named twice", "name it once, with the sum of its weights")


def _blends(data: DataConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Every blend of the settings with the flag that gives it."""
    given = {"--data-path": data.path, "--train-data-path": data.train_path, "--valid-data-path": data.valid_path}
    return [*given.items(), ("--test-data-path", data.test_path), *(("--phases", phase.path) for phase in data.phases)]


def _blend_problem(path: Sequence[str]) -> str | None:
    """Why these words are no blend."""
    weights = [number(word) for word in path[::2]]
    if len(path) < 2 or all(weight is None for weight in weights):
        return None
    if len(path) % 2:
        return "weights and prefixes do not pair up"
    for written, weight in zip(path[::2], weights, strict=True):
        if weight is None or not 0 < weight < math.inf:
            return f"the weight {written} is not a number above 0"
    return None


def check_paths(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Data is named whole or to be split, and what is not for training is not trained on."""
    data = config.data
    if data.path and data.train_path:
        yield Problem("--data-path", spell(data.path), "--train-data-path names the data too", "give one of them")
    held = {"--valid-data-path": data.valid_path, "--test-data-path": data.test_path}
    if is_split_by_path(data) and data.split not in (DataConfig().split, "1"):
        named = [flag for flag, path in {"--train-data-path": data.train_path, **held}.items() if path]
        why = f"with {', '.join(named)} given, no data is split"
        yield Problem("--split", data.split, why, "give one of them")
    trained = _trained(data)
    for flag, path in held.items():
        both = [prefix for prefix in prefixes_of(path) if os.path.normpath(prefix) in trained]
        if both:
            yield Problem(flag, spell(path), f"{both[0]} is trained on", "name other data, or use --split without it")


def _trained(data: DataConfig) -> set[str]:
    """The prefixes that are trained on, in one spelling."""
    return {os.path.normpath(prefix) for prefix in sources(*(path for _, path in training_blends(data)))}


def check_phases(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Phases start one after the other, within the run, and have data."""
    starts = [phase.from_samples for phase in config.data.phases]
    given = spell(config.data.phases)
    if starts != sorted(set(starts)):
        yield Problem("--phases", given, "they do not start one after the other", "order them by their samples")
    if starts and starts[-1] >= config.train.train_samples:
        why = f"the run of {config.train.train_samples} samples ends before sample {starts[-1]}"
        yield Problem("--phases", given, why, "start it earlier, or raise --train-samples")
    if any(not phase.path for phase in config.data.phases):
        yield Problem("--phases", given, "a phase names no data", 'give each as "SAMPLES weight prefix ..."')


def check_max_epochs(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """A number above 0 for all data sets, or for one that is trained on."""
    data, words = config.data, config.data.max_epochs_per_source
    known = sources(*(path for _, path in training_blends(data)))
    for word in words:
        prefix, equals, limit = word.rpartition("=")
        value = number(limit)
        if value is None or not value > 0:
            why = f"{word} is no number above 0, nor one for a data set"
            yield Problem("--max-epochs-per-source", spell(words), why, "use e.g. 4, or 4 data/wiki=2")
        elif equals and prefix not in known:
            why = f"{prefix} is not trained on"
            way_out = f"use {', '.join(known[:6]) or 'a number alone'}"
            yield Problem("--max-epochs-per-source", spell(words), why, way_out)
    if sum("=" not in word for word in words) > 1:
        yield Problem("--max-epochs-per-source", spell(words), "several numbers are for all data sets", "give one")


def check_valid_sets(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Each has a name of its own in the log, and is not read in training."""
    data, words = config.data, config.data.valid_sets
    given = spell(words)
    for word in words:
        name, _, prefix = word.partition("=")
        if not name or not prefix:
            yield Problem("--valid-sets", given, f"{word} is not NAME=PREFIX", "use e.g. zh=data/zh_valid")
            return
    read, trained = sources(*(path for _, path in training_blends(data)), data.valid_path), _trained(data)
    for name, prefixes in valid_sets(data).items():
        if name in read:
            why = f"{name} is the name of a data set, under which its loss is logged already"
            yield Problem("--valid-sets", given, why, "use another name")
        both = [prefix for prefix in prefixes if os.path.normpath(prefix) in trained]
        if both:
            yield Problem("--valid-sets", given, f"{both[0]} is trained on", "name data that is not, or use --split")
        if len(set(map(os.path.normpath, prefixes))) < len(prefixes):
            yield Problem("--valid-sets", given, f"{name} names a data set twice", "name it once")
    if data.valid_samples is not None and not words:
        yield Problem("--valid-samples", data.valid_samples, "no --valid-sets are named", "leave it out")


def check_split(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """One to three shares, none negative, and one for training."""
    shares = [number(part) for part in config.data.split.split(",")]
    given = [share for share in shares if share is not None and 0 <= share < math.inf]
    if not len(shares) == len(given) <= 3:
        why = "is not one to three shares of train, valid and test"
        yield Problem("--split", config.data.split, why, "use e.g. 99,1,0")
    elif given[0] == 0:
        why = "leaves no documents to train on"
        yield Problem("--split", config.data.split, why, "give train, the first of the shares, more than 0")


def check_documents(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Where documents end is known if anything depends on it: by a setting, or by the tokenizer."""
    data, eod = config.data, config.data.eod_token_id
    switches = {
        "--reset-position-ids": data.reset_position_ids,
        "--reset-attention-mask": data.reset_attention_mask,
        "--eod-mask-loss": data.eod_mask_loss,
    }
    files = (data.vocab_file, data.merge_file, data.special_tokens_file, data.tokenizer_model)
    asked = " ".join(flag for flag, given in switches.items() if given)
    if asked and eod is None and all(file is None for file in files):
        why = "nothing says which token ends a document"
        yield Problem(asked, "", why, "give --eod-token-id, or the tokenizer's files")
    if eod is not None and eod >= config.model.vocab_size:
        why = f"it is outside the vocabulary of {config.model.vocab_size}"
        yield Problem("--eod-token-id", eod, why, "give the id that ends the documents in the data")


def check_start(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """A run starts from one place, and settings of a resume need one."""
    start = config.checkpoint
    own, named = start.resumes_own, start.load not in (None, AUTO)
    auto = ("--resume", "") if start.resume else ("--load", "auto")
    if named and start.init_from_hf is not None:
        yield Problem("--init-from-hf", start.init_from_hf, "--load brings weights of its own", "give one of them")
    if start.resume and start.load is not None:
        why = f"--load {start.load} already says where to continue from"
        yield Problem("--resume", "", why, "give one of them: --no-resume or --load none takes back the other")
    elif own and start.save is None:
        yield Problem(*auto, "it continues from the --save folder, and none is given", "give --save FOLDER")
    if not start.load_optim and (start.load is None or own):
        why = "it starts a new run from the weights that --load names, and none are named"
        yield Problem("--no-load-optim", "", why, "give --load FOLDER with it, or leave it out")
    if start.load is not None or start.resume:
        return
    if start.override_rope and start.init_from_hf is None:
        why = "no weights are loaded that could have been trained with other positions"
        yield Problem("--override-rope", "", why, "give --load, --resume or --init-from-hf with it, or leave it out")
    overrides = {"--override-lr-schedule": start.override_lr_schedule, "--override-data": start.override_data}
    for flag in (flag for flag, given in overrides.items() if given):
        why = "no checkpoint is resumed that could differ"
        yield Problem(flag, "", why, "give --load FOLDER or --resume with it, or leave it out")
