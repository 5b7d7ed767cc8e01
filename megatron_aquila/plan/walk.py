"""The fullest moment of a step: a walk through a rank's work, of which each part adds and frees weights, gradients and
activations.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_aquila.plan.buckets import StageBucket
from megatron_aquila.plan.moments import StageBytes
from megatron_aquila.plan.sharding import Gathered, Rounds, bucket_of
from megatron_aquila.plan.work import Pass, Passes, Work


class Moment(NamedTuple):
    """Bytes beside what is kept from step to step: whole buckets of sharded weights and of sharded gradients, what is
    kept for backward or owed to weight gradients, and of that the logits, and what is only there for the moment.
    """

    weights: int = 0
    main_grads: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """Through one rank's work.

    ``sharded_weights`` and ``sharded_grads``: the buckets of which the rank keeps only shards. ``num_pieces`` of a
    bucket are what a reduction leaves one of; ``copied``: bytes an element that it holds until then; ``gradient``:
    bytes of a main gradient. ``overlap``: weights are gathered ahead, gradients reduced beside backward, and messages
    received beside the work before.
    """

    passes: Passes
    sizes: StageBytes
    sharded_weights: Sequence[StageBucket]
    sharded_grads: Sequence[StageBucket]
    num_pieces: int
    gradient: int
    copied: Callable[[int], int]
    overlap: bool

    def fullest(self, program: Sequence[Pass], *, by: Callable[[Moment], int] = sum) -> Moment:
        """The moment of a step that is ``program`` at which there is most, of all or of what ``by`` says.

        What a pass does depends on the buckets that it finds whole, and on what its microbatch recomputes: passes that
        agree in these are walked once.
        """
        gathered = Gathered(self.sharded_weights, ahead=self.overlap)
        rounds = Rounds(self.sharded_grads, overlap=self.overlap)
        seen: dict[Any, tuple[Moment, int, int, Any, Any]] = {}
        fullest, activations, logits = Moment(), 0, 0
        for (op, stage, microbatch), messages in zip(program, self._messages(program), strict=True):
            key = op, stage, self.passes.recompute.at(stage, microbatch), gathered.state, rounds.state
            if key not in seen:
                seen[key] = *self._of_pass(op, stage, microbatch, gathered, rounds, by), gathered.state, rounds.state
            found, more, more_logits, gathered.state, rounds.state = seen[key]
            at_most = found._replace(
                activations=activations + found.activations,
                logits=logits + found.logits,
                temporaries=found.temporaries + messages * self.sizes.message,
            )
            fullest = max(fullest, at_most, key=by)
            activations, logits = activations + more, logits + more_logits
        assert activations == logits == 0, f"{activations} bytes of activations and {logits} of logits are never freed"
        return fullest

    def _of_pass(
        self,
        op: str,
        stage: int,
        microbatch: int,
        gathered: Gathered,
        rounds: Rounds,
        by: Callable[[Moment], int],
    ) -> tuple[Moment, int, int]:
        """The fullest moment of a pass, and what it leaves more of activations and of logits than it found."""
        sizes, recompute = self.sizes, self.passes.recompute.at(stage, microbatch)
        kept, again = sizes.tables * (op == "F"), 0
        logits, leaves = 0, {"F": 1, "B": -1, "I": 0, "W": -1}[op] * sizes.logits
        divided = sizes.divided(stage, recompute)
        fullest, place_of = Moment(), (bucket_of(self.sharded_weights), bucket_of(self.sharded_grads))

        def note(beside: int) -> None:
            nonlocal fullest
            grads = (rounds.elements + rounds.reducing // self.num_pieces) * self.gradient
            beside += again + (self.copied(rounds.reducing) if rounds.reducing else 0)
            moment = Moment(gathered.elements * sizes.item, grads, kept, logits, beside)
            fullest = max(fullest, moment, key=by)

        for work in self.passes.works(op, stage, microbatch):
            change, beside = sizes.change(work, recompute, divided), sizes.beside(work, recompute, divided)
            kept, again, later = kept + change.before, again + max(0, change.again), change.after
            logits += leaves * (work.part == "head")
            note(beside)
            if work.part in ("embedding", "head") and sizes.added(work) and "add" in work.deeds and op != "W":
                kept, later, beside = kept + later, 0, sizes.added(work)  # which autograd does once it is over
            for deed in work.deeds:
                self._do(deed, stage, work, gathered, rounds, place_of)
                note(beside)
                rounds.settle()
            kept, again = kept + later, again + min(0, change.again)
        kept -= sizes.tables * (op in "BI")
        return fullest, kept, logits

    def _do(
        self, deed: str, stage: int, work: Work, gathered: Gathered, rounds: Rounds, place_of: Sequence[dict[Any, int]]
    ) -> None:
        weights, grads = (places.get((stage, work.place)) for places in place_of)
        if deed == "read" and weights is not None:
            gathered.read(weights)
        elif deed == "add" and grads is not None:
            rounds.add(grads)
        elif deed == "done" and grads is not None:
            rounds.done(grads)

    def _messages(self, program: Sequence[Pass]) -> Iterator[int]:
        """Of each pass how many messages there are beside it.

        The last two that were sent over each link, its own among them: one may wait for the one before. What one stage
        of this rank left for another. What came for a backward, which holds it. With ``overlap`` what the next pass
        takes, which is on its way.
        """
        sent, left = Counter[tuple[str, int]](), 0
        for of, following in zip(program, [*program[1:], None], strict=True):
            source, target = self._ends(of)
            me = self.passes.stages.stage_rank[of[1]]
            left += (target == me) - (source == me)
            if target not in (me, None):
                sent[of[0], target] += 1
            coming = self.overlap and following is not None and self._ends(following)[0] not in (me, None)
            yield sum(min(count, 2) for count in sent.values()) + left + (of[0] != "F" and source is not None) + coming

    def _ends(self, of: Pass) -> tuple[int | None, int | None]:
        """The pipeline ranks that a pass gets its input from and has its output for; None where there is none."""
        (op, stage, _), ranks = of, self.passes.stages.stage_rank
        if op == "W":
            return None, None
        before = ranks[stage - 1] if stage > 0 else None
        after = ranks[stage + 1] if stage + 1 < len(ranks) else None
        return (before, after) if op == "F" else (after, before)
