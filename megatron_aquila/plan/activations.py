"""What autograd keeps of a stage's layers for their backward, and how much of it waits on the host. See ``memory``."""

from dataclasses import dataclass
from itertools import accumulate

from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.offload import pinned_bytes, spread
from megatron_aquila.plan.recompute import NO_MODULES, Module, Recompute
from megatron_aquila.plan.sequence import ContextMethod, num_shared_heads
from megatron_aquila.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Divided:
    """Bytes that layers keep of one microbatch: ``by_layer``, on the device, from forward to backward; ``away``, on the
    host, in buffers of ``taken`` bytes; and ``passing``, of those away, what the device holds beside them while layers
    are at work. What is kept of a group that is recomputed counts as its first layer's.
    """

    by_layer: tuple[int, ...]
    away: int
    taken: int
    passing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """What the count needs. ``item`` and ``wide``: bytes of an activation, and of what is computed in float32 or wider.
    ``offloaded``: of how many of a stage's layers activations go to the host. ``pinned``: its buffers are.
    """

    shape: ModelShape
    grid: RankGrid
    micro_batch: int
    sequence_parallel: bool
    context_method: ContextMethod
    item: int
    wide: int
    offloaded: int = 0
    pinned: bool = False

    def divided(self, num_layers: int, recompute: Recompute) -> Divided:
        """Of a stage's ``num_layers``.

        While a layer is at work, forward or backward, the device has what stays of it and of those before it; if its
        own leave, these; and those of the last before it that leave, on their way to the host or back.
        """
        rest = num_layers - sum(recompute.groups)
        sizes = [*recompute.groups, *(1 for _ in range(rest))]
        units = [*(self.hidden for _ in recompute.groups), *(self.layer(recompute.modules) for _ in range(rest))]
        chosen = spread(len(units), self.offloaded)
        leaves = [size * (unit in chosen) for unit, size in enumerate(units)]
        stays = [size - left for size, left in zip(units, leaves, strict=True)]
        here = list(accumulate(stays))
        last, most = 0, 0
        for unit, left in enumerate(leaves):
            most = max(most, here[unit] + left + last)
            last = left if unit in chosen else last
        by_layer = [of for stay, size in zip(stays, sizes, strict=True) for of in (stay, *(0 for _ in range(size - 1)))]
        taken = sum(pinned_bytes(left) if self.pinned else left for left in leaves)
        return Divided(tuple(by_layer), away=sum(leaves), taken=taken, passing=max(0, most - sum(stays)))

    def layer(self, modules: frozenset[Module] = NO_MODULES) -> int:
        """Bytes that autograd keeps of one layer and microbatch, less the outputs of ``modules``.

        Elements a token, 1/tp of each: q, k, v and the attention's output, gate and up 2 F, their product F; in at
        least four bytes the attention's log-sum 1 a head. Ulysses keeps q, k and v of whole samples and fewer heads,
        copies of k's and v's among them, and the output both so and as it is split. Beside them the two norms.
        """
        shape, attention, product = self.shape, "attention" not in modules, "swiglu" not in modules
        outputs, kv_size = int(attention), shape.kv_size
        if attention and self.grid.cp > 1 and self.context_method == "ulysses":
            shared = self.grid.tp * num_shared_heads(shape.num_kv_heads // self.grid.tp, self.grid.cp)
            outputs, kv_size = 2, shared * shape.head_dim
        shard = (1 + outputs) * shape.attention_size + 2 * kv_size + (2 + product) * shape.ffn_size
        wide = self.wide * attention * shape.num_heads
        return 2 * self.norm(modules) + (self.item * shard + wide) * self.tokens // self.grid.tp

    def norm(self, modules: frozenset[Module]) -> int:
        """Bytes that autograd keeps of a norm: its input and output 2 H, whole where the sequence is not split, and its
        scale in at least four bytes; recomputed, its input alone. A layer's second norm is of a sum: recomputed, it
        keeps the attention's output, and the other term is what the first norm keeps.
        """
        output = "norms" not in modules
        return (1 + output) * self.hidden + self.wide * output * self.residual_tokens

    @property
    def hidden(self) -> int:
        """Bytes of this rank's part of a microbatch's residual stream: what is kept of a group that is recomputed."""
        return self.item * self.shape.hidden_size * self.residual_tokens

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one rank."""
        return self.micro_batch * self.shape.seq_len // self.grid.cp

    @property
    def residual_tokens(self) -> int:
        """Tokens of a microbatch in this rank's part of the residual stream."""
        return self.tokens // (self.grid.tp if self.sequence_parallel else 1)
