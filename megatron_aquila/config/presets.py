"""The recipes as data: what differs from the defaults, each number with its source.

Sources. *7B*, *34B*, *70B*: FlagScale's published scripts, tags v0.1 and v0.2,
``examples/aquila/{7B,34B,70B}/pretrain_aquila_*_distributed_*.sh``. *v1*: FlagAI's ``Aquila-pretrain.yaml``, the
from-scratch run of the 7B's predecessor, and its ``config.json``. *Llama*: the network is
transformers' ``LlamaConfig`` as it comes, with the ``rms_norm_eps`` and context of Llama-2-13B's config.json, which
kingTLE/literary-alpaca2 has. *Atom*: the README of FlagAlpha/Llama2-Chinese. *Baichuan*: modeling_baichuan.py and
configuration_baichuan.py, which lie with the weights of both sizes. *paper*: how these were trained, by the Llama 2 and
Baichuan 2 papers (2023), from memory and not checked. Where none names a batch, 4 M tokens stand.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Preset = Mapping[str, Any]  # by dotted name, as in the schema

_COMMON = {  # the same in all three scripts
    "model.vocab_size": 100008,
    "model.norm_eps": 1e-5,
    "model.rope_base": 10000.0,  # hard-coded in FlagScale's rotary_pos_embedding.py
    "data.tokenizer_type": "AquilaTokenizer",
    "data.split": "1",  # everything trains
    "optim.optimizer": "adamw",
    "optim.lr_decay": "cosine",
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.eps": 1e-8,  # Megatron-LM's default
    "optim.weight_decay": 0.1,
    "optim.clip_grad": 1.0,
    "train.eval_iters": 0,
    "observe.log_interval": 1,
}

_7B = {  # 7B
    **_COMMON,
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.num_heads": 32,
    "model.ffn_multiple_of": 256,
    "model.vocab_multiple": 128,  # the script's default 128 at tp 1
    "model.seq_len": 2048,
    "model.init_std": 0.02,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "optim.lr": 2e-5,
    "optim.min_lr": 2e-6,
    "optim.lr_warmup_samples": 3_076_172,
    "train.train_samples": 1_002_539_063,  # 2.05 T tokens
    "train.micro_batch": 2,
    "train.global_batch": 1728,  # 9 microbatches on its 96 A800
    "checkpoint.save_interval": 2000,
    "seed": 1234,
}

_CONTINUE_7B = {  # 7B, all of it
    **_7B,
    "train.precision": "fp16",
    "optim.initial_loss_scale": 522893.0,  # as published: near 2^19 = 524288 and no power of two
    "optim.min_loss_scale": 1.0,
}

_SCRATCH_7B = {
    **_7B,
    "train.precision": "bf16",  # the 7B script asks to change its fp16 for a start from scratch
    "optim.lr": 3e-4,  # v1: lr 3.0e-4; the 7B script's 2e-5 continues a trained model
    "optim.min_lr": 3e-5,  # a tenth of the peak, as in all three scripts
}

_34B = {  # 34B
    **_COMMON,
    "model.num_layers": 60,
    "model.hidden_size": 6144,
    "model.num_heads": 48,
    "model.num_kv_heads": 8,
    "model.ffn_multiple_of": 4096,
    "model.ffn_multiplier": 1.3,
    "model.vocab_multiple": 256,  # 64 x tp 4
    "model.seq_len": 4096,
    "model.norm_init": 0.3,
    "model.init_std": 0.0165,
    "parallel.tensor": 4,
    "parallel.pipeline": 4,
    "parallel.sequence": True,
    "optim.lr": 1.5e-4,
    "optim.min_lr": 1.5e-5,
    "optim.lr_warmup_samples": 500_000,
    "train.train_samples": 488_281_250,  # 2.00 T tokens
    "train.micro_batch": 1,
    "train.global_batch": 1024,  # 32 microbatches on its 512 A100
    "train.rampup_batch": (32, 32, 2_000_000),
    "train.precision": "bf16",
    "train.eval_interval": 2000,
    "checkpoint.save_interval": 1000,
    "checkpoint.rampup_save_interval": 5000,
    "seed": 42,
}

_70B = {  # 70B
    **_34B,
    "model.num_layers": 80,
    "model.hidden_size": 8192,
    "model.num_heads": 64,
    "model.vocab_multiple": 512,  # 64 x tp 8
    "model.norm_init": 0.25,
    "model.init_std": 0.0149,
    "parallel.tensor": 8,
    "train.micro_batch": 2,
    "train.global_batch": 1056,  # 22 microbatches on its 768 A800
    "train.rampup_batch": (48, 48, 2_000_000),
    "checkpoint.save_interval": 500,
}

_AQUILA_2023 = {  # v1; the network as in FlagAI's aquila_model.py, its blocks and attentions
    **_SCRATCH_7B,
    "model.ffn_size": 11008,
    "model.norm_order": "llama",
    "model.position_embedding": "rope-interleaved",
    "model.score_clamp": 1024.0,
    "model.init_std": 0.006,
}

_AQUILACODE = {  # FlagAI's Aquila-code.yaml: trains the 7B on
    **_AQUILA_2023,
    "optim.lr": 2e-5,
    "optim.min_lr": 2e-6,
}

_LLAMA2_7B = {  # Llama
    **{name: value for name, value in _COMMON.items() if name != "data.tokenizer_type"},
    "data.tokenizer_type": "HuggingFaceTokenizer",
    "model.vocab_size": 32000,
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.num_heads": 32,
    "model.ffn_size": 11008,
    "model.vocab_multiple": 128,
    "model.seq_len": 4096,
    "model.norm_order": "llama",
    "model.init_std": 0.02,
    "optim.lr": 3e-4,  # paper, and what follows
    "optim.min_lr": 3e-5,
    "optim.lr_warmup_samples": 2_048_000,  # 2,000 steps
    "train.train_samples": 488_281_250,  # 2.00 T tokens
    "train.micro_batch": 1,
    "train.global_batch": 1024,
    "train.precision": "bf16",
    "checkpoint.save_interval": 1000,
}

_ATOM_7B = {  # Atom: Llama-2's network with a vocabulary of 65,000, trained on
    **_LLAMA2_7B,
    "model.vocab_size": 65000,
    "optim.lr": 3e-5,  # a tenth of the peak from scratch
    "optim.min_lr": 3e-6,
}

_BAICHUAN2_7B = {  # Baichuan
    **_LLAMA2_7B,
    "model.vocab_size": 125696,
    "model.norm_eps": 1e-6,
    "model.norm_head": True,
    "model.max_z_loss": 2e-4,  # paper; the weights' config.json says 0, as fine-tuning has it
    "optim.lr": 2e-4,  # paper, and what follows
    "optim.min_lr": 2e-5,
    "optim.clip_grad": 0.5,
    "train.train_samples": 634_765_625,  # 2.6 T tokens
}

_BAICHUAN2_13B = {
    **_BAICHUAN2_7B,
    "model.num_layers": 40,
    "model.hidden_size": 5120,
    "model.num_heads": 40,
    "model.ffn_size": 13696,
    "model.position_embedding": "alibi",
    "parallel.tensor": 8,
    "parallel.sequence": True,
    "optim.lr": 1.5e-4,
    "optim.min_lr": 1.5e-5,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "aquila2-7b": _SCRATCH_7B,
        "aquila2-7b-continue": _CONTINUE_7B,
        "aquila2-34b": _34B,
        "aquila2-70b": _70B,
        "aquila-7b": _AQUILA_2023,
        "aquilacode-7b": _AQUILACODE,
        "llama-2-7b": _LLAMA2_7B,
        "atom-7b": _ATOM_7B,
        "baichuan2-7b": _BAICHUAN2_7B,
        "baichuan2-13b": _BAICHUAN2_13B,
    }
)

CONTINUATIONS: Mapping[str, str] = MappingProxyType(  # presets that train published weights on: the one from scratch
    {"aquila2-7b-continue": "aquila2-7b", "aquilacode-7b": "aquila-7b", "atom-7b": "llama-2-7b"}
)
