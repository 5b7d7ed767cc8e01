"""How well a model predicts tokens: of each the loss, and whether it was the likeliest."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.errors import DataError
from megatron_aquila.generate.runner import Runner, plain_batch
from megatron_aquila.model.aquila import AquilaStage, Head
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.vocab import vocab_parallel_argmax, vocab_parallel_cross_entropy
from megatron_aquila.pipeline.engine import Stage
from megatron_aquila.plan.loss_chunks import loss_chunk_tokens

UNDER_WAY: Final = 8  # batches in the pipeline at once
T = TypeVar("T")


def groups_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, the last of what is left."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def score(runner: Runner, batches: Iterable[Batch], take: Callable[[Tensor, Batch], None]) -> None:
    """Call ``take`` on the last stage's ranks with each batch's scores_2SB: losses in nats, and 1 where likeliest.

    A batch is what this rank computes of its rows. Communicates: activations between stages, small values of each place
    over tp, what attention does over cp. All ranks of a pipeline have the same batches, all of one shape.
    """

    def scoring(stage: AquilaStage) -> Stage:
        def run(x: Tensor | None, batch: Batch) -> Tensor:
            ending = partial(_scores, runner=runner, labels_SB=batch.labels_BS.T)
            return stage.infer(x, batch.tokens_BS, batch.positions_BS, ending=ending)

        return run

    def taken(scores_2SB: Tensor, batch: Batch) -> Tensor:
        take(scores_2SB, batch)
        return scores_2SB

    stages = {number: scoring(stage) for number, stage in runner.stages.items()}
    for together in groups_of(batches, UNDER_WAY):
        numbered = [replace(batch, microbatch=number) for number, batch in enumerate(together)]
        runner.forward(numbered, stages, taken, length=together[0].tokens_BS.shape[1])


def _scores(head: Head, x_SBH: Tensor, *, runner: Runner, labels_SB: Tensor) -> Tensor:
    """A chunk of logits at a time, as in training."""
    x_RH, labels_R = head.norm(x_SBH).flatten(0, 1), labels_SB.flatten()
    row_bytes = head.output.weight.shape[0] * x_RH.element_size()
    size = loss_chunk_tokens(len(x_RH), row_bytes=row_bytes, wanted=None)
    found, tp, vocab_size = [], runner.ctx.tp, runner.shape.vocab_size
    for x, labels in zip(torch.split(x_RH, size), torch.split(labels_R, size), strict=True):
        logits, labels_1R = head.output(x.unsqueeze(0)), labels.unsqueeze(0)
        losses = vocab_parallel_cross_entropy(logits, labels_1R, tp=tp, vocab_size=vocab_size)
        is_top = vocab_parallel_argmax(logits, tp=tp, vocab_size=vocab_size) == labels_1R
        found.append(torch.cat([losses, is_top.to(losses.dtype)]))
    return torch.cat(found, dim=1).view(2, *labels_SB.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Of one data set: ``num_tokens`` were predicted, ``num_right`` of them as the likeliest.

    ``by_position``: the same of the tokens in each of ``position_bins``; one without tokens has a loss of NaN.
    """

    name: str
    num_tokens: int
    num_right: int
    loss: float
    by_position: tuple["Score", ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss); the loss is in nats a token."""
        return float(np.exp(self.loss))

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest."""
        return self.num_right / self.num_tokens


def position_bins(seq_len: int, num_bins: int) -> list[range]:
    """The places of a window in ``num_bins`` parts of like length, ascending."""
    starts = [-(-seq_len * number // num_bins) for number in range(num_bins + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def evaluate(
    runner: Runner,
    datasets: Sequence[IndexedDataset],
    *,
    seq_len: int,
    batch: int,
    max_tokens: int | None = None,
    num_bins: int = 1,
) -> list[Score]:
    """Score every token but the first of each data set once, the first ``max_tokens`` where given.

    A window of ``seq_len`` tokens begins where the one before it ended: documents follow each other as in training. The
    last window is filled up with what does not count, and so is each that cp could not share; nothing sees that.
    Replicas share the windows. Tokens are also added up by their place in the window, in ``num_bins`` of
    ``position_bins``. Equal on every rank. Collective over the world.

    Raises:
        DataError: a data set has fewer than two tokens, or one outside the model's vocabulary.
    """
    totals = [_num_scored(dataset, max_tokens, runner.shape.vocab_size) for dataset in datasets]
    windows = [
        (source, start) for source, total in enumerate(totals) for start in range(0, total, seq_len)
    ]  # every rank's
    dp, width = runner.ctx.dp, runner.splittable(seq_len)
    sums_SP3 = torch.zeros(len(datasets), num_bins, 3, dtype=torch.float64, device=runner.ctx.device)
    bin_S = (runner.places(width).to(runner.ctx.device) * num_bins // seq_len).clamp(max=num_bins - 1)

    def take(scores_2SB: Tensor, batch: Batch) -> None:
        mask_SB = batch.loss_mask_BS.T.double()
        counted_3SB = torch.cat([scores_2SB * mask_SB, mask_SB.unsqueeze(0)])
        by_bin_3PB = sums_SP3.new_zeros(3, num_bins, mask_SB.shape[1]).index_add_(1, bin_S, counted_3SB)
        sums_SP3.index_add_(0, batch.source_B, by_bin_3PB.permute(2, 1, 0))

    def batches() -> Iterable[Batch]:
        for mine in groups_of(windows[dp.rank :: dp.size], batch):
            filled = [*mine, *[(mine[-1][0], None)] * (batch - len(mine))]
            rows = [_window(datasets[source], totals[source], start, seq_len, width) for source, start in filled]
            yield _batch(rows, [source for source, _ in filled], runner)

    score(runner, batches(), take)
    if runner.ctx.tp.rank != 0:
        sums_SP3.zero_()  # the ranks of tp have the same sums
    sums = all_reduce_(sums_SP3, runner.ctx.world).tolist()
    names = [f"{bin.start}-{bin.stop - 1}" for bin in position_bins(seq_len, num_bins)]
    found = [_score(str(dataset.prefix), names, parts) for dataset, parts in zip(datasets, sums, strict=True)]
    for one, total in zip(found, totals, strict=True):
        assert one.num_tokens == total, f"{one.num_tokens} tokens were counted of {total}"
    return found


def _score(name: str, bin_names: Sequence[str], sums: Sequence[Sequence[float]]) -> Score:
    """Of each bin the sums of losses, of likeliest tokens, and of tokens."""

    def part(name: str, loss: float, right: float, count: float) -> Score:
        mean = loss / count if count > 0 else math.nan
        return Score(name=name, num_tokens=round(count), num_right=round(right), loss=mean)

    whole = part(name, *(sum(column) for column in zip(*sums, strict=True)))
    return replace(whole, by_position=tuple(part(name, *one) for name, one in zip(bin_names, sums, strict=True)))


def _num_scored(dataset: IndexedDataset, max_tokens: int | None, vocab_size: int) -> int:
    count = len(dataset.tokens) - 1
    if count < 1:
        raise DataError(f"{dataset.prefix}: it has {count + 1} tokens; there is nothing to predict")
    count = count if max_tokens is None else min(count, max_tokens)
    largest = int(dataset.tokens[: count + 1].max())
    if largest >= vocab_size:  # on every rank: none may leave while the others go on
        raise DataError(
            f"{dataset.prefix}: token {largest} is outside the model's vocabulary of {vocab_size}; the data is of "
            "another tokenizer"
        )
    return count


def _window(
    dataset: IndexedDataset, total: int, start: int | None, seq_len: int, width: int
) -> tuple[NDArray[np.int64], int]:
    """``seq_len`` + 1 tokens, zeros behind the last up to ``width`` + 1, and how many labels count; none without a
    ``start``.
    """
    row = np.zeros(width + 1, dtype=np.int64)
    if start is None:
        return row, 0
    count = min(seq_len, total - start)
    row[: count + 1] = dataset.tokens[start : start + count + 1]
    return row, count


def _batch(rows: Sequence[tuple[NDArray[np.int64], int]], sources: Sequence[int], runner: Runner) -> Batch:
    """What this rank computes of ``rows``."""
    tokens = torch.from_numpy(np.stack([row for row, _ in rows]))
    places_S = runner.places(tokens.shape[1] - 1)
    counts_B1 = torch.tensor([[count] for _, count in rows])
    positions_BS = places_S.expand(len(rows), -1)
    whole = replace(
        plain_batch(tokens[:, places_S], positions_BS, tokens[:, places_S + 1]),
        loss_mask_BS=(positions_BS < counts_B1).float(),
        source_B=torch.tensor(sources),
    )
    return whole.to(runner.ctx.device)


def score_rows(runner: Runner, rows: Sequence[Sequence[int]], *, batch: int) -> list[list[tuple[float, bool]]]:
    """Of each row, for every token but the first: its log probability in nats, and whether it was the likeliest.

    Rows are padded on the right, where nothing sees it, those of like length together. Equal on every rank of a
    pipeline. Collective over tp, cp and pp.
    """
    found: dict[int, list[tuple[float, bool]]] = {}
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for numbers in groups_of(order, batch):
        longest = 1 + runner.splittable(max(1, max(len(rows[number]) for number in numbers) - 1))
        padded = [np.array([*rows[number], *[0] * (longest - len(rows[number]))], dtype=np.int64) for number in numbers]
        made = _batch([(row, longest - 1) for row in padded], [0] * len(padded), runner)
        scores_2SB = torch.zeros(2, longest - 1, len(numbers), dtype=torch.float64, device=runner.ctx.device)
        places_S = runner.places(longest - 1).to(scores_2SB.device)
        score(runner, [made], partial(_put, scores_2SB, places_S))
        for group in (runner.ctx.pp, runner.ctx.cp):
            all_reduce_(scores_2SB, group)  # zeros but from the last stage, and but where this rank computes
        for number, losses, right in zip(numbers, *scores_2SB.transpose(1, 2).tolist(), strict=True):
            size = max(0, len(rows[number]) - 1)
            found[number] = [(-loss, bool(hit)) for loss, hit in zip(losses[:size], right[:size], strict=True)]
    return [found[number] for number in range(len(rows))]


def _put(into_2SB: Tensor, places_S: Tensor, scores_2SB: Tensor, _batch: Batch) -> None:
    into_2SB.index_copy_(1, places_S, scores_2SB.to(into_2SB.dtype))
