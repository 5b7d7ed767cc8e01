import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.presets import PRESETS
from megatron_aquila.config.settings import all_settings
from megatron_aquila.plan.flops import num_params

# ranks of the published runs, parameters, ffn, padded vocabulary, microbatches
RECIPES = {
    "aquila2-7b": (96, 7_295_537_152, 11008, 100096, 9),
    "aquila2-7b-continue": (96, 7_295_537_152, 11008, 100096, 9),
    "aquila2-34b": (512, 33_693_554_688, 24576, 100096, 32),
    "aquila2-70b": (768, 70_090_891_264, 28672, 100352, 22),
    "aquila-7b": (96, 7_295_537_152, 11008, 100096, 9),
    "aquilacode-7b": (96, 7_295_537_152, 11008, 100096, 9),
    "llama-2-7b": (64, 6_738_415_616, 11008, 32000, 16),
    "atom-7b": (64, 7_008_751_616, 11008, 65024, 16),
    "baichuan2-7b": (64, 7_505_973_248, 11008, 125696, 16),
    "baichuan2-13b": (64, 13_896_668_160, 13696, 125696, 128),
}


def test_every_preset_has_its_row():
    assert set(RECIPES) == set(PRESETS)


@pytest.mark.parametrize("preset", RECIPES)
def test_a_preset_runs_on_its_cluster_and_is_the_published_model(preset):
    world, params, ffn, vocab, microbatches = RECIPES[preset]
    loaded = load_config(["--preset", preset], world_size=world)
    derived = derive(loaded.config, world)
    assert num_params(derived.shape) == params
    assert (derived.shape.ffn_size, derived.shape.padded_vocab_size) == (ffn, vocab)
    assert derived.batch_at(loaded.config.train.train_samples)[1] == microbatches


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_settings_only(preset):
    assert set(PRESETS[preset]) <= set(all_settings())


def test_the_7b_from_scratch_differs_in_learning_rate_and_precision_only():
    scratch, further = PRESETS["aquila2-7b"], PRESETS["aquila2-7b-continue"]
    assert {name for name in scratch if scratch[name] != further[name]} == {
        "optim.lr",
        "optim.min_lr",
        "train.precision",
    }
    assert set(further) - set(scratch) == {"optim.initial_loss_scale", "optim.min_loss_scale"}
    assert scratch["optim.lr"] == 3e-4


def test_llama_2_is_what_transformers_has_by_default():
    """But for what Llama's first version had otherwise: the context and epsilon."""
    config = pytest.importorskip("transformers", reason="it ships the numbers (extra hf)").LlamaConfig()
    model = load_config(["--preset", "llama-2-7b"], world_size=64).config.model
    sizes = (model.vocab_size, model.hidden_size, model.ffn_size, model.num_layers, model.num_heads, model.init_std)
    assert sizes == (
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.initializer_range,
    )  # fmt: skip
    assert (model.norm_eps, model.seq_len) == (1e-5, 4096)
