"""Flags of Megatron-LM and FlagScale that are no settings here: what each means, or what to use instead.

One table serves the command line and ``docs/from-megatron.md``. Flags that are settings under their Megatron spelling
(``--tensor-model-parallel-size``) are aliases in the schema and need no row.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import Given, all_settings, flag_names, spell, value_of
from megatron_aquila.errors import Problem

Values = Sequence[str]


@dataclass(frozen=True, slots=True)
class Sets:
    """The flag is this value of our setting."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Always:
    """Accepted: it is always so here, ``why`` says how. A flag with a value must have one of ``values``."""

    why: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Follows:
    """Accepted when its value is that of our setting ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Not accepted: why, and what to do. ``exact`` words the way out with the value at hand, where it can."""

    why: str
    way_out: str
    exact: Callable[[Values, RunConfig], str] | None = None


Meaning = Sets | Always | Follows | Refused


def _vocab_multiple(values: Values, config: RunConfig) -> str:
    return f"use --vocab-multiple {int(values[0]) * config.parallel.tensor} ({values[0]} x tp {config.parallel.tensor})"


def _in_samples(flag: str) -> Callable[[Values, RunConfig], str]:
    return lambda values, config: f"use {flag} {int(values[0]) * config.train.global_batch} (steps x global batch)"


def _warmup_samples(values: Values, config: RunConfig) -> str:
    return f"use --lr-warmup-samples {round(float(values[0]) * config.train.train_samples)} (of --train-samples)"


def _stage_layers(values: Values, config: RunConfig) -> str:
    """``1 15 3 15 15 15``, a count of stages before each device type's layers, is ``--stage-layers 15 15 15 15``."""
    rest, layers = iter(int(value) for value in values), list[int]()
    for count in rest:
        layers += itertools.islice(rest, count)
    return f"use --stage-layers {spell(layers)}"


def _family(meaning: Refused, flags: str) -> dict[str, Refused]:
    """The same refusal for several flags."""
    return dict.fromkeys(flags.split(), meaning)


_FP16 = Refused(
    "belongs to fp16, which comes with dynamic loss scaling in a later version", "leave it out: bf16 needs none"
)
_INIT = Refused("one standard deviation and one norm weight serve the whole model", "use --init-std and --norm-init")
_MUP = Refused("muP is not offered", "use --init-std and --lr")
_RECOMPUTE = Refused("recomputation is not yet offered", "use a smaller --micro-batch or more --tp or --pp")
_HETERO = Refused("training on mixed devices is not offered", "use ranks of one kind")
_ADAN = Refused("Adan is not offered", "use --optimizer adamw")
_SEARCH = Refused(
    "is not offered",
    "leave it out: a sample follows from seed, length, blend and split, so the log's consumed samples name it",
)
_OVERLAP = Refused("is not yet offered and changes speed only", "leave it out")
_XPU = Refused("belongs to Kunlun XPU, which is not offered", "leave it out")
_SERVE = Refused("serving is not offered", "use aquila convert and a server of Hugging Face models")
_RMS_NORM = "every norm is an RMSNorm without bias"
_ROPE = "positions are rotary"

MIGRATIONS: Mapping[str, Meaning] = MappingProxyType(
    {
        # Precision
        "--bf16": Sets("train.precision", "bf16"),
        "--fp32": Sets("train.precision", "fp32"),
        "--fp16": Refused("fp16 comes with dynamic loss scaling in a later version", "use --bf16"),
        **_family(_FP16, "--initial-loss-scale --min-loss-scale --loss-scale --loss-scale-window --hysteresis"),
        "--attention-softmax-in-fp32": Always("softmax is computed in fp32 or wider"),
        "--accumulate-allreduce-grads-in-fp32": Always("gradients accumulate and reduce in fp32 or wider"),
        "--rotary-position-embeddings-in-fp32": Always(
            "angles are computed in fp32 or wider (FlagScale's own flag was passed as an offset and had no such effect)"
        ),
        "--embedding-weights-in-fp32": Refused(
            "the embedding is bf16 with an fp32 master weight, like every other weight", "leave it out"
        ),
        # The network
        "--swiglu": Always("the MLP is gated by SiLU"),
        "--disable-bias-linear": Always("no linear layer has a bias"),
        "--untie-embeddings-and-output-weights": Always("the head has its own weight"),
        "--apply-layernorm-rms": Always(_RMS_NORM),
        "--normalization": Always(_RMS_NORM, ("RMSNorm",)),
        "--use-rotary-position-embeddings": Always(_ROPE),
        "--no-position-embedding": Always("there is no learned position"),
        "--position-embedding-type": Always(_ROPE, ("rope",)),
        "--rotary-percent": Always("all of a head is rotated", ("1.0",)),
        "--max-position-embeddings": Follows("model.seq_len"),
        "--group-query-attention": Always("follows from --num-kv-heads"),
        "--attention-dropout": Always("there is no dropout", ("0.0",)),
        "--hidden-dropout": Always("there is no dropout", ("0.0",)),
        "--make-vocab-size-divisible-by": Refused(
            "Megatron-LM multiplies it by tp, so the model would depend on the layout",
            "use --vocab-multiple with this number times tp",
            _vocab_multiple,
        ),
        "--rotary-interleaved-patch": Refused(
            "rotary halves are split here, as in Hugging Face's files",
            "start from the published Hugging Face weights with --init-from-hf: they are in this form already",
        ),
        **_family(
            _INIT,
            "--apply-init-customized --init-method-std-scaled-embed --init-method-std-scaled-attn-q "
            "--init-method-std-scaled-attn-k --init-method-std-scaled-attn-v --init-method-std-scaled-ffn-w1 "
            "--init-method-std-scaled-ffn-w2 --init-method-std-scaled-ffn-w3 --init-method-std-scaled-output "
            "--apply-init-norm-customized --init-weight-attn-norm --init-weight-ffn-norm "
            "--init-weight-output-norm",
        ),
        **_family(
            _MUP,
            "--mup --mup-attn-multiplier --mup-output-multiplier --mup-coord-check --mup-save "
            "--mup-delta-hidden-size --query-zero-init --readout-zero-init",
        ),
        # Parallelism and speed
        "--use-distributed-optimizer": Always("optimizer states and master weights are sharded over dp"),
        "--use-flash-attn": Always("the fastest attention at hand is chosen, and logged at start"),
        "--no-gradient-accumulation-fusion": Always("gradient accumulation is not fused"),
        "--distributed-backend": Always("the backend follows from the device", ("nccl", "gloo")),
        "--no-global-file-system": Always("a missing index is noticed and built on each node"),
        "--num-devices-per-node": Refused("torchrun says how many ranks a node has", "leave it out"),
        **_family(_OVERLAP, "--overlap-grad-reduce --overlap-param-gather"),
        "--num-layers-per-virtual-pipeline-stage": Refused("interleaved stages are not yet offered", "leave it out"),
        **_family(
            _RECOMPUTE,
            "--recompute-granularity --recompute-method --recompute-num-layers --recompute-activations "
            "--recompute-granularity-per-stage --recompute-method-per-stage --recompute-num-layers-per-stage",
        ),
        **_family(
            _HETERO,
            "--hetero-mode --hetero-device-types --hetero-current-device-type --hetero-micro-batch-sizes",
        ),
        "--hetero-pipeline-stages": Refused(
            "stages are given by their layers alone", "use --stage-layers without the counts", _stage_layers
        ),
        **_family(_XPU, "--memory-saving --findmax-opt"),
        # Length and learning rate
        "--train-iters": Refused("lengths are in samples", "use --train-samples", _in_samples("--train-samples")),
        "--lr-warmup-iters": Refused(
            "lengths are in samples", "use --lr-warmup-samples", _in_samples("--lr-warmup-samples")
        ),
        "--lr-decay-iters": Refused(
            "lengths are in samples", "use --lr-decay-samples", _in_samples("--lr-decay-samples")
        ),
        "--lr-warmup-fraction": Refused("lengths are in samples", "use --lr-warmup-samples", _warmup_samples),
        **_family(_ADAN, "--adan-beta1 --adan-beta2 --adan-beta3 --adan-eps"),
        # Data
        "--data-impl": Always("indexed datasets are mapped into memory", ("mmap",)),
        "--dataloader-type": Always("samples are read in the order of the index", ("single",)),
        **_family(_SEARCH, "--return-doc-ids --data-searching-save --data-searching-range"),
        "--finetune-dataset-type": Refused("fine-tuning is not yet offered", "leave it out"),
        # Checkpoints and logs
        "--no-load-rng": Always(
            "nothing random is left after the weights and the data order, which follow from the seed"
        ),
        "--exit-on-missing-checkpoint": Always("a missing checkpoint is an error"),
        "--format-ckpt": Refused("a checkpoint holds the logical model", "use aquila convert"),
        "--save-param-index-maps-only": Refused("a checkpoint names every tensor", "leave it out: any layout loads it"),
        "--tensorboard-log-interval": Follows("observe.log_interval"),
        # Serving
        **_family(_SERVE, "--server-port --model-info"),
    }
)


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
