"""Published files of each family give the logits of a plain network that is written here from its description."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_aquila.checkpoint.megatron import write_megatron, write_tracker
from megatron_aquila.checkpoint.megatron_form import MegatronForm
from megatron_aquila.checkpoint.published import model_shape, open_weights
from megatron_aquila.errors import CheckpointError
from tests.checkpoint.plain_networks import (
    AQUILA,
    BAICHUAN,
    aquila_files,
    aquila_logits,
    baichuan_files,
    baichuan_logits,
    error,
    folder_of,
    packed,
)


@pytest.mark.parametrize("how", ["safetensors", "bin", "module"])
def test_the_aquila_of_2023(tmp_path: Path, how: str) -> None:
    files = aquila_files()
    reader = open_weights(folder_of(tmp_path, AQUILA, files, how))
    assert error(reader, aquila_logits(files)) < 1e-5
    assert reader.shape_fields()["score_clamp"] == 1024.0
    halves = open_weights(tmp_path, position_embedding="rope")
    assert error(halves, aquila_logits(files)) < 1e-5, "the same function in halves"
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(halves.read(q), reader.read(q))


def test_the_aquila_of_2023_with_a_packed_projection(tmp_path: Path) -> None:
    files = aquila_files()
    for form in ("rope", "rope-interleaved"):
        reader = open_weights(folder_of(tmp_path, AQUILA, packed(files)), position_embedding=form)
        assert error(reader, aquila_logits(files)) < 1e-5


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_baichuan2(tmp_path: Path, alibi: bool, how: str) -> None:
    files = baichuan_files()
    form = {"position_embedding": "alibi"} if alibi else {}
    reader = open_weights(folder_of(tmp_path, BAICHUAN | form, files, how))
    assert error(reader, baichuan_logits(files, alibi=alibi)) < 1e-5
    assert error(reader, baichuan_logits(files, alibi=not alibi)) > 1e-3, "the other form would show"


def test_a_megatron_checkpoint_is_written_and_read(tmp_path: Path) -> None:
    files = aquila_files()
    reader = open_weights(folder_of(tmp_path, AQUILA, files), position_embedding="rope")
    out = tmp_path / "megatron"
    form = MegatronForm(tp=2, pp=2, padded_vocab_size=32)
    for name in ("mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"):
        write_megatron(out, model_shape(reader), form, reader.read, iteration=5, dtype=torch.float32, only=name)
    write_tracker(out, 5)
    again = open_weights(out)
    for name in reader.tensors:
        assert torch.equal(again.read(name), reader.read(name)), name
    assert error(again, aquila_logits(files)) < 1e-5
    assert not list(out.rglob("*.scratch"))
    state = torch.load(out / "iter_0000005/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    assert state["checkpoint_version"] == 3.0
    assert state["args"].tensor_model_parallel_size == 2
    assert set(state["model"]["language_model"]) == {"encoder", "output_layer"}


class Code:
    def __reduce__(self):
        return (print, ("this was run",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AQUILA))
    torch.save({"module": aquila_files(), "more": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"its code is not run: .*GLOBAL.*print"):
        open_weights(tmp_path)
    assert "this was run" not in capsys.readouterr().out


def test_random_states_and_arguments_of_megatron_are_plain_values(tmp_path: Path) -> None:
    from megatron_aquila.checkpoint.pickles import load_pickle

    state = {"args": argparse.Namespace(a=1, dtype=torch.bfloat16), "rng": np.arange(3, dtype=np.uint32)}
    torch.save(state, tmp_path / "a.pt")
    found = load_pickle(tmp_path / "a.pt")
    assert found["args"].a == 1
    assert found["rng"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        (BAICHUAN | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "baichuan", "num_attention_heads": 4}, "no entry 'num_hidden_layers'"),
        (BAICHUAN | {"norm_order": "last"}, "norm_order is 'last'; only 'aquila' or 'llama'"),
        (AQUILA | {"norm_order": "last"}, "norm_order is 'last'"),
        (BAICHUAN | {"hidden_size": 48}, "does not fit its own description"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, config, why) -> None:
    with pytest.raises(CheckpointError, match=why):
        open_weights(folder_of(tmp_path, config, baichuan_files()))


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json or latest"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "no")
    (tmp_path / "bad.bin").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text(json.dumps(AQUILA))
    with pytest.raises(CheckpointError, match=r"bad\.bin"):
        open_weights(tmp_path)
