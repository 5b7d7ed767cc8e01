"""Every family, proved at one small model: trained under every layout, read, written, given back, and its logits.

``python -m tests.verify.families PAGE`` writes the table into a page. The judges are transformers for Llama's form, and
for the others networks and writers of files that are written in the tests from their descriptions.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_aquila.checkpoint.llama import SpecialIds, llama_config, llama_tensors
from megatron_aquila.checkpoint.published import open_weights
from megatron_aquila.commands import convert
from megatron_aquila.config.cli import load_config
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.matrix import MatrixRow, run_matrix
from megatron_aquila.verify.page import markdown, put, write
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.export import NO_IDS
from tests.checkpoint.megatron_files import leaves, write_files
from tests.checkpoint.plain_networks import (
    AQUILA,
    BAICHUAN,
    TOKENS,
    aquila_files,
    aquila_logits,
    baichuan_files,
    baichuan_logits,
    error,
    folder_of,
    packed,
)

Tensors = Mapping[str, Tensor]
Write = Callable[[Path, Tensors], object]
HEADER = (
    "family", "parity, cases", "worst error", "read from", "written as", "there and back", "fp32 logits, worst error",
)  # fmt: skip
LAYERS = ModelShape(
    num_layers=8, hidden_size=24, ffn_size=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=29,
    padded_vocab_size=128, seq_len=16,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """``tensors``: the model as it is published. ``logits``: the judge's. ``forms``: files that hold it, and who writes
    them. ``flags``: of ``aquila convert`` on the way back, whose files ``returned`` reads. ``expected``: what they must
    hold, where that is not ``tensors``.
    """

    name: str
    preset: str
    tensors: Callable[[], Tensors]
    logits: Callable[[Tensors], Tensor]
    forms: Mapping[str, Write]
    written: str
    reading: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    returned: Callable[[Path], Tensors]
    expected: Callable[[Path, Tensors], Tensors] = lambda _, tensors: tensors


@dataclass(frozen=True, kw_only=True)
class Found:
    """Tensors that came back with their bytes, of how many; and the worst logits of anything that was read."""

    equal: int
    tensors: int
    logits: float


def prove(family: Family, folder: Path) -> Found:
    """Read each form, write the first one's model, read that again."""
    torch.manual_seed(0)
    tensors = family.tensors()
    judged = family.logits(tensors)
    errors = []
    for number, writes in enumerate(family.forms.values()):
        source, ours = folder / f"form{number}", folder / f"ours{number}"
        source.mkdir()
        writes(source, tensors)
        command(source, ours, *family.reading)
        errors.append(error(open_weights(ours), judged))
    command(folder / "ours0", folder / "back", "--no-tokenizer", *family.flags)
    returned, expected = family.returned(folder / "back"), family.expected(folder, tensors)
    equal = sum(name in returned and torch.equal(returned[name], x) for name, x in expected.items())
    errors.append(error(open_weights(folder / "back"), judged))
    return Found(equal=equal, tensors=len(expected.keys() | returned.keys()), logits=max(errors))


def command(source: Path, output: Path, *flags: str) -> None:
    """``aquila convert``, which must succeed."""
    with redirect_stdout(StringIO()):
        assert convert.main(["--from", str(source), "--to", str(output), *flags]) == 0, (source, output, flags)


def llama_weights(shape: ModelShape) -> Tensors:
    """Random ones; norms around 1."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(size, generator=draw) * 0.3 + ("norm" in name) for name, size in llama_tensors(shape).items()
    }


def llama_logits(shape: ModelShape, tensors: Tensors) -> Tensor:
    """transformers' own model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**llama_config(shape, torch.float32, NO_IDS))).eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def write_llama(shape: ModelShape, how: str, folder: Path, tensors: Tensors) -> None:
    """As the publisher has it: config.json does not say where norms cast."""
    config = llama_config(shape, torch.float32, SpecialIds(bos=1, eos=[2, 3], pad=None))
    del config["norm_order"]
    folder_of(folder, config, dict(tensors), how)


def write_packed(folder: Path, tensors: Tensors) -> None:
    """q, k and v of the Aquila of 2023 in one."""
    (folder / "config.json").write_text(json.dumps(AQUILA))
    save_file(packed(tensors), folder / "model.safetensors")


def published(folder: Path) -> Tensors:
    """All tensors of safetensors files."""
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def ranks(folder: Path) -> Tensors:
    """All tensors of Megatron's files."""
    found = {}
    for path in folder.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        for part in (key for key in state if key.startswith("model")):
            found |= {f"{path.parent.name}/{part}/{name}": x for name, x in leaves(state[part]).items()}
    return found


def _llama(name: str, preset: str, shape: ModelShape, *reading: str) -> Family:
    return Family(
        name=name,
        preset=preset,
        tensors=partial(llama_weights, shape),
        logits=partial(llama_logits, shape),
        forms={how: partial(write_llama, shape, how) for how in ("safetensors", "bin")},
        reading=reading,
        written="Llama's safetensors",
        returned=published,
    )


def _baichuan(name: str, preset: str, *, alibi: bool) -> Family:
    config = BAICHUAN | ({"position_embedding": "alibi"} if alibi else {})
    return Family(
        name=name,
        preset=preset,
        tensors=baichuan_files,
        logits=partial(baichuan_logits, alibi=alibi),
        forms={how: partial(_write_files, config, how) for how in ("safetensors", "bin")},
        written="`W_pack` files",
        returned=published,
    )


def _write_files(config: Mapping[str, object], how: str, folder: Path, tensors: Tensors) -> None:
    folder_of(folder, dict(config), dict(tensors), how)


VIRTUAL = {"tp": 2, "pp": 2, "chunks": 2, "rows": 32}
MEGATRON: Mapping[str, Mapping[str, object]] = {
    "tp 2 pp 2 with virtual stages": VIRTUAL,
    "core's names": {**VIRTUAL, "names": "core"},
    "the 7B's patched rows": {"rows": 32, "patched": True},
    "uneven parts": {"rows": 32, "pp": 2, "layers": (5, 3)},
}
FAMILIES = (
    _llama("Aquila2", "aquila2-34b", LAYERS, "--norm-order", "aquila"),
    Family(
        name="Aquila2, FlagScale's files",
        preset="aquila2-34b",
        tensors=partial(llama_weights, LAYERS),
        logits=partial(llama_logits, LAYERS),
        forms={
            name: lambda folder, tensors, how=how: write_files(folder, tensors, LAYERS, **how)
            for name, how in MEGATRON.items()
        },
        written="Megatron's, tp 2 pp 2 with virtual stages",
        flags=("--to-format", "megatron", "--tp", "2", "--pp", "2", "--chunks", "2", "--vocab-multiple", "16"),
        returned=ranks,
        expected=lambda folder, tensors: ranks(
            write_files(folder / "expected", tensors, LAYERS, zeros=True, **VIRTUAL)
        ),
    ),
    Family(
        name="Aquila, AquilaCode (2023)",
        preset="aquila-7b",
        tensors=aquila_files,
        logits=aquila_logits,
        forms={how: partial(_write_files, AQUILA, how) for how in ("safetensors", "bin", "module")}
        | {"packed `Wqkv`": write_packed},
        written="FlagAI's names",
        returned=published,
    ),
    _llama("Llama-2, Atom", "llama-2-7b", replace(LAYERS, num_kv_heads=6, norm_order="llama")),
    _baichuan("Baichuan2-7B", "baichuan2-7b", alibi=False),
    _baichuan("Baichuan2-13B", "baichuan2-13b", alibi=True),
)


def cells(family: Family, rows: Sequence[MatrixRow], found: Found) -> list[str]:
    """A family under ``HEADER``. A failure says so in words."""
    broken = sum(not row.holds for row in rows)
    return [
        family.name,
        f"{len(rows)}" if broken == 0 else f"{broken} of {len(rows)} FAIL",
        f"{max(row.plain.worst.error for row in rows):.1e}",
        ", ".join(family.forms),
        family.written,
        f"{found.equal} of {found.tensors} tensors byte-equal",
        f"{found.logits:.1e}",
    ]


def families_table(pool: Callable[[int], WorkerPool]) -> str:
    """The table as Markdown. What is trained depends on the preset alone."""

    @cache
    def parity(preset: str) -> list[MatrixRow]:
        return [*run_matrix(load_config(["--preset", preset], prog="families").config, pool)]

    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory(prefix="families_") as folder:
            found = prove(family, Path(folder))
        rows.append(cells(family, parity(family.preset), found))
        print(*rows[-1], sep=" | ", flush=True)
    return markdown(HEADER, rows)


def main(page: Path) -> None:
    """Prove everything and put the table into its place."""
    pools: dict[int, WorkerPool] = {}

    def pool(world: int) -> WorkerPool:
        if world not in pools:
            pools[world] = WorkerPool(world)
        return pools[world]

    try:
        table = families_table(pool)
    finally:
        for one in pools.values():
            one.close()
    write(page, put(page.read_text(encoding="utf-8"), "families", table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
