"""Flags of Megatron-LM and FlagScale that are no settings here: what each means, or what to use instead.

One table serves the command line (``config.migrate``) and ``docs/from-megatron.md``. Flags that are settings under
their Megatron spelling (``--tensor-model-parallel-size``) are aliases in the schema and need no row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_aquila.config.megatron_values import (
    Values,
    bucket_mib,
    chunks,
    in_samples,
    micro_batch_per_dp,
    profile_first,
    profile_last,
    stage_layers,
    step_folder,
    vocab_multiple,
    warmup_samples,
    zero_group,
    zero_level,
)
from megatron_aquila.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Sets:
    """The flag is this value of our setting."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Always:
    """Accepted: it is always so here, ``why`` says how, or how far. A flag with a value must have one of ``values``."""

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


def _family(meaning: Meaning, flags: str) -> dict[str, Meaning]:
    """The same meaning for several flags."""
    return dict.fromkeys(flags.split(), meaning)


_INIT = Refused("one standard deviation and one norm weight serve the whole model", "use --init-std and --norm-init")
_MUP = Refused("muP is not offered", "use --init-std and --lr")
_DEVICE_TYPES = Refused(
    "stages and replicas are uneven by their numbers, whatever their devices are called",
    "leave it out, and start the nodes in the order of the ranks: docs/heterogeneous.md has it",
)
_ADAN = Refused("Adan is not offered", "use --optimizer adamw")
_SEARCH = Refused(
    "is not offered",
    "leave it out: a sample follows from seed, length, blend and split, so the log's consumed samples name it",
)
_SPEED = Refused("changes speed only and is not offered", "leave it out")
_MOE = Refused("mixtures of experts are not offered", "leave it out: every MLP is dense")
_FSDP = Refused("gradients and weights are sharded by the same optimizer", "use --zero 3")
_BALANCE = Refused(
    "stages are balanced with the head counted, or given by their layers",
    "leave it out, or use --stage-layers or --pipeline-layout",
)
_NOT_LOGGED = Refused("is not logged", "leave it out: docs/running.md has what is")
_XPU = Refused("belongs to Kunlun XPU, which is not offered", "leave it out")
_SERVE = Refused("serving is not offered", "use aquila convert and a server of Hugging Face models")
_RMS_NORM = "every norm is an RMSNorm without bias"
_FUSED = "kernels are chosen by device and dtype, and logged at start; there are no biases and no dropout to fuse"
_OVERLAP = "collectives run beside computation; --no-overlap switches that off"
_ONE_MODEL = "there is one implementation of the model"
_LOGGED = "it is in every row of the log and goes to every writer"

MIGRATIONS: Mapping[str, Meaning] = MappingProxyType(
    {
        # Precision
        "--bf16": Sets("train.precision", "bf16"),
        "--fp32": Sets("train.precision", "fp32"),
        "--fp16": Sets("train.precision", "fp16"),
        "--attention-softmax-in-fp32": Always("softmax is computed in fp32 or wider"),
        "--accumulate-allreduce-grads-in-fp32": Sets("parallel.grad_reduce", "fp32"),
        "--rotary-position-embeddings-in-fp32": Always(
            "angles are computed in fp32 or wider (FlagScale's own flag was passed as an offset and had no such effect)"
        ),
        "--embedding-weights-in-fp32": Refused(
            "the embedding is as narrow as every other weight and has an fp32 master, as they have", "leave it out"
        ),
        "--apply-query-key-layer-scaling": Refused("softmax is computed in fp32 or wider as it is", "leave it out"),
        "--no-query-key-layer-scaling": Always("attention's scores are not scaled by the layer"),
        "--fp32-residual-connection": Refused(
            "the residual stream is as wide as the activations", "use --precision fp32"
        ),
        "--grad-reduce-in-bf16": Sets("parallel.grad_reduce", "bf16"),
        "--fp8-hybrid": Sets("train.precision", "fp8"),
        **_family(Refused("it is e4m3 forward and e5m2 backward", "use --precision fp8"), "--fp8-format --fp8-e4m3"),
        "--fp8-margin": Refused("scales follow each tensor's largest value at once", "leave it out"),
        "--optimizer-cpu-offload": Refused("it says not how much", "use --offload-optimizer 1, or the fraction alone"),
        "--use-torch-optimizer-for-cpu-offload": Always(
            "the host beside a GPU updates with our C++ kernel, or torch's operations"
        ),
        "--overlap-cpu-optimizer-d2h-h2d": Always("copies to and from the host run beside updates"),
        "--fine-grained-activation-offloading": Refused("whole layers are offloaded", "use --offload-activations"),
        "--use-precision-aware-optimizer": Always("each of the optimizer's states has its own type: --moments-dtype"),
        "--main-params-dtype": Always("masters are fp32; --master-weights says how they are kept", ("fp32",)),
        "--main-grads-dtype": Always("gradients are summed in fp32 or wider", ("fp32",)),
        **_family(Follows("optim.moments_dtype"), "--exp-avg-dtype --exp-avg-sq-dtype"),
        # The network
        "--use-mcore-models": Always(_ONE_MODEL),
        "--use-legacy-models": Always(_ONE_MODEL),
        "--transformer-impl": Always("layers are the package's own, without Transformer Engine", ("local",)),
        "--attention-backend": Always("the fastest attention at hand is chosen, and logged at start", ("auto",)),
        "--swiglu": Always("the MLP is gated by SiLU"),
        "--disable-bias-linear": Always("no linear layer has a bias"),
        "--untie-embeddings-and-output-weights": Always("the head has its own weight"),
        "--apply-layernorm-rms": Always(_RMS_NORM),
        "--normalization": Always(_RMS_NORM, ("RMSNorm",)),
        "--use-rotary-position-embeddings": Always("positions are rotary unless --position-embedding says alibi"),
        "--no-position-embedding": Always("there is no learned position"),
        "--rotary-percent": Always("all of a head is rotated", ("1.0",)),
        "--max-position-embeddings": Follows("model.seq_len"),
        **_family(
            Refused("how positions are stretched has one name", "use --rope-scaling with --rope-factor"),
            "--use-rope-scaling --rope-scaling-factor --rotary-seq-len-interpolation-factor",
        ),
        "--rotary-interleaved": Sets("model.position_embedding", "rope-interleaved"),
        **_family(Refused("the MLP is gated by SiLU", "use --swiglu"), "--squared-relu --openai-gelu"),
        "--add-qkv-bias": Refused("no linear layer has a bias", "leave it out"),
        "--qk-layernorm": Refused("queries and keys are not normalized", "leave it out"),
        "--apply-layernorm-1p": Refused("a norm's weight is stored as it is", "leave it out: see --norm-init"),
        "--apply-residual-connection-post-layernorm": Refused("norms come before each block", "leave it out"),
        "--window-size": Refused("attention sees all that came before", "leave it out"),
        **_family(
            _MOE,
            "--num-experts --moe-router-topk --moe-router-load-balancing-type --moe-aux-loss-coeff "
            "--moe-grouped-gemm --moe-token-dispatcher-type",
        ),
        "--expert-model-parallel-size": Always("every MLP is dense", ("1",)),
        "--use-cpu-initialization": Always("initial weights are drawn on the CPU and depend on no layout"),
        "--init-method-xavier-uniform": Refused("initial weights are normal", "use --init-std"),
        "--group-query-attention": Always("follows from --num-kv-heads"),
        "--attention-dropout": Always("there is no dropout", ("0.0",)),
        "--hidden-dropout": Always("there is no dropout", ("0.0",)),
        "--make-vocab-size-divisible-by": Refused(
            "Megatron-LM multiplies it by tp, so the model would depend on the layout",
            "use --vocab-multiple with this number times tp",
            vocab_multiple,
        ),
        "--rotary-interleaved-patch": Refused(
            "its checkpoints have permuted rows, and are read into their true order",
            "leave it out, and start with --init-from-hf from the published weights or from aquila convert's",
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
        **_family(
            Always(_FUSED),
            "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
            "--no-rope-fusion --no-persist-layer-norm",
        ),
        **_family(
            _SPEED,
            "--empty-unused-memory-level --num-dataset-builder-threads --no-mmap-bin-files --align-grad-reduce "
            "--align-param-gather --use-ring-exchange-p2p --use-tp-pp-dp-mapping --nccl-communicator-config-path",
        ),
        "--manual-gc": Always("Python's garbage is collected every --gc-interval steps"),
        "--no-manual-gc-eval": Always("a validation waits for no collection, and leaves nothing to be collected"),
        "--cross-entropy-loss-fusion": Always("with the output projection, in chunks of --loss-chunk-tokens"),
        "--cross-entropy-fusion-impl": Always("the output projection is part of it", ("linear",)),
        "--no-async-tensor-model-parallel-allreduce": Always(
            "the bits are the same; --no-overlap switches this overlap off, with all others"
        ),
        "--cp-comm-type": Refused("it has other words", "use --cp-method ring for p2p, --cp-method ulysses for a2a"),
        "--no-overlap-p2p-communication": Refused("one switch serves all communication", "use --no-overlap"),
        "--ddp-bucket-size": Refused("buckets are given in MiB", "use --bucket-mib", bucket_mib),
        **_family(_FSDP, "--use-torch-fsdp2 --use-custom-fsdp --use-megatron-fsdp"),
        "--num-distributed-optimizer-instances": Refused(
            "groups are given by their size", "use --zero-group with dp x cp over the instances", zero_group
        ),
        "--data-parallel-sharding-strategy": Refused("levels are numbers", "use --zero 1, 2 or 3", zero_level),
        **_family(
            _BALANCE,
            "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
        ),
        "--deterministic-mode": Refused("equal bits are promised on the CPU, on CUDA not yet", "leave it out"),
        "--no-global-file-system": Always("a missing index is noticed and built on each node"),
        "--num-devices-per-node": Refused("torchrun says how many ranks a node has", "leave it out"),
        **_family(
            Always(_OVERLAP),
            "--overlap-grad-reduce --overlap-param-gather --overlap-param-gather-with-optimizer-step",
        ),
        "--tp-comm-overlap": Always(
            "in part: collectives run beside products in a column-parallel layer's backward; the others over tp are "
            "waited for"
        ),
        "--num-layers-per-virtual-pipeline-stage": Refused(
            "stages are counted, not their layers", "use --chunks, the stages on each rank", chunks
        ),
        "--cuda-graph-impl": Refused("there is one: a whole step", "use --cuda-graph, or leave it out for none"),
        "--cuda-graph-scope": Always("a step is recorded whole, but for its update", ("full_iteration",)),
        "--cuda-graph-warmup-steps": Always("the fourth step after a start is recorded", ("3",)),
        "--external-cuda-graph": Refused("there is one implementation", "use --cuda-graph"),
        "--recompute-activations": Sets("train.recompute", "selective"),
        "--checkpoint-activations": Refused("it is said in other words", "use --recompute full"),
        "--distribute-saved-activations": Refused(
            "what is kept of the residual stream is split over tp under --sp", "leave it out, or use --sp"
        ),
        "--hetero-mode": Always("stages and replicas may both be uneven, also at once", ("dp", "pp")),
        **_family(_DEVICE_TYPES, "--hetero-device-types --hetero-current-device-type"),
        "--hetero-micro-batch-sizes": Refused(
            "each replica has a number of its own", "use --micro-batch-per-dp without the counts", micro_batch_per_dp
        ),
        "--hetero-pipeline-stages": Refused(
            "stages are given by their layers alone", "use --stage-layers without the counts", stage_layers
        ),
        **_family(_XPU, "--memory-saving --findmax-opt"),
        # Length and learning rate
        "--train-iters": Refused("lengths are in samples", "use --train-samples", in_samples("--train-samples")),
        "--lr-warmup-iters": Refused(
            "lengths are in samples", "use --lr-warmup-samples", in_samples("--lr-warmup-samples")
        ),
        "--lr-decay-iters": Refused(
            "lengths are in samples", "use --lr-decay-samples", in_samples("--lr-decay-samples")
        ),
        "--lr-wsd-decay-iters": Refused(
            "lengths are in samples", "use --lr-wsd-decay-samples", in_samples("--lr-wsd-decay-samples")
        ),
        "--exit-interval": Refused("lengths are in samples", "use --exit-samples", in_samples("--exit-samples")),
        "--lr-warmup-init": Always("the warm-up starts from 0", ("0.0",)),
        "--start-weight-decay": Follows("optim.weight_decay"),
        "--end-weight-decay": Follows("optim.weight_decay"),
        "--weight-decay-incr-style": Always("weight decay is the same throughout", ("constant",)),
        "--sgd-momentum": Always("sgd has no momentum", ("0.0",)),
        "--decoupled-lr": Refused("one learning rate serves all weights", "use --lr"),
        "--calculate-per-token-loss": Always("the loss is the mean over the tokens of the step"),
        "--no-check-for-nan-in-loss-and-grad": Always(
            "a step whose gradient norm is not finite is left out and logged; the run goes on"
        ),
        "--check-for-nan-in-loss-and-grad": Refused(
            "a step whose gradient norm is not finite is left out and logged; the run goes on",
            "leave it out, and watch the log's field applied",
        ),
        "--exit-signal-handler": Always("SIGTERM ends the run before its next step, saved"),
        "--lr-warmup-fraction": Refused("lengths are in samples", "use --lr-warmup-samples", warmup_samples),
        **_family(_ADAN, "--adan-beta1 --adan-beta2 --adan-beta3 --adan-eps"),
        # Data
        "--data-impl": Always("indexed datasets are mapped into memory", ("mmap",)),
        "--dataloader-type": Always("samples are read in the order of the index", ("single",)),
        **_family(
            Refused(
                "a blend is written in the settings",
                "use --data-path, or --train-data-path and --valid-data-path, or data: in a file",
            ),
            "--data-args-path --per-split-data-args-path",
        ),
        "--multiple-validation-sets": Refused(
            "sets that are validated by themselves have names", "use --valid-sets NAME=PREFIX ... for --valid-data-path"
        ),
        "--full-validation": Refused(
            "held-out data is read for --eval-iters batches", "use --valid-sets, --valid-samples"
        ),
        "--phase-transition-iterations": Refused("phases have blends", 'use --phases "SAMPLES BLEND" ..., or a file'),
        "--mock-data": Refused("a run trains on files", "use --data-path: make quickstart builds a small corpus"),
        "--no-create-attention-mask-in-dataloader": Always("attention is causal; the loader makes no masks"),
        **_family(_SEARCH, "--return-doc-ids --data-searching-save --data-searching-range"),
        "--finetune-dataset-type": Refused("fine-tuning is not yet offered", "leave it out"),
        # Checkpoints and logs
        "--no-load-rng": Always(
            "nothing random is left after the weights and the data order, which follow from the seed"
        ),
        "--exit-on-missing-checkpoint": Always("a folder that --load names must hold a checkpoint"),
        "--no-save-rng": Always("no generator's state is saved: initial weights and data order follow from the seed"),
        "--no-save-optim": Refused(
            "a checkpoint always holds the optimizer", "leave it out: aquila convert writes the weights alone"
        ),
        "--finetune": Refused("a new run from weights alone is said in other words", "use --load with --no-load-optim"),
        "--pretrained-checkpoint": Refused(
            "a new run from weights alone is said in other words", "use --load with --no-load-optim"
        ),
        "--ckpt-step": Refused("a step is a folder", "use --load FOLDER/step_N, N in seven digits", step_folder),
        **_family(
            Refused("there is one format, which any layout loads", "leave it out"),
            "--ckpt-format --dist-ckpt-format --ckpt-convert-format --ckpt-fully-parallel-load",
        ),
        "--non-persistent-ckpt-type": Always("each rank's part lies on its node's own disk", ("local",)),
        "--non-persistent-local-ckpt-algo": Refused("each rank writes what it owns", "leave it out"),
        "--non-persistent-global-ckpt-dir": Refused("they lie on the nodes' own disks", "use --ephemeral-save-dir"),
        "--use-dist-ckpt": Always("any layout loads a checkpoint"),
        "--auto-detect-ckpt-format": Always("there is one format"),
        "--ckpt-fully-parallel-save": Always("each rank writes its share, spread over the replicas"),
        "--ckpt-assume-constant-structure": Always("checkpoints of any layout have the same structure"),
        **_family(
            Refused(
                "settings come from the command line, the file and the preset; a checkpoint that differs is refused",
                "leave it out",
            ),
            "--use-checkpoint-args --use-checkpoint-opt-param-scheduler",
        ),
        "--format-ckpt": Refused("a checkpoint holds the logical model", "use aquila convert"),
        "--save-param-index-maps-only": Refused("a checkpoint names every tensor", "leave it out: any layout loads it"),
        "--tensorboard-log-interval": Follows("observe.log_interval"),
        **_family(
            Always(_LOGGED),
            "--log-throughput --log-memory-to-tensorboard --log-batch-size-to-tensorboard "
            "--log-learning-rate-to-tensorboard --log-loss-scale-to-tensorboard",
        ),
        **_family(
            _NOT_LOGGED,
            "--log-params-norm --log-num-zeros-in-grad --log-timers-to-tensorboard --log-world-size-to-tensorboard "
            "--log-validation-ppl-to-tensorboard --log-progress --timing-log-option --tensorboard-queue-size",
        ),
        "--log-straggler": Always("slow ranks are looked for every --straggler-interval steps"),
        "--timing-log-level": Always("a step's time and its wait for data are logged", ("0",)),
        "--profile": Refused("the steps to profile are named", "use --profile-steps FIRST-LAST"),
        "--profile-step-start": Refused(
            "both steps are named in one flag, and both are profiled",
            "use --profile-steps FIRST-LAST, FIRST one more than here",
            profile_first,
        ),
        "--profile-step-end": Refused(
            "both steps are named in one flag, and both are profiled",
            "use --profile-steps FIRST-LAST, LAST as here",
            profile_last,
        ),
        "--use-pytorch-profiler": Always("--profile-steps writes a trace of torch's profiler"),
        "--wandb-entity": Refused("Weights & Biases reads it itself", "set WANDB_ENTITY in the environment"),
        # Serving
        **_family(_SERVE, "--server-port --model-info"),
    }
)


# Settings under Megatron's name, or in its place, that do not mean quite the same.
DIFFERENCES: Mapping[str, str] = MappingProxyType(
    {
        "--load": "the folder must hold a checkpoint, where Megatron-LM would start from random weights; a script that "
        "gives one folder to `--save` and `--load` gives it to `--save`, and `--resume`",
        "--test-data-path": "never read: a run does not end with a test. Validate on it under a name with "
        "`--valid-sets test=PREFIX`",
        "--data-path": "needed to train, or `--train-data-path`; names a data set once. A blend may be one quoted "
        "word, as `dist_start.sh` passes it",
        "--num-workers": "`--prefetch`, the steps that a thread of each rank reads ahead: no worker processes",
        "--optimizer": "`adamw` is what Megatron-LM calls `adam`; its `sgd` has momentum, ours has none",
        "--vocab-size": "special tokens included; it must be the tokenizer's own",
        "--recompute-granularity": "`selective` recomputes norms and SwiGLU, where Megatron-LM recomputes attention",
        "--recompute-modules": "Megatron-LM's `core_attn` is `attention`, its `layernorm` is `norms`; no linear is "
        "recomputed",
        "--recompute-granularity-per-stage": "stages count along the model, as FlagScale's: virtual rank times pp "
        "plus rank; both of its notations are read under both flags",
        "--override-opt-param-scheduler": "only with `--load` or `--resume`",
        "--manual-gc-interval": "50 unless given; 0 leaves it to Python, where Megatron-LM with `--manual-gc` never "
        "collects",
        "--wandb-dir": "alone, it switches Weights & Biases on, as FlagScale's does, under the project "
        "`megatron_aquila`; offline, as FlagScale's, unless `WANDB_MODE` is set",
    }
)
