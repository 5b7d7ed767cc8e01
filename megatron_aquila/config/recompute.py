"""What the settings of recomputation and of offloaded activations demand of each other, of stages and microbatches."""

from collections.abc import Iterator, Sequence

from megatron_aquila.config.derive import given_layers, micro_batches_of, model_shape, num_chunks, stage_plan
from megatron_aquila.config.elastic import model_ranks
from megatron_aquila.config.schema import RunConfig, TrainConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import Problem
from megatron_aquila.plan.layout import LayoutError
from megatron_aquila.plan.recompute import MODULES, per_stage
from megatron_aquila.plan.stages import FIXED_CHUNKS

_OF_KIND = {
    "recompute_modules": "selective",
    "recompute_method": "full",
    "recompute_layers": "full",
    "recompute_granularity_per_stage": "full",
    "recompute_method_per_stage": "full",
    "recompute_layers_per_stage": "full",
}
_MEGATRON_MODULES = {"core_attn": "attention", "layernorm": "norms", "moe_act": "swiglu"}


def check_recompute(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Settings of one kind come with that kind; modules exist; a number of layers is found in some stage."""
    train, default = config.train, TrainConfig()
    for field, kind in _OF_KIND.items():
        value = getattr(train, field)
        if train.recompute != kind and value != getattr(default, field):
            why = f"it is for --recompute {kind}, and recompute is {train.recompute}"
            yield Problem(_flag(field), spell(value), why, f"use --recompute {kind}, or leave it out")
    asked = train.recompute_modules
    if not asked or not set(asked) <= set(MODULES):
        known = dict.fromkeys(ours for word in asked if (ours := _MEGATRON_MODULES.get(word, word)) in MODULES)
        why = f"the modules are {spell(MODULES)}"
        yield Problem("--recompute-modules", spell(asked), why, f"use {spell(tuple(known) or MODULES)}")
    most = max(_stage_layers(config))
    if train.recompute == "full" and train.recompute_layers > most:
        why = f"the largest stage has {most} layers"
        yield Problem("--recompute-layers", train.recompute_layers, why, f"use {most} or less")


def check_offload_activations(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Some stage has so many layers."""
    asked, most = config.train.offload_activations, max(_stage_layers(config))
    if asked > most:
        why = f"the largest stage has {most} layers"
        yield Problem("--offload-activations", asked, why, f"use {most} or less")


def check_recompute_per_stage(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """What is said by stage and microbatch can be read, and is said for all of them."""
    layers, microbatches = _stage_layers(config), _num_microbatches(config, world)
    for field, highest in {"granularity": 1, "method": 1, "layers": max(layers)}.items():
        words: tuple[str, ...] = getattr(config.train, f"recompute_{field}_per_stage")
        why = _misfit(words, len(layers), microbatches, highest) if words else None
        if why is not None:
            way_out = f"use e.g. {len(layers)} 1, the same for all stages, or leave it out"
            yield Problem(_flag(f"recompute_{field}_per_stage"), spell(words), why, way_out)


def _misfit(words: Sequence[str], num_stages: int, microbatches: int | None, highest: int) -> str | None:
    """Why ``words`` do not give each stage a value up to ``highest``, and each microbatch where they differ."""
    try:
        table = per_stage(words)
    except ValueError as error:
        return str(error)
    if len(table) != num_stages:
        return f"it is for {len(table)} stages, there are {num_stages}"
    if max(map(max, table)) > highest:
        return f"{max(map(max, table))} is too high, {highest} is the most"
    odd = next((len(row) for row in table if len(row) > 1 and len(row) != (microbatches or len(row))), None)
    return None if odd is None else f"it is for {odd} microbatches, a step has {microbatches}"


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _stage_layers(config: RunConfig) -> list[int]:
    """Layers of each stage; where they do not fit, which is another rule's problem, the most that there could be."""
    layout, num_layers = config.parallel, config.model.num_layers
    try:
        given, stages = given_layers(layout), layout.pipeline * num_chunks(layout)
    except LayoutError:
        return [num_layers] * layout.pipeline
    if given is not None:
        return list(given)
    if stages > num_layers or num_chunks(layout) != FIXED_CHUNKS.get(layout.schedule, num_chunks(layout)):
        return [num_layers] * stages
    return [len(layers) for layers in stage_plan(layout, model_shape(config.model)).layers]


def _num_microbatches(config: RunConfig, world: int | None) -> int | None:
    """Microbatches of a step at the full batch; None where that is not yet known, or another rule's problem."""
    train = config.train
    dp = config.parallel.data if world is None else world // model_ranks(config)
    unit = sum(micro_batches_of(train, 0 if dp is None else dp))
    return train.global_batch // unit or None if unit else None
