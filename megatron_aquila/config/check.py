"""What settings demand of each other and of the world size. Every problem is found, each with a way out that works."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from megatron_aquila.config.check_family import check_family
from megatron_aquila.config.checkpoints import check_ephemeral, check_exports, check_retention
from megatron_aquila.config.context import check_context_heads, check_sequence
from megatron_aquila.config.derive import given_layers, known_replicas, micro_batches_of, model_shape, num_chunks
from megatron_aquila.config.elastic import check_elastic, model_ranks
from megatron_aquila.config.graphs import check_cuda_graph
from megatron_aquila.config.inputs import (
    check_data_path,
    check_documents,
    check_max_epochs,
    check_paths,
    check_phases,
    check_split,
    check_start,
    check_valid_sets,
)
from megatron_aquila.config.precision import (
    check_grad_reduce,
    check_loss_scale,
    check_optimizer_storage,
    check_precision,
)
from megatron_aquila.config.profile import check_profile
from megatron_aquila.config.recompute import check_offload_activations, check_recompute, check_recompute_per_stage
from megatron_aquila.config.replicas import check_micro_batches
from megatron_aquila.config.rope import check_rope, check_two_range
from megatron_aquila.config.schema import ParallelConfig, RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.config.skips import check_faults, check_skips
from megatron_aquila.config.zero import check_reduced_in_groups, check_zero_group
from megatron_aquila.errors import Problem
from megatron_aquila.plan.layout import LayoutError
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import FIXED_CHUNKS

Rule = Callable[[RunConfig, int | None], Iterator[Problem]]
FP8_MULTIPLE = 16  # the sizes of a matrix that tensor cores multiply in 8 bits


def check(config: RunConfig, world_size: int | None, *, without: Collection[str] = ()) -> list[Problem]:
    """Every problem of the settings on ``world_size`` ranks (``None``: not known yet); empty if the run can start.

    Rules that read a setting named in ``without`` (it could not be typed) are left out.
    """
    readable = [rule for rule, reads in RULES.items() if not set(reads.split()) & set(without)]
    return [problem for rule in readable for problem in rule(config, world_size)]


def _heads(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Heads divide the hidden size, kv heads divide heads, and rotary halves need an even head."""
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        why = f"hidden_size {model.hidden_size} is not divisible by it and head_dim is not given"
        way_out = f"use {_listed(_near(_divisors(model.hidden_size), model.num_heads))}, or give --head-dim"
        yield Problem("--num-heads", model.num_heads, why, way_out)
        return
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        why = f"num_heads {model.num_heads} is not divisible by it"
        way_out = f"use {_listed(_divisors(model.num_heads))}"
        yield Problem("--num-kv-heads", model.num_kv_heads, why, way_out)
    head_dim = model.hidden_size // model.num_heads if model.head_dim is None else model.head_dim
    if head_dim % 2:
        why = "rotary positions turn pairs, so a head needs an even width"
        yield Problem("--head-dim", head_dim, why, f"use {head_dim + 1}")


def _tensor(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """Everything that tp splits must be divisible by it."""
    tp, shape = config.parallel.tensor, model_shape(config.model)
    sizes = _split_sizes(shape)
    bad = {name: size for name, size in sizes.items() if size % tp}
    if not bad:
        return
    named = _listed((f"{name} {size}" for name, size in bad.items()), "and")
    why = f"{named} {'is' if len(bad) == 1 else 'are'} not divisible by {tp}"
    if shape.num_kv_heads < tp:
        why += " and key/value heads are not replicated"
    if len(bad) == 1 and "padded_vocab_size" in bad:
        better = math.lcm(config.model.vocab_multiple, tp)
        yield Problem("--tp", tp, why, f"use --vocab-multiple {better}")
    else:
        yield Problem("--tp", tp, why, f"use {_listed(_tensor_degrees(shape, world))}")


def _pipeline(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """The schedule has as many stages a rank; they hold the layers, by hand or balanced, and none is empty."""
    layout, layers = config.parallel, config.model.num_layers
    name, pp, fixed = layout.schedule, layout.pipeline, FIXED_CHUNKS.get(layout.schedule)
    if layout.chunks is not None and fixed not in (None, layout.chunks):
        why = f"--schedule {name} has {fixed} a rank"
        yield Problem("--chunks", layout.chunks, why, f"use {fixed}, or --schedule 1f1b, which takes any number")
        return
    if layout.stage_layers is not None or layout.pipeline_layout is not None:
        yield from _given_stages(layout, layers)
        return
    chunks = num_chunks(layout)
    if pp > layers // chunks:
        flags, stages = ("--pp", pp) if chunks == 1 else (f"--pp {pp} --chunks {chunks}", "")
        why = f"{layers} layers cannot fill {pp * chunks} stages"
        if pp > layers or fixed is not None:
            way_out = f"use {_range(layers // chunks)}" if layers >= chunks else "use --schedule 1f1b"
            yield Problem(flags, stages, why, way_out if chunks == 1 or layers < chunks else f"{way_out} for --pp")
        else:
            yield Problem(flags, stages, why, f"use {_range(layers // pp)} for --chunks")


def _given_stages(layout: ParallelConfig, layers: int) -> Iterator[Problem]:
    """Stages given by hand: in one form, as many as there are, adding up to the model."""
    leave, pp = "leave it out for a balanced split", layout.pipeline
    flag, value = "--stage-layers", spell(layout.stage_layers)
    if layout.pipeline_layout is not None:
        flag, value = "--pipeline-layout", layout.pipeline_layout
        if layout.stage_layers is not None:
            yield Problem(flag, value, f"--stage-layers {spell(layout.stage_layers)} says it too", "give one of them")
            return
    try:
        given, chunks = given_layers(layout) or (), num_chunks(layout)
    except LayoutError as error:
        yield Problem(flag, value, str(error), leave)
        return
    if len(given) != pp * chunks:
        stages = f"pp is {pp}" if chunks == 1 else f"pp {pp} x chunks {chunks} is {pp * chunks}"
        is_fixed = layout.schedule in FIXED_CHUNKS or len(given) % pp
        yield Problem(
            flag, value, f"{stages}, not {len(given)}", leave if is_fixed else f"use --chunks {len(given) // pp}"
        )
    if 0 in given[1:-1]:
        yield Problem(flag, value, f"stage {given.index(0, 1)} of {len(given)} holds nothing", leave)
    if sum(given) != layers:
        yield Problem(flag, value, f"they add up to {sum(given)}, the model has {layers} layers", leave)


def _world(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """tp x cp x pp divides the world, and dp, where given, is what is left."""
    if world is None or config.parallel.elastic:
        return
    layout, ranks = config.parallel, model_ranks(config)
    if world % ranks:
        flags, product = _product(config)
        why = f"{product} ranks do not divide the world size {world}"
        yield Problem(flags, "", why, _layouts(config, world))
    elif layout.data not in (None, world // ranks):
        why = f"the world size {world} leaves {world // ranks} for dp"
        way_out = f"use {world // ranks}, leave it out, or start {(layout.data or 1) * ranks} processes"
        yield Problem("--dp", layout.data, why, way_out)


def _batch(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """The global batch is a whole number of microbatches on every replica."""
    batch, (unit, what) = config.train.global_batch, _batch_unit(config, None if config.parallel.elastic else world)
    if batch % unit:
        yield Problem("--global-batch", batch, f"is not a multiple of {what}", f"use {_multiples(batch, unit)}")


def _ramp(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """The ramp reaches the global batch in whole increments, each a whole number of microbatches."""
    train = config.train
    if train.rampup_batch is None:
        return
    start, increment, samples = train.rampup_batch
    asked, (unit, what) = spell(train.rampup_batch), _batch_unit(config, world)
    if start > train.global_batch:
        why = f"it starts above global_batch {train.global_batch}"
        yield Problem("--rampup-batch", asked, why, f"start at {train.global_batch} or less")
    elif (train.global_batch - start) % increment:
        whole = [size for size in _divisors(train.global_batch - start) if size % unit == 0 or unit > size]
        why = f"from {start} in steps of {increment} it does not reach global_batch {train.global_batch}"
        yield Problem("--rampup-batch", asked, why, f"use an increment of {_listed(_near(whole, increment, 3))}")
    elif start % unit or increment % unit:
        nearest = [max(unit, round(value / unit) * unit) for value in (start, increment)]
        why = f"start and increment are not both multiples of {what}"
        yield Problem("--rampup-batch", asked, why, f"use e.g. {spell((*nearest, samples))}")
    if samples > train.train_samples:
        why = f"it lasts longer than the run of {train.train_samples} samples"
        yield Problem("--rampup-batch", asked, why, f"let it end by {train.train_samples}")


def _learning_rate(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield Problem("--min-lr", optim.min_lr, f"is above the peak lr {optim.lr}", f"use {optim.lr} or less")
    length = config.train.train_samples if optim.lr_decay_samples is None else optim.lr_decay_samples
    if optim.lr_warmup_samples >= length:
        why = f"the schedule ends after {length} samples (lr_decay_samples, by default train_samples)"
        yield Problem("--lr-warmup-samples", optim.lr_warmup_samples, why, f"use less than {length}")
        return
    longest = length - optim.lr_warmup_samples
    if optim.lr_decay != "wsd":
        return
    if optim.lr_wsd_decay_samples is None:
        why = "wsd needs the length of its final decay"
        yield Problem("--lr-decay", "wsd", why, f"give --lr-wsd-decay-samples, e.g. {max(1, length // 10)}")
    elif optim.lr_wsd_decay_samples > longest:
        why = f"after the warm-up only {longest} samples are left"
        yield Problem("--lr-wsd-decay-samples", optim.lr_wsd_decay_samples, why, f"use {longest} or less")


def _fp8(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Every size that a linear of a block multiplies over, on one rank."""
    if config.train.precision != "fp8":
        return
    tp, shape = config.parallel.tensor, model_shape(config.model)
    micro_batch = math.gcd(*micro_batches_of(config.train, 1))  # if this fits, each of them does
    sizes = {
        "hidden_size": shape.hidden_size,
        "ffn_size / tp": shape.ffn_size // tp,
        "num_heads x head_dim / tp": shape.attention_size // tp,
        "num_kv_heads x head_dim / tp": shape.kv_size // tp,
        "micro_batch x seq_len / cp": micro_batch * shape.seq_len // config.parallel.context,
    }
    bad = [f"{name} {size}" for name, size in sizes.items() if size % FP8_MULTIPLE]
    if bad:
        why = f"{_listed(bad, 'and')} {'is no multiple' if len(bad) == 1 else 'are no multiples'} of {FP8_MULTIPLE}"
        yield Problem("--precision", "fp8", why, "change the sizes, or use bf16")


_LAYOUT = "parallel.tensor parallel.context parallel.pipeline parallel.data"
_STAGES = (
    "parallel.pipeline parallel.schedule parallel.chunks parallel.stage_layers parallel.pipeline_layout "
    "model.num_layers"
)
_MICRO_BATCH = "train.micro_batch train.micro_batch_per_dp"
_BATCH = f"train.global_batch {_MICRO_BATCH}"
_SHAPE = "model.num_heads model.num_kv_heads model.hidden_size model.head_dim"
_PATHS = "data.path data.train_path data.valid_path data.phases"
_WIDTHS = "model.ffn_size model.ffn_multiple_of model.ffn_multiplier model.vocab_size model.vocab_multiple"

RULES: Mapping[Rule, str] = {  # each rule and the settings it reads
    _heads: _SHAPE,
    _tensor: f"{_LAYOUT} {_SHAPE} {_WIDTHS} parallel.sequence",
    check_family: "model.position_embedding data.reset_position_ids data.reset_attention_mask",
    _pipeline: _STAGES,
    _world: f"{_LAYOUT} parallel.elastic {_SHAPE} {_WIDTHS} model.num_layers parallel.schedule parallel.chunks "
    "parallel.context_method",
    check_micro_batches: f"{_LAYOUT} {_MICRO_BATCH} parallel.elastic",
    _batch: f"{_LAYOUT} {_BATCH} parallel.elastic parallel.zero_group",
    check_elastic: f"{_LAYOUT} {_BATCH} train.rampup_batch parallel.elastic parallel.zero_group",
    check_zero_group: f"{_LAYOUT} parallel.elastic parallel.zero_group",
    _ramp: f"{_LAYOUT} {_BATCH} train.rampup_batch train.train_samples parallel.zero_group",
    check_sequence: "parallel.context parallel.context_method parallel.sequence parallel.tensor model.seq_len",
    check_context_heads: f"{_SHAPE} {_WIDTHS} parallel.context parallel.context_method parallel.tensor",
    _learning_rate: "optim.lr optim.min_lr optim.lr_decay optim.lr_decay_samples optim.lr_warmup_samples "
    "optim.lr_wsd_decay_samples train.train_samples",
    check_precision: "train.precision train.device",
    _fp8: f"{_SHAPE} {_WIDTHS} {_BATCH} model.seq_len parallel.tensor parallel.context train.precision",
    check_grad_reduce: "parallel.grad_reduce train.precision",
    check_reduced_in_groups: "parallel.grad_reduce parallel.zero_group parallel.deterministic_reduce",
    check_optimizer_storage: "optim.optimizer optim.moments_dtype optim.master_weights optim.beta1 optim.beta2 "
    "train.precision",
    check_loss_scale: "train.precision optim.loss_scale optim.initial_loss_scale optim.min_loss_scale",
    check_rope: "model.rope_scaling model.rope_factor model.rope_trained_len model.position_embedding",
    check_two_range: "model.rope_scaling data.reset_position_ids data.reset_attention_mask",
    check_profile: f"{_BATCH} train.rampup_batch train.train_samples observe.profile_steps observe.profile_ranks "
    "observe.log_dir checkpoint.save",
    check_recompute: f"{_STAGES} train.recompute train.recompute_method train.recompute_layers train.recompute_modules "
    "train.recompute_granularity_per_stage train.recompute_method_per_stage train.recompute_layers_per_stage",
    check_offload_activations: f"{_STAGES} train.offload_activations",
    check_recompute_per_stage: f"{_STAGES} {_LAYOUT} {_BATCH} train.recompute_granularity_per_stage "
    "train.recompute_method_per_stage train.recompute_layers_per_stage",
    check_cuda_graph: "train.cuda_graph train.device parallel.pipeline parallel.zero optim.offload_optimizer "
    "train.offload_activations data.reset_attention_mask model.position_embedding",
    check_skips: "train.skip_samples train.train_samples",
    check_faults: "train.on_nonfinite train.on_spike train.spike_window checkpoint.save",
    check_data_path: f"{_PATHS} data.test_path",
    check_paths: f"{_PATHS} data.test_path data.split",
    check_phases: "data.phases train.train_samples",
    check_max_epochs: f"{_PATHS} data.max_epochs_per_source",
    check_valid_sets: f"{_PATHS} data.valid_sets data.valid_samples",
    check_split: "data.split",
    check_documents: "data.reset_position_ids data.reset_attention_mask data.eod_mask_loss data.eod_token_id "
    "data.vocab_file data.merge_file data.special_tokens_file data.tokenizer_model model.vocab_size",
    check_start: "checkpoint.load checkpoint.init_from_hf checkpoint.resume checkpoint.save checkpoint.load_optim "
    "checkpoint.override_lr_schedule checkpoint.override_data checkpoint.override_rope",
    check_retention: "checkpoint.keep checkpoint.keep_every",
    check_ephemeral: "checkpoint.ephemeral_save_interval checkpoint.ephemeral_save_dir checkpoint.save "
    "checkpoint.save_interval",
    check_exports: "checkpoint.export_hf_every checkpoint.save checkpoint.save_interval",
}


def _split_sizes(shape: ModelShape) -> dict[str, int]:
    """What the tensor degree splits, by name."""
    return {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "ffn_size": shape.ffn_size,
        "padded_vocab_size": shape.padded_vocab_size,
    }


def _tensor_degrees(shape: ModelShape, world: int | None) -> list[int]:
    """The tensor degrees that divide everything, the world included where it is known."""
    return _divisors(math.gcd(*_split_sizes(shape).values(), *([] if world is None else [world])))


def _batch_unit(config: RunConfig, world: int | None) -> tuple[int, str]:
    """Samples of one microbatch on every replica, and how that comes about in words.

    A world that the layout does not divide is another rule's problem; here, as before the world is known, dp counts
    as given, or as 1.
    """
    train, dp = config.train, 1 if config.parallel.elastic else known_replicas(config)
    if world is not None and world % model_ranks(config) == 0:
        dp = world // model_ranks(config)
    unit = sum(micro_batches_of(train, dp))
    if train.micro_batch_per_dp:
        return unit, f"{unit}, what micro_batch_per_dp adds up to"
    return unit, f"micro_batch {train.micro_batch} x dp {dp} = {unit}"


def _product(config: RunConfig) -> tuple[str, str]:
    """The degrees above 1 as flags, and as ``tp 3 x pp 7 = 21`` (one alone as ``3``)."""
    layout = config.parallel
    degrees = {"tp": layout.tensor, "cp": layout.context, "pp": layout.pipeline}
    used = {name: degree for name, degree in degrees.items() if degree > 1}
    flags = " ".join(f"--{name} {degree}" for name, degree in used.items())
    factors = [f"{name} {degree}" for name, degree in used.items()]
    return flags, f"{' x '.join(factors)} = {model_ranks(config)}" if len(factors) > 1 else f"{model_ranks(config)}"


def _layouts(config: RunConfig, world: int) -> str:
    """The layouts nearest to the one asked for that this model and world allow with its cp, as advice."""
    layout, shape = config.parallel, model_shape(config.model)
    chunks = FIXED_CHUNKS.get(layout.schedule, 1 if layout.chunks is None else layout.chunks)
    cp, without = (layout.context, "") if world % layout.context == 0 else (1, " --cp 1")
    works = [
        (tp, pp)
        for tp in _tensor_degrees(shape, world // cp)
        for pp in range(1, min(shape.num_layers // chunks, world // (tp * cp)) + 1)
        if world % (tp * cp * pp) == 0 and (layout.context_method == "ring" or shape.num_heads % (tp * cp) == 0)
    ]
    works.sort(key=lambda at: abs(math.log(at[0] / layout.tensor)) + abs(math.log(at[1] / layout.pipeline)))
    nearest = [f"--tp {tp} --pp {pp}{without}" for tp, pp in sorted(works[:6])]
    return f"use {_listed(nearest)}, or start a multiple of {model_ranks(config)} processes"


def _range(last: int) -> str:
    return "1" if last == 1 else f"1 to {last}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _near(values: list[int], wanted: int, count: int = 6) -> list[int]:
    """The ``count`` values nearest to ``wanted``, ascending."""
    return sorted(sorted(values, key=lambda value: abs(value - wanted))[:count])


def _multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, as advice."""
    below = value // unit * unit
    return _listed(multiple for multiple in (below, below + unit) if multiple > 0)


def _listed(values: Iterable[object], join: str = "or") -> str:
    """``1, 2 or 4``."""
    *head, last = [str(value) for value in values]
    return f"{', '.join(head)} {join} {last}" if head else last
