from dataclasses import replace

import pytest
import torch

from megatron_aquila.checkpoint.llama import (
    SpecialIds,
    llama_cannot_hold,
    llama_config,
    llama_feature_problems,
    llama_shape_fields,
    llama_tensors,
)
from tests.checkpoint.toy import SHAPE

IDS = SpecialIds(bos=41, eos=43, pad=0)
CONFIG = llama_config(SHAPE, torch.bfloat16, IDS)


def test_config_and_shape_are_inverse() -> None:
    odd = replace(SHAPE, rope_base=5e5, norm_eps=1e-6, init_std=0.08)
    linear = replace(SHAPE, rope_scaling="linear", rope_factor=4.0)
    yarn, llama3 = (replace(linear, rope_scaling=kind, rope_trained_len=64) for kind in ("yarn", "llama3"))
    for shape in (SHAPE, odd, linear, yarn, llama3):
        fields = llama_shape_fields(llama_config(shape, torch.float32, IDS))
        assert fields == {name: getattr(shape, name) for name in fields}
        assert len(fields) == 16


def test_tensors_count_the_parameters() -> None:
    names = llama_tensors(SHAPE)
    assert len(names) == 9 * SHAPE.num_layers + 3
    assert next(iter(names)) == "model.embed_tokens.weight"
    assert names["model.layers.1.self_attn.k_proj.weight"] == (8, 12)
    assert names["lm_head.weight"] == (44, 12)


def test_defaults_are_those_of_transformers() -> None:
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    bare = {name: CONFIG[name] for name in needed}
    expected = {"num_kv_heads": 4, "head_dim": 3, "norm_eps": 1e-6, "rope_base": 10000.0}
    assert llama_shape_fields(bare).items() >= expected.items()
    assert llama_feature_problems(bare) == []
    with pytest.raises(KeyError, match="vocab_size"):
        llama_shape_fields({name: bare[name] for name in needed[:-1]})


def test_both_spellings_of_the_rope() -> None:
    bare = {name: value for name, value in CONFIG.items() if not name.startswith("rope")}
    assert llama_shape_fields(bare | {"rope_theta": 5e5})["rope_base"] == 5e5
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert llama_shape_fields(bare | {"rope_parameters": rope})["rope_base"] == 5e5
    assert llama_feature_problems(bare | {"rope_parameters": rope}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "aquila"}, None),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only 'llama' or 'aquila' is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False is supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope scaling is 'dynamic'; only default, linear, yarn"),
        (
            {"rope_scaling": {"rope_type": "llama3", "high_freq_factor": 2.0}},
            "high_freq_factor 2.0; only 4 is supported",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "mscale": 1.0}}, "mscale 1.0; only its default"),
    ],
)
def test_features_that_are_not_offered(change: dict[str, object], problem: str | None) -> None:
    problems = llama_feature_problems(CONFIG | change)
    assert len(problems) == (0 if problem is None else 1)
    assert problem is None or problem in problems[0]


def test_two_ranges_have_no_word_in_config_json() -> None:
    shape = replace(SHAPE, rope_scaling="two-range", rope_factor=4.0, rope_trained_len=4)
    assert llama_cannot_hold(shape) == "positions have one range"
    assert llama_cannot_hold(replace(shape, rope_scaling="linear")) is None
