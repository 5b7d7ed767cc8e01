"""Every setting of a run: its type, default, help and spellings stand on the field, nowhere else."""

# ruff: noqa: RUF009 -- setting() makes a dataclass field

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from megatron_aquila.config.fields import Count, NotNegative, Positive, Whole, setting
from megatron_aquila.config.observe import ObserveConfig
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.plan.recompute import Kind, Method
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import NormOrder, PositionEmbedding, Precision, RopeScaling
from megatron_aquila.plan.stages import ScheduleName

ZeroLevel = Annotated[int, Ge(1), Le(3)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. ``None`` means: derived from the others."""

    num_layers: Count = setting(32, "transformer layers")
    hidden_size: Count = setting(4096, "width of the residual stream")
    num_heads: Count = setting(32, "query heads", "--num-heads", "--num-attention-heads")
    num_kv_heads: Count | None = setting(
        None, "key/value heads; default num_heads", "--num-kv-heads", "--num-query-groups"
    )
    head_dim: Count | None = setting(
        None, "width of one head; default hidden_size / num_heads", "--head-dim", "--kv-channels"
    )
    ffn_size: Count | None = setting(
        None, "width of the MLP; default the Llama rule with the two below", "--ffn-size", "--ffn-hidden-size"
    )
    ffn_multiple_of: Count = setting(
        256, "the MLP's width is rounded up to a multiple of this", "--ffn-multiple-of", "--multiple-of"
    )
    ffn_multiplier: Positive | None = setting(
        None, "factor on the MLP's width before rounding", "--ffn-multiplier", "--hidden-dim-multiplier"
    )
    vocab_size: Count = setting(100008, "tokens of the tokenizer, special ones included")
    vocab_multiple: Count = setting(
        128, "the embedding gets rows up to a multiple of this; whatever tp is, unlike Megatron's setting"
    )
    seq_len: Count = setting(2048, "tokens of a sample", "--seq-len", "--seq-length")
    norm_eps: Positive = setting(1e-5, "epsilon of RMSNorm", "--norm-eps", "--norm-epsilon", "--layernorm-epsilon")
    norm_init: float = setting(
        1.0, "initial weight of every RMSNorm", "--norm-init", "--layernorm-init-weight", "--norm-init-weight"
    )
    norm_order: NormOrder = setting("aquila", "where RMSNorm casts: aquila after the weight, llama before it")
    init_std: Positive = setting(0.02, "standard deviation of the initial weights", "--init-std", "--init-method-std")
    rope_base: Positive = setting(10000.0, "base of the rotary frequencies", "--rope-base", "--rotary-base")
    rope_scaling: RopeScaling = setting(
        "none", "how rotary positions reach beyond the lengths that the weights were trained on"
    )
    rope_factor: Annotated[float, Ge(1), Lt(math.inf)] = setting(1.0, "rope_scaling: how many times longer")
    rope_trained_len: Count | None = setting(
        None,
        "rope_scaling yarn, llama3: tokens of a sample before; two-range: the near ones; default seq_len / rope_factor",
    )
    position_embedding: PositionEmbedding = setting(
        "rope",
        "rope turns pairs half a head apart, rope-interleaved neighbours; alibi turns none and lowers far scores",
        "--position-embedding",
        "--position-embedding-type",
    )
    score_clamp: Positive | None = setting(
        None, "attention's scaled scores are held within plus and minus this, as in the Aquila of 2023"
    )
    norm_head: bool = setting(False, "every row of the head is used at length 1, as in Baichuan2")
    max_z_loss: NotNegative = setting(
        0.0, "in training a token's loss grows by this times its largest logit squared; logged apart"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is split over the ranks; ``dp`` is what remains of the world."""

    tensor: Count = setting(1, "tensor-parallel degree", "--tp", "--tensor-model-parallel-size")
    pipeline: Count = setting(1, "pipeline-parallel degree", "--pp", "--pipeline-model-parallel-size")
    context: Count = setting(1, "context-parallel degree: ranks that share a sample", "--cp", "--context-parallel-size")
    context_method: ContextMethod = setting(
        "ring", "ring attention (K/V sent peer to peer), or ulysses (all-to-all over heads)", "--cp-method"
    )
    data: Count | None = setting(None, "data-parallel degree; default what the world size leaves", "--dp")
    sequence: bool = setting(
        False, "split norms and residuals along the sequence over tp", "--sp", "--sequence-parallel"
    )
    schedule: ScheduleName = setting("1f1b", "pipeline schedule; 1f1b with several chunks is interleaved", "--schedule")
    chunks: Count | None = setting(
        None,
        "pipeline stages on each rank; default 1, with zb-v 2, or what pipeline_layout has",
        "--chunks",
        "--num-virtual-stages-per-pipeline-rank",
    )
    stage_layers: tuple[Whole, ...] | None = setting(
        None, "layers of each of the pp x chunks stages, e.g. 15 16 16 13; default balanced with the head counted"
    )
    pipeline_layout: str | None = setting(
        None,
        "the stages in Megatron-LM's words, e.g. Et*15|t*16|t*16|t*13L: E the embedding, t a layer, L the head",
        "--pipeline-layout",
        "--pipeline-model-parallel-layout",
    )
    bucket_mib: Positive = setting(128.0, "gradients are reduced in buckets of about this many MiB")
    overlap: bool = setting(
        True, "communicate beside computation where neither needs the other; changes no bit", "--overlap"
    )
    zero: ZeroLevel = setting(
        1,
        "ZeRO stage: shard over the replicas 1 masters and optimizer states, 2 + gradients, 3 + weights (as FSDP)",
        "--zero",
        "--zero-stage",
    )
    zero_group: Count | None = setting(
        None,
        "hybrid sharding (HSDP): --zero within groups of N neighbouring dp x cp ranks, replicas across; default all",
    )
    grad_reduce: Literal["fp32", "bf16"] = setting(
        "fp32",
        "what gradients travel in between replicas: the type they are summed up in, fp32 or wider, or bf16; between "
        "--zero-group's groups only deterministic ones in bf16",
    )
    deterministic_reduce: bool = setting(
        False, "sum gradients over replicas in the order of ranks, whatever the buckets; takes memory and time"
    )
    fuse_main_grads: bool = setting(
        True,
        "linears add their weight gradients to the fp32 sums within the product, unrounded",
        "--fuse-main-grads",
        "--gradient-accumulation-fusion",
    )
    timeout_minutes: Positive = setting(
        10.0, "a collective that takes longer ends the run", "--timeout-minutes", "--distributed-timeout-minutes"
    )
    elastic: bool = setting(
        False, "dp follows the world that is there, also where --dp says otherwise; the global batch stays"
    )


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A blend that the run reads from a number of samples on; in a file ``{from_samples: 1000, path: [a, b]}``."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    from_samples: Count
    path: tuple[str, ...]

    def __str__(self) -> str:
        return f'"{self.from_samples} {" ".join(self.path)}"'


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    path: tuple[str, ...] = setting(
        (),
        "prefixes of .bin/.idx pairs: one, weight prefix weight prefix ..., or several, read once; needed to train",
        "--data-path",
    )
    split: str = setting("99,1,0", "documents for train, valid and test, as ratios", "--split")
    train_path: tuple[str, ...] = setting(
        (), "data to train on, all of it, in place of data.path and split", "--train-data-path"
    )
    valid_path: tuple[str, ...] = setting(
        (), "validation data of its own, as --data-path; that is then all for training", "--valid-data-path"
    )
    test_path: tuple[str, ...] = setting(
        (), "data kept for a test: never read, and refused where it is trained on", "--test-data-path"
    )
    phases: tuple[Phase, ...] = setting(
        (), 'later blends, each as one word: "SAMPLES BLEND", read from that many samples of the run on'
    )
    max_epochs_per_source: tuple[str, ...] = setting(
        (), "how often a data set may be read: a number for all, or PREFIX=NUMBER for one; default no limit"
    )
    valid_sets: tuple[str, ...] = setting(
        (), "data sets validated by themselves and logged under their names: NAME=PREFIX ..."
    )
    valid_samples: Count | None = setting(
        None, "samples of each of valid_sets, as far as it has them; default eval_iters global batches"
    )
    drop_last_partial_validation_sequence: bool = setting(
        True, "what validation data has left after its last whole sample is not read, else filled up and read"
    )
    verify_data: bool = setting(
        False, "hash every byte that the run reads before its first step, against the manifests; else sizes are checked"
    )
    cache_path: Path | None = setting(None, "folder of the built indices; default beside the data", "--data-cache-path")
    tokenizer_type: Literal["AquilaTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"] = setting(
        "AquilaTokenizer", "how text became tokens; written into checkpoints and exports", "--tokenizer-type"
    )
    vocab_file: Path | None = setting(None, "vocab.json", "--vocab-file")
    merge_file: Path | None = setting(None, "merges.txt", "--merge-file")
    special_tokens_file: Path | None = setting(None, "special_tokens.txt", "--special-tokens-file")
    tokenizer_model: Path | None = setting(
        None, "tokenizer.json, or a SentencePiece .model, instead of the three files", "--tokenizer-model"
    )
    reset_position_ids: bool = setting(False, "positions count from 0 again in every document of a sample")
    reset_attention_mask: bool = setting(False, "no token attends to an earlier document of its sample")
    eod_mask_loss: bool = setting(False, "the token after the end of a document does not count in the loss")
    eod_token_id: Whole | None = setting(
        None, "the token that ends a document, for the three switches above; default the tokenizer's"
    )
    prefetch: Whole = setting(2, "steps of batches read ahead", "--prefetch", "--num-workers")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The batch, the length of the run and when it ends."""

    train_samples: Count = setting(1_000_000, "samples of the whole run")
    micro_batch: Count = setting(1, "samples of a forward and backward", "--micro-batch", "--mbs", "--micro-batch-size")
    micro_batch_per_dp: tuple[Count, ...] = setting(
        (), "instead, samples that each replica computes at once, a number a dp rank, e.g. 2 2 1 1"
    )
    global_batch: Count = setting(
        1,
        "samples of a step; gradients accumulate over its microbatches",
        "--global-batch",
        "--gbs",
        "--global-batch-size",
    )
    rampup_batch: tuple[Count, Count, Whole] | None = setting(
        None, "start increment samples: the global batch grows from start", "--rampup-batch", "--rampup-batch-size"
    )
    precision: Precision = setting(
        "bf16",
        "type of the weights and activations; bf16 and fp16 keep fp32 masters. fp8: as bf16, but the blocks' linears "
        "multiply in 8 bits; attention and head stay in bf16",
    )
    loss_chunk_tokens: Whole | None = setting(
        None,
        "tokens whose logits exist at once; default as many as 1 GiB holds; 0 all, kept from forward to backward",
    )
    recompute: Kind = setting(
        "none",
        "activation checkpointing: backward computes again nothing, the outputs of some modules, or whole layers",
        "--recompute",
        "--recompute-granularity",
    )
    recompute_modules: tuple[str, ...] = setting(
        ("norms", "swiglu"), "selective: what is recomputed, of norms, swiglu and attention", "--recompute-modules"
    )
    recompute_method: Method = setting(
        "uniform", "full: all layers in groups, or each of the first layers of a stage", "--recompute-method"
    )
    recompute_layers: Count = setting(
        1,
        "full: layers of a group (uniform), or layers of a stage that are recomputed (block)",
        "--recompute-layers",
        "--recompute-num-layers",
    )
    recompute_granularity_per_stage: tuple[str, ...] = setting(
        (),
        "full, on or off by stage and microbatch: 1 or 0, in FlagScale's notation, e.g. 3 1 1 0",
        "--recompute-granularity-per-stage",
        "--recompute-granularity-per-stage-micro-batch",
    )
    recompute_method_per_stage: tuple[str, ...] = setting(
        (),
        "full, the method by stage and microbatch: 0 uniform, 1 block",
        "--recompute-method-per-stage",
        "--recompute-method-per-stage-micro-batch",
    )
    recompute_layers_per_stage: tuple[str, ...] = setting(
        (),
        "full, the layers by stage and microbatch; 0 recomputes none",
        "--recompute-layers-per-stage",
        "--recompute-num-layers-per-stage",
        "--recompute-num-layers-per-stage-micro-batch",
    )
    offload_activations: Whole = setting(
        0,
        "layers of each stage, or groups recomputed together, whose activations wait for backward in the host's memory",
        "--offload-activations",
        "--cpu-offloading-num-layers",
    )
    eval_interval: Whole = setting(1000, "steps between validations; 0 means none")
    eval_iters: Whole = setting(10, "global batches of one validation")
    exit_samples: Count | None = setting(None, "save and stop once this many samples were consumed")
    exit_minutes: Positive | None = setting(
        None, "save and stop after this many minutes", "--exit-minutes", "--exit-duration-in-mins"
    )
    stop_file: Path | None = setting(
        None, "save and stop once this file is there; it is removed then; default stop in the save folder"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute", "--device")
    distributed_backend: Literal["nccl", "gloo"] = setting(
        "nccl",
        "between GPUs: nccl, or gloo through the host's memory, slow, for processes that share a GPU; CPUs take gloo",
        "--distributed-backend",
    )
    kernels: tuple[str, ...] = setting(
        (), "kernels chosen by hand, e.g. attention=sdpa_cudnn rms_norm=torch", "--kernels"
    )
    cuda_graph: bool = setting(
        False,
        "launch forward, backward and reduction of a step as one CUDA graph: for models too small to keep a GPU busy",
        "--cuda-graph",
        "--enable-cuda-graph",
    )
    gc_interval: Whole = setting(
        50,
        "steps between collections of Python's garbage, after the same ones on all ranks; 0: whenever Python does",
        "--gc-interval",
        "--manual-gc-interval",
    )
    check_replicas: Whole = setting(
        0, "steps between checks, by checksums, that replicas are bit-equal and weights their masters; 0 means never"
    )
    skip_samples: tuple[str, ...] = setting(
        (), "samples of the run that are never trained on: FIRST-LAST ..., both included; they count as consumed"
    )
    on_nonfinite: Literal["skip", "stop", "rewind"] = setting(
        "skip",
        "when loss or gradients are not finite: skip the update, save and stop, or go back to the last checkpoint and "
        "leave the step's samples out",
    )
    on_spike: Literal["warn", "skip", "stop", "rewind"] = setting(
        "warn", "when loss or gradient norm is a spike: say so, or as on_nonfinite; all but warn refuse the update"
    )
    spike_window: Whole = setting(128, "steps that tell what is a spike; 0: nothing is")
    spike_threshold: Positive = setting(
        10.0, "a spike is this many robust standard deviations above the median of the window"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. Frozen: what follows from them is computed by ``config.derive``, never written back."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    seed: Whole = setting(1234, "seed of the weights and of the data order")
