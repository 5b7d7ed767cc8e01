"""Bytes of activations that each part of a pass keeps, lets go of, and needs while it is at work. See ``walk``."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_aquila.plan.activations import Divided, LayerActivations
from megatron_aquila.plan.attention_memory import attention_moment
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.loss_chunks import loss_moment, unit_rows_moment
from megatron_aquila.plan.recompute import NO_MODULES, Recompute
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan
from megatron_aquila.plan.work import Work


class Change(NamedTuple):
    """Bytes of activations that are kept ``before`` a work on, and ``after`` it; and what there is of layers that have
    run ``again``: more before it, less after it.
    """

    before: int = 0
    after: int = 0
    again: int = 0


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """``item`` and ``wide``: bytes of an activation, and of what is computed in float32 or wider. The other settings
    are those of ``memory.MemoryPlan``.

    In formulas T are the tokens of a microbatch, R those in this rank's part of the residual stream; H the hidden size,
    and this rank's A of all heads, K of the key or value heads, F of the MLP, and C logits.
    """

    shape: ModelShape
    grid: RankGrid
    stages: StagePlan
    micro_batch: int
    sequence_parallel: bool
    context_method: ContextMethod
    item: int
    wide: int
    loss_chunk_tokens: int | None
    fuse_main_grads: bool
    offloaded: int
    pinned: bool

    @cached_property
    def layers(self) -> LayerActivations:
        """What layers keep."""
        return LayerActivations(
            shape=self.shape,
            grid=self.grid,
            micro_batch=self.micro_batch,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            item=self.item,
            wide=self.wide,
            offloaded=self.offloaded,
            pinned=self.pinned,
        )

    def divided(self, stage: int, recompute: Recompute) -> Divided:
        """What the stage's layers keep of one microbatch, here and on the host."""
        return self.layers.divided(len(self.stages.layers[stage]), recompute)

    @property
    def keeps_logits(self) -> bool:
        """Whether logits are kept from forward to backward."""
        return self.loss_chunk_tokens == 0

    @property
    def message(self) -> int:
        """What stages send each other: this rank's part of the residual stream, or its gradient. R H."""
        return self.layers.hidden

    @property
    def tables(self) -> int:
        """Of a microbatch, from forward to the gradient of its input: rotary tables, where positions turn."""
        turns = self.shape.position_embedding != "alibi"
        return self.wide * 2 * self.shape.head_dim * self.layers.tokens * turns

    @property
    def logits(self) -> int:
        """One microbatch's logits, if they are kept, T C."""
        return self.item * self.layers.tokens * self._columns * self.keeps_logits

    def change(self, work: Work, recompute: Recompute, divided: Divided) -> Change:
        """What ``work`` of a microbatch that is so recomputed, and so ``divided``, keeps and lets go of.

        A backward without weight gradients leaves what those need.
        """
        match work.op, work.part:
            case "F", "embedding":
                return Change(before=self._embedding)
            case "B" | "I", "embedding":
                return Change(after=-self._embedding)
            case "F", "head":
                return Change(before=self._head(recompute))
            case "B" | "I", "head":
                return Change(after=(self._owed(work) if work.op == "I" else 0) - self._head(recompute))
            case "W", _:
                return Change(after=-self._owed(work))
        assert work.layer is not None, f"{work} is of no layer"
        match work.op, work.part:
            case "F", "qkv":
                return Change(before=divided.by_layer[work.layer])
            case "R", "qkv":
                return Change(again=self.layers.layer())
            case "B" | "I", "down" | "out" | "gate_up" | "qkv":
                return self._freed(work, work.layer, recompute, divided)
        return Change()

    def _freed(self, work: Work, layer: int, recompute: Recompute, divided: Divided) -> Change:
        """Of a layer, after a linear's backward: SwiGLU's product after down's, and all else after qkv's.

        What down's weight gradient needs of it is owed then.
        """
        owed = self._owed(work) if work.op == "I" else 0
        is_again, product = layer < sum(recompute.groups), self.item * self._ffn
        left = divided.by_layer[layer] - product  # of one that waits on the host nothing is here
        keeps_product = not is_again and "swiglu" not in recompute.modules and left > 0
        match work.part:
            case "down":
                return Change(after=owed - product * keeps_product, again=-product * is_again)
            case "qkv":
                again = (self.layers.layer() - product) * is_again
                return Change(after=owed - (left if keeps_product else left + product), again=-again)
        return Change(after=owed)

    def beside(self, work: Work, recompute: Recompute, divided: Divided) -> int:
        """What there is only while ``work`` goes on. In forward that is also a layer that will run again; in backward
        the gradient of the residual stream, and of a weight whose main gradient is not added to by its linear.
        """
        if work.op == "W":
            return self._weight_gradient(work)
        passing = 0 if work.layer is None else divided.passing
        if work.op in "FR":
            is_dropped = work.op == "F" and work.layer is not None and work.layer < sum(recompute.groups)
            return passing + self._forward(work) + self.layers.layer() * is_dropped
        return passing + self.message + self._backward(work) + self._weight_gradient(work) * (work.op == "B")

    def _forward(self, work: Work) -> int:
        """A column-parallel linear's input gathered, T H; a row-parallel one's partial sum, T H; SwiGLU's gate and up
        widened, and two more; the loss's.
        """
        hidden = self.item * self.layers.tokens * self.shape.hidden_size
        match work.part:
            case "qkv" | "gate_up":
                return hidden * self.sequence_parallel
            case "out" | "down":
                return hidden
            case "swiglu":
                return self._ffn * self.wide * (4 if self._widens else 1)
            case "head":
                return self._loss()
        return 0

    def _backward(self, work: Work) -> int:
        """A linear's gradient of its output that came, and that of its input: of out T H + T A, of down T H + T F,
        where T H is the residual stream's if that is not split; of qkv T (A + 2 K) + T H, of gate and up 2 T F + T H,
        and for these x gathered, T H.

        SwiGLU's gradient that came, T F, those that leave, 2 T F, and a product in at least four bytes; where that is
        wider than the type, gate, up and the gradient in it, too, 3 T F. Attention's, of q, k and v, and of its output.
        The embedding's in at least four bytes, C H, then narrow, and of what came, T H, gathered. The loss's is made in
        forward.
        """
        hidden = self.item * self.layers.tokens * self.shape.hidden_size
        gathered = hidden * self.sequence_parallel
        match work.part:
            case "down":
                return self.item * self._ffn + gathered
            case "swiglu":
                return self._ffn * (3 * self.item + self.wide * (4 if self._widens else 1))
            case "gate_up":
                return 2 * self.item * self._ffn + hidden + gathered
            case "out":
                return self.item * self._heads + gathered
            case "attention":
                return max(self._attention(), 2 * self.item * (self._heads + self._kv_heads))
            case "qkv":
                return self.item * (self._heads + 2 * self._kv_heads) + hidden + gathered
            case "embedding":
                narrow = self.item * self._widens
                wide = self.wide * self.layers.tokens * self.shape.hidden_size
                return self._rows * (self.wide + narrow) + wide + gathered
        if not self.keeps_logits:
            return 0
        logits = self.layers.tokens * self._columns
        if not self.shape.norm_head:
            return (self.wide + self.item) * logits
        # rows at length 1, for the gradient of x; then their own gradient, made that of the rows
        pieces = unit_rows_moment(self.shape, columns=self._columns, wide=self.wide)
        rows = max(self.item * self._rows, self.wide * self._rows + pieces)
        return max((self.wide + self.item) * logits, self.item * logits + rows)

    def added(self, work: Work) -> int:
        """What there is of a gradient while it is added to a sum, and the work that made it is over."""
        return self.item * self._rows if work.part == "embedding" else self._weight_gradient(work)

    def _weight_gradient(self, work: Work) -> int:
        """Of one that is no part of a sum yet, in the type of weights."""
        if self.fuse_main_grads or work.part not in ("qkv", "out", "gate_up", "down", "head"):
            return 0
        if work.part == "head":
            return self.item * self._rows
        columns = {
            "qkv": self.shape.attention_size + 2 * self.shape.kv_size,
            "out": self.shape.attention_size,
            "gate_up": 2 * self.shape.ffn_size,
            "down": self.shape.ffn_size,
        }[work.part]
        return self.item * columns * self.shape.hidden_size // self.grid.tp

    def _owed(self, work: Work) -> int:
        """What a weight gradient that is put off needs: the gradient of its linear's output, and its input, gathered.

        Of a head that is one with the loss, its sum where that is not the main gradient.
        """
        hidden = self.layers.tokens * self.shape.hidden_size
        match work.part:
            case "qkv":
                return self.item * (hidden + self._heads + 2 * self._kv_heads)
            case "out":
                return self.item * (hidden + self._heads)
            case "gate_up":
                return self.item * (hidden + 2 * self._ffn)
            case "down":
                return self.item * (hidden + self._ffn)
            case "head":
                return self.item * hidden if self.keeps_logits else self.wide * self._rows * (not self.fuse_main_grads)
        return 0

    @property
    def _embedding(self) -> int:
        """The rows of each token, and which of them are this rank's."""
        return (8 + 1) * self.layers.tokens

    def _head(self, recompute: Recompute) -> int:
        """The final norm's input and scale, the gradient of its output, and each token's weight in the loss.

        Where main gradients are not added to within the product, also the head's own. Where the logits are kept,
        instead of these two the norm's output, a maximum and two sums.
        """
        modules = recompute.modules if self.keeps_logits else NO_MODULES
        kept = self.layers.norm(modules) + self.wide * (3 if self.keeps_logits else 1) * self.layers.tokens
        return kept + (0 if self.keeps_logits or self.fuse_main_grads else self.wide * self._rows)

    def _loss(self) -> int:
        """The loss's widest moment."""
        return loss_moment(
            self.shape,
            tokens=self.layers.tokens,
            columns=self._columns,
            item=self.item,
            wide=self.wide,
            chunk_tokens=self.loss_chunk_tokens,
            sequence_parallel=self.sequence_parallel,
        )

    def _attention(self) -> int:
        """The widest moment of attention's backward, where that is not the kernel's own affair."""
        return attention_moment(
            self.shape,
            self.grid,
            micro_batch=self.micro_batch,
            item=self.item,
            wide=self.wide,
            context_method=self.context_method,
        )

    @property
    def _widens(self) -> bool:
        return self.wide > self.item

    @property
    def _columns(self) -> int:
        """C: logits of a token on one rank, padded columns included."""
        return self.shape.padded_vocab_size // self.grid.tp

    @property
    def _rows(self) -> int:
        """C H: elements of the embedding, and of the head."""
        return self._columns * self.shape.hidden_size

    @property
    def _ffn(self) -> int:
        """T F."""
        return self.layers.tokens * self.shape.ffn_size // self.grid.tp

    @property
    def _heads(self) -> int:
        """T A."""
        return self.layers.tokens * self.shape.attention_size // self.grid.tp

    @property
    def _kv_heads(self) -> int:
        """T K."""
        return self.layers.tokens * self.shape.kv_size // self.grid.tp
