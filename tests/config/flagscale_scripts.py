"""The flags of FlagScale's three published pretraining scripts, in full: tags v0.1 and v0.2 (the 70B: v0.2).

``LATER`` holds the names that later versions of the same scripts use.
"""

_TOKENIZER = """
    --tokenizer-type AquilaTokenizer --vocab-file tokenizer/vocab.json --vocab-size 100008
    --merge-file tokenizer/merges.txt --special-tokens-file tokenizer/special_tokens.txt
    --data-path corpus_text_document --data-impl mmap --split 1
"""
_NETWORK = """
    --disable-bias-linear --use-flash-attn --use-distributed-optimizer --use-rotary-position-embeddings
    --rotary-position-embeddings-in-fp32 --no-position-embedding --swiglu --apply-layernorm-rms
    --untie-embeddings-and-output-weights --attention-softmax-in-fp32 --embedding-weights-in-fp32
    --accumulate-allreduce-grads-in-fp32 --attention-dropout 0.0 --hidden-dropout 0.0
"""
_OPTIMIZER = "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --lr-decay-style cosine"
_OUTPUT = """
    --save checkpoints --load checkpoints --log-interval 1 --tensorboard-dir tboard --tensorboard-log-interval 1
    --wandb-dir wandb
"""
_COMMON = f"{_TOKENIZER} {_NETWORK} {_OPTIMIZER} {_OUTPUT}"
_LARGE = f"""{_COMMON}
    --train-samples 488281250 --eval-iters 0 --eval-interval 2000 --pipeline-model-parallel-size 4 --sequence-parallel
    --make-vocab-size-divisible-by 64 --bf16 --group-query-attention --num-query-groups 8 --hidden-dim-multiplier 1.3
    --multiple-of 4096 --seq-length 4096 --max-position-embeddings 4096 --layernorm-epsilon 1e-5 --seed 42
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-warmup-samples 500000 --rampup-save-interval 5000
"""

SCRIPT_7B = f"""{_COMMON}
    --train-samples 1002539063 --eval-iters 0 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
    --micro-batch-size 2 --global-batch-size 1728 --fp16 --initial-loss-scale 522893 --min-loss-scale 1.0
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 2048 --max-position-embeddings 2048
    --layernorm-epsilon 1e-5 --multiple-of 256 --rotary-interleaved-patch --init-method-std 0.02 --seed 1234
    --lr 2.0e-5 --min-lr 2.0e-6 --lr-warmup-samples 3076172 --save-interval 2000
""".split()

SCRIPT_34B = f"""{_LARGE}
    --rampup-batch-size 32 32 2000000 --tensor-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 1024
    --num-layers 60 --hidden-size 6144 --num-attention-heads 48 --layernorm-init-weight 0.3 --init-method-std 0.0165
    --save-interval 1000
""".split()

SCRIPT_70B = f"""{_LARGE}
    --rampup-batch-size 48 48 2000000 --tensor-model-parallel-size 8 --micro-batch-size 2 --global-batch-size 1056
    --num-layers 80 --hidden-size 8192 --num-attention-heads 64 --layernorm-init-weight 0.25 --init-method-std 0.0149
    --save-interval 500
""".split()

LATER = {
    "--layernorm-epsilon": ["--norm-epsilon"],
    "--layernorm-init-weight": ["--norm-init-weight"],
    "--apply-layernorm-rms": ["--normalization", "RMSNorm"],
    "--wandb-dir": ["--wandb-save-dir"],
}

# Every flag that FlagScale v0.1 to v0.3 adds to Megatron-LM, apart from those in the scripts.
ADDED_FLAGS = """
    --rampup-save-interval --format-ckpt --save-param-index-maps-only --no-global-file-system --num-devices-per-node
    --return-doc-ids --data-searching-save --data-searching-range --finetune-dataset-type --apply-init-customized
    --init-method-std-scaled-embed --init-method-std-scaled-attn-q --init-method-std-scaled-attn-k
    --init-method-std-scaled-attn-v --init-method-std-scaled-ffn-w1 --init-method-std-scaled-ffn-w2
    --init-method-std-scaled-ffn-w3 --init-method-std-scaled-output --apply-init-norm-customized
    --init-weight-attn-norm --init-weight-ffn-norm --init-weight-output-norm --mup --mup-attn-multiplier
    --mup-output-multiplier --query-zero-init --readout-zero-init --mup-coord-check --mup-save
    --mup-delta-hidden-size --adan-beta1 --adan-beta2 --adan-beta3 --adan-eps --server-port --model-info
    --hetero-mode --hetero-device-types --hetero-current-device-type --hetero-micro-batch-sizes
    --hetero-pipeline-stages --memory-saving --findmax-opt --recompute-granularity-per-stage
    --recompute-method-per-stage --recompute-num-layers-per-stage
""".split()  # noqa: SIM905 -- fifty flags read better as words
