"""What the layers give forward, as rectangles of whole tensors: where a wrong forward shows first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.train.build import Machine, context_pieces


@contextmanager
def recording(machine: Machine) -> Iterator[list[Chunk]]:
    """Inside, every forward of this rank's stages leaves here what its layers give, microbatch by microbatch. Local.

    Names are those of the parameters, the tensors (samples, S, H). What is computed again in backward is not recorded.
    """
    record = _Record(machine)
    handles = [handle for stage in machine.stages.values() for handle in record.watch(stage)]
    try:
        yield record.chunks
    finally:
        for handle in handles:
            handle.remove()


class _Record:
    """Hooks on the stages. The n-th forward of a stage is that of its n-th microbatch, in every schedule."""

    def __init__(self, machine: Machine) -> None:
        train, shape, ctx = machine.config.train, machine.derived.shape, machine.ctx
        self._share, self._tp = machine.derived.batches.share_of(ctx.dp.rank), ctx.tp
        self._pieces = context_pieces(machine.config.parallel, shape, ctx.cp)
        self._whole = (train.global_batch, shape.seq_len, shape.hidden_size)
        self._microbatch: dict[int, int] = {}
        self._open: int | None = None  # the stage whose forward runs; a recomputation is outside of it
        self.chunks: list[Chunk] = []

    def watch(self, stage: Any) -> Iterator[Any]:
        self._microbatch[stage.stage] = -1
        yield stage.register_forward_pre_hook(self._begin)
        for name, module in layers(stage):
            yield module.register_forward_hook(lambda _module, _inputs, x, name=name: self._keep(name, x))
        yield stage.register_forward_hook(self._end)

    def _begin(self, stage: Any, _inputs: Any) -> None:
        self._open = stage.stage
        self._microbatch[stage.stage] += 1

    def _end(self, _stage: Any, _inputs: Any, _output: Any) -> None:
        self._open = None

    def _keep(self, name: str, x: Tensor) -> None:
        if self._open is None:
            return
        sample = self._share.first + self._microbatch[self._open] * self._share.round_size
        rows, held = x.shape[0], sum(map(len, self._pieces))
        first = self._tp.rank * rows if rows < held else 0  # they are split over tp, or all are here
        places = [place for piece in self._pieces for place in piece][first : first + rows]
        x_BSH = x.detach().transpose(0, 1).clone()
        for piece in self._pieces:
            here = [row for row, place in enumerate(places) if place in piece]
            if here:
                offset = (sample, places[here[0]], 0)
                self.chunks.append(Chunk(name, self._whole, offset, x_BSH[:, here[0] : here[-1] + 1]))


def layers(stage: Any) -> Iterator[tuple[str, nn.Module]]:
    """What is recorded of a stage: embedding, attentions, MLPs, final norm."""
    if stage.embedding is not None:
        yield "model.embed_tokens", stage.embedding
    for layer, block in zip(stage.layers, stage.blocks, strict=True):
        yield f"model.layers.{layer}.self_attn", block.attention
        yield f"model.layers.{layer}.mlp", block.mlp.down  # what a recomputed layer calls, too
    if stage.head is not None:
        yield "model.norm", stage.head.norm
