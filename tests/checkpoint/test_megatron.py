"""Files as Megatron's own code leaves them, at any cut and under either names, are the model that was written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.megatron import open_megatron
from megatron_aquila.checkpoint.published import model_shape, open_weights
from megatron_aquila.commands import convert
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape
from tests.checkpoint.megatron_files import leaves, write_files

SHAPE = ModelShape(
    num_layers=8, hidden_size=24, ffn_size=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=29,
    padded_vocab_size=128, seq_len=16,
)  # fmt: skip
CUTS = {
    "one file": {},
    "tp 2 pp 2": {"tp": 2, "pp": 2},
    "virtual stages": {"tp": 2, "pp": 2, "chunks": 2},
    "virtual stages of one layer": {"pp": 2, "chunks": 4},
    "uneven": {"pp": 2, "layers": (5, 3)},
    "the patched 7B": {"tp": 2, "patched": True},
}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(size, generator=generator) for name, size in llama_tensors(SHAPE).items()}


@pytest.mark.parametrize("names", ["classic", "core", "core-local"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_is_read(tmp_path: Path, cut: str, names: str) -> None:
    ours = weights()
    write_files(tmp_path, ours, SHAPE, rows=32, names=names, **CUTS[cut])
    reader = open_weights(tmp_path)
    assert model_shape(reader) == SHAPE
    assert [name for name in ours if not torch.equal(reader.read(name), ours[name])] == []


@pytest.mark.parametrize("names", ["classic", "core", "core-local"])
def test_what_is_written_is_what_megatron_writes(tmp_path: Path, names: str) -> None:
    cut = {"tp": 2, "pp": 2, "chunks": 2}
    theirs = write_files(tmp_path / "theirs", weights(), SHAPE, rows=32, names=names, zeros=True, **cut)
    flags = ["--to-format", "megatron", "--vocab-multiple", "16", "--megatron-names", names]
    flags += ["--no-verify"]  # weights around 1 make too much of a rounding for logits to say anything
    flags += [word for name, degree in cut.items() for word in (f"--{name}", str(degree))]
    assert convert.main(["--from", str(theirs), "--to", str(tmp_path / "ours"), *flags]) == 0
    ranks = [f"mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt" for tp in (0, 1) for pp in (0, 1)]
    for rank in ranks:
        written = torch.load(tmp_path / "ours/iter_0000000" / rank, weights_only=False)
        expected = torch.load(theirs / "iter_0000007" / rank, weights_only=False)
        for part in ("model0", "model1"):
            found, wanted = leaves(written[part]), leaves(expected[part])
            assert found.keys() == wanted.keys()
            assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
        assert written["args"].virtual_pipeline_model_parallel_size == 2


def test_mcores_interleaved_rotation_and_the_order_of_norms(tmp_path: Path) -> None:
    write_files(tmp_path / "a", weights(), SHAPE, rows=32, names="core", rotary_interleaved=True)
    assert open_weights(tmp_path / "a").shape_fields()["position_embedding"] == "rope-interleaved"
    halves = open_weights(tmp_path / "a", position_embedding="rope").read("model.layers.0.self_attn.k_proj.weight")
    k = weights()["model.layers.0.self_attn.k_proj.weight"].view(2, 2, 2, 24)
    assert torch.equal(halves, k.transpose(1, 2).reshape(8, 24))
    llama = {"apply_layernorm_rms": None, "normalization": "RMSNorm"}
    orders = {"classic": "llama", "core": "aquila"}
    for names, order in orders.items():
        write_files(tmp_path / names, weights(), SHAPE, rows=32, names=names, **llama)
        reader = open_weights(tmp_path / names)
        assert "norm_order" not in reader.shape_fields(), "a guess is no statement"
        assert model_shape(reader).norm_order == order
        for told in ("llama", "aquila"):
            assert model_shape(reader, norm_order=told).norm_order == told
    write_files(tmp_path / "said", weights(), SHAPE, rows=32, norm_order="llama")
    with pytest.raises(CheckpointError, match=r"--norm-order aquila: .* says llama; leave it out"):
        model_shape(open_weights(tmp_path / "said"), norm_order="aquila")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"untie_embeddings_and_output_weights": False}, "one table for embedding and head is not supported"),
        ({"apply_layernorm_1p": True}, "--apply-layernorm-1p is not supported"),
        ({"add_bias_linear": True}, "biases"),
        ({"vocab_size": None}, "give --vocab-size"),
        ({"num_layers": 9}, "files hold 8 layers, their arguments 9"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, arguments: dict[str, Any], why: str) -> None:
    write_files(tmp_path, weights(), SHAPE, rows=32, **arguments)
    with pytest.raises(CheckpointError, match=why):
        open_weights(tmp_path)


def test_what_has_no_place_or_no_known_name_is_refused(tmp_path: Path) -> None:
    step = write_files(tmp_path, weights(), SHAPE, rows=32, names="core") / "iter_0000007/mp_rank_00"
    state = torch.load(step / "model_optim_rng.pt", weights_only=False)
    extra = {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(4)}
    torch.save(state | {"model": state["model"] | extra}, step / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"q_layernorm\.weight has no place in the model"):
        open_megatron(tmp_path)
    torch.save(state | {"model": extra}, step / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"no names that are known here, but e\.g\. decoder\.layers\.0"):
        open_megatron(tmp_path)
    torch.save({"model": {}}, step / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="it has no `model` and `args`"):
        open_megatron(tmp_path)
