"""Laws of the maps between our tensors and other programs': exact both ways, every element once."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.checkpoint.aquila_2023 import aquila_map
from megatron_aquila.checkpoint.baichuan import baichuan_map
from megatron_aquila.checkpoint.llama import llama_map, llama_tensors
from megatron_aquila.checkpoint.megatron_form import NAMES, MegatronForm, NamesKind, megatron_map
from megatron_aquila.checkpoint.strips import TensorMap
from megatron_aquila.plan.shape import ModelShape


def small(**changes) -> ModelShape:
    settings = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "ffn_size": 12, "vocab_size": 11}
    settings |= changes
    settings.setdefault("hidden_size", settings["num_heads"] * settings["head_dim"])
    return ModelShape(**{"padded_vocab_size": 16, "seq_len": 8} | settings)


@st.composite
def shapes(draw, grouped: bool = True) -> ModelShape:
    kv = draw(st.sampled_from([2, 4]))
    heads = kv * (draw(st.integers(1, 3)) if grouped else 1)
    return small(
        num_layers=draw(st.sampled_from([2, 4])),
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn_size=4 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 16)),
        position_embedding=draw(st.sampled_from(["rope", "rope-interleaved"])),
    )


def numbered(shape: ModelShape) -> dict[str, torch.Tensor]:
    """Every element of the model has a number of its own, 0 apart."""
    out, start = {}, 1
    for name, size in llama_tensors(shape).items():
        count = torch.Size(size).numel()
        out[name] = torch.arange(start, start + count, dtype=torch.int32).view(size)
        start += count
    return out


def round_trip(tensor_map: TensorMap, shape: ModelShape) -> dict[str, torch.Tensor]:
    ours = numbered(shape)
    theirs = {
        key: tensor_map.their_tensor(key, ours.__getitem__) for key in tensor_map.theirs if tensor_map.sources_of(key)
    }
    for name, tensor in ours.items():
        assert torch.equal(tensor_map.our_tensor(name, theirs.__getitem__), tensor), name
    return theirs


@given(shapes(grouped=False), st.sampled_from([llama_map, baichuan_map, aquila_map, partial(aquila_map, packed=True)]))
def test_published_forms_hold_every_element_once_and_give_it_back(shape: ModelShape, make) -> None:
    theirs = round_trip(make(shape), shape)
    values = torch.cat([tensor.flatten() for tensor in theirs.values()])
    assert values.numel() == sum(torch.Size(size).numel() for size in llama_tensors(shape).values())
    assert len(values.unique()) == values.numel(), "an element twice, or padding where none is"


@given(
    shapes(),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]),
    st.booleans(),
    st.sampled_from([*NAMES]),
)
def test_megatrons_form_gives_everything_back(shape: ModelShape, degrees, patched: bool, names: NamesKind) -> None:
    tp, pp, chunks = degrees
    form = MegatronForm(tp=tp, pp=pp, chunks=chunks, padded_vocab_size=16, patched=patched, names=names)
    theirs = round_trip(megatron_map(shape, form), shape)
    values = torch.cat([tensor.flatten() for key, tensor in theirs.items() if "norm" not in key])
    values = values[values > 0]
    assert len(values.unique()) == values.numel(), "an element twice"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"tp": 3}, "num_kv_heads 4 by 3, padded_vocab_size 16 by 3"),
        ({"pp": 3}, "num_layers 2 by 3"),
        ({"padded_vocab_size": 8}, "holds less than 11 tokens"),
    ],
)
def test_a_form_that_does_not_divide_is_refused(form, why) -> None:
    from megatron_aquila.errors import CheckpointError

    with pytest.raises(CheckpointError, match=why):
        megatron_map(small(), MegatronForm(**{"tp": 1, "pp": 1, "padded_vocab_size": 16} | form))


def test_pairs_of_neighbours_become_halves() -> None:
    """The published conversion: view(heads, D/2, 2, hidden).transpose(1, 2)."""
    shape = small(position_embedding="rope", head_dim=6)
    ours = numbered(shape)
    theirs = aquila_map(shape)
    interleaved = theirs.their_tensor("layers.0.attention.wq.weight", ours.__getitem__)
    halves = interleaved.view(4, 3, 2, 24).transpose(1, 2).reshape(24, 24)
    assert torch.equal(halves, ours["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(
        theirs.their_tensor("layers.1.attention.wv.weight", ours.__getitem__),
        ours["model.layers.1.self_attn.v_proj.weight"],
    )


def test_baichuans_pack_is_q_k_v() -> None:
    shape = small()
    ours = numbered(shape)
    pack = baichuan_map(shape).their_tensor("model.layers.1.self_attn.W_pack.weight", ours.__getitem__)
    assert torch.equal(pack, torch.cat([ours[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]))


def test_megatrons_rows_are_as_its_code_views_them() -> None:
    """Rows [groups, heads of the group + 2, D], [gate; up] of each rank, columns of a row-parallel weight."""
    shape = small(num_heads=8, num_kv_heads=4, num_layers=4)
    ours = numbered(shape)
    form = MegatronForm(tp=2, pp=2, padded_vocab_size=16)
    tensor_map = megatron_map(shape, form)

    def theirs(rank: int, stage: int, name: str) -> torch.Tensor:
        return tensor_map.their_tensor(
            f"mp_rank_{rank:02d}_{stage:03d}/model/language_model.{name}.weight", ours.__getitem__
        )

    layer = "model.layers.3"
    qkv = torch.cat([theirs(rank, 1, "encoder.layers.1.self_attention.query_key_value") for rank in (0, 1)])
    groups = qkv.view(4, 4, 4, 32)
    assert torch.equal(groups[:, :2].reshape(32, 32), ours[f"{layer}.self_attn.q_proj.weight"])
    assert torch.equal(groups[:, 2].reshape(16, 32), ours[f"{layer}.self_attn.k_proj.weight"])
    assert torch.equal(groups[:, 3].reshape(16, 32), ours[f"{layer}.self_attn.v_proj.weight"])
    up = [theirs(rank, 1, "encoder.layers.1.mlp.dense_h_to_4h").chunk(2) for rank in (0, 1)]
    assert torch.equal(torch.cat([gate for gate, _ in up]), ours[f"{layer}.mlp.gate_proj.weight"])
    assert torch.equal(torch.cat([up for _, up in up]), ours[f"{layer}.mlp.up_proj.weight"])
    down = [theirs(rank, 1, "encoder.layers.1.mlp.dense_4h_to_h") for rank in (0, 1)]
    assert torch.equal(torch.cat(down, dim=1), ours[f"{layer}.mlp.down_proj.weight"])
    embedding = torch.cat([theirs(rank, 0, "embedding.word_embeddings") for rank in (0, 1)])
    assert torch.equal(embedding[:11], ours["model.embed_tokens.weight"])
    assert (embedding[11:] == 0).all()


def test_the_patched_7bs_v_is_put_right() -> None:
    """Its rows were permuted with those of q and k; the exporter un-permutes v alone."""
    shape, form = small(), MegatronForm(tp=1, pp=1, padded_vocab_size=16, patched=True)
    ours = numbered(shape)
    key = "mp_rank_00/model/language_model.encoder.layers.0.self_attention.query_key_value.weight"
    groups = megatron_map(shape, form).their_tensor(key, ours.__getitem__).view(4, 3, 4, 16)
    v = ours["model.layers.0.self_attn.v_proj.weight"].view(4, 2, 2, 16).transpose(1, 2).reshape(4, 4, 16)
    assert torch.equal(groups[:, 2], v)
    assert torch.equal(groups[:, 1], ours["model.layers.0.self_attn.k_proj.weight"].view(4, 4, 16))
