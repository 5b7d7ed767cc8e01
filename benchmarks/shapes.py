"""The models that the benchmarks of a GPU train: whole or a slice of 8 layers, as one process can hold them."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.schema import RunConfig

_ALONE = "--tp 1 --pp 1 --no-sp --rampup-batch none"
_34B = f"--preset aquila2-34b {_ALONE}"
_SMALL = "--num-layers 2 --hidden-size 64 --num-heads 4 --ffn-size 96 --vocab-size 128 --precision fp32"

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "7b": "--preset aquila2-7b",
        "7b-8": "--preset aquila2-7b --num-layers 8",
        "34b": _34B,
        "34b-8": f"{_34B} --num-layers 8",
    }
)
LEARNING = "219m"  # small enough to be trained for a thousand steps
LEARNING_MODELS: Mapping[str, str] = MappingProxyType(
    {
        LEARNING: "--preset aquila2-7b --num-layers 12 --hidden-size 1024 --num-heads 16 --ffn-size 2752"
        " --vocab-size 32768"
    }
)
TINY_MODELS: Mapping[str, str] = MappingProxyType(
    {"tiny": f"--preset aquila2-7b {_SMALL}", "tiny-grouped": f"{_34B} {_SMALL} --num-kv-heads 2"}
)


def model_config(model: str, *flags: str) -> RunConfig:
    """Settings of a model of any table, and more flags of a run."""
    return load_config([*{**MODELS, **LEARNING_MODELS, **TINY_MODELS}[model].split(), *flags]).config
