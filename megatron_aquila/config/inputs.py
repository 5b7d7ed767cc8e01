"""What the settings say of a run's inputs: the token files, and the weights and the position it starts from.

Nothing is opened here; that the files exist and fit is seen when they are.
"""

import math
from collections.abc import Collection, Iterator, Sequence

from megatron_aquila.config.presets import CONTINUATIONS
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import Problem


def missing(config: RunConfig, preset: str | None, *, without: Collection[str] = ()) -> list[Problem]:
    """What training needs and is not given. Showing the settings, or proving a layout, needs none of it.

    Settings named in ``without`` were given, though not as they should be.
    """
    problems = []
    if not config.data.path and "data.path" not in without:
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
    """One prefix, prefixes alone, or a positive weight before each."""
    yield from _check_blend("--data-path", config.data.path)


def check_valid_path(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """As ``check_data_path``, and nothing else says what is for validation."""
    yield from _check_blend("--valid-data-path", config.data.valid_path)
    if config.data.valid_path and config.data.split != DataConfig().split:
        why = "validation data is given by --valid-data-path, and --data-path is all for training"
        yield Problem("--split", config.data.split, why, "give one of them")


def _check_blend(flag: str, path: Sequence[str]) -> Iterator[Problem]:
    weights = [_number(word) for word in path[::2]]
    if len(path) < 2 or all(weight is None for weight in weights):
        return
    if len(path) % 2:
        why = "weights and prefixes do not pair up"
        yield Problem(flag, spell(path), why, "give weight prefix weight prefix ..., or prefixes alone")
        return
    for written, weight in zip(path[::2], weights, strict=True):
        if weight is None or not 0 < weight < math.inf:
            why = f"the weight {written} is not a number above 0"
            yield Problem(flag, spell(path), why, "give weight prefix weight prefix ..., or prefixes alone")
            return


def check_split(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """One to three shares, none negative, and one for training."""
    shares = [_number(part) for part in config.data.split.split(",")]
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
    if start.load is not None and start.init_from_hf is not None:
        yield Problem("--init-from-hf", start.init_from_hf, "--load brings weights of its own", "give one of them")
    if start.resume and start.load is not None:
        why = f"--load {start.load} already says where to continue from"
        yield Problem("--resume", "", why, "give one of them: --no-resume or --load none takes back the other")
    if start.resume and start.save is None:
        yield Problem("--resume", "", "it continues from the --save folder, and none is given", "give --save FOLDER")
    if not start.load_optim and start.load is None:
        why = "it starts a new run from the weights that --load names, and none are named"
        yield Problem("--no-load-optim", "", why, "give --load FOLDER with it, or leave it out")
    if start.load is not None or start.resume:
        return
    overrides = {"--override-lr-schedule": start.override_lr_schedule, "--override-data": start.override_data}
    for flag in (flag for flag, given in overrides.items() if given):
        why = "no checkpoint is resumed that could differ"
        yield Problem(flag, "", why, "give --load FOLDER or --resume with it, or leave it out")


def _number(written: str) -> float | None:
    try:
        return float(written)
    except ValueError:
        return None
