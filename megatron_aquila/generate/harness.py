"""The lm-evaluation-harness's view of a model. The one door to the optional package lm_eval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import AquilaError
from megatron_aquila.generate.generate import generate
from megatron_aquila.generate.runner import Runner
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.generate.scoring import groups_of, score_rows
from megatron_aquila.generate.stops import Stops

if TYPE_CHECKING:
    from lm_eval.api.model import LM

DEFAULT_NEW_TOKENS = 256  # the harness's own
_MISSING = "lm_eval is not installed: pip install 'megatron_aquila[lm-eval]'"


class Answers:
    """What the harness asks, of texts. Every rank of the pipeline is asked the same in the same order.

    A text with nothing before it begins after the tokenizer's first token, or after its end of a document.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, *, batch: int) -> None:
        self.tokenizer, self.runner, self.batch = tokenizer, runner, batch
        begin = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        if begin is None:
            raise AquilaError("the tokenizer has no token for a text to begin with, which the harness needs")
        self.begin: int = begin

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Of (context, continuation) in tokens: the log probability, and whether greedy decoding gives it.

        A context that is too long loses its beginning.
        """
        longest = self.runner.shape.seq_len + 1  # the last token is only predicted
        rows = [[*context, *continuation][-longest:] for context, continuation in pairs]
        scored = score_rows(self.runner, rows, batch=self.batch)
        tails = [found[-len(pair[1]) :] for found, pair in zip(scored, pairs, strict=True)]
        return [(sum(value for value, _ in tail), all(hit for _, hit in tail)) for tail in tails]

    def whole(self, texts: Sequence[str]) -> list[float]:
        """The log probability of each text, every token once, after as much of it as the model takes."""
        windows = [
            rolling_windows([self.begin, *self.tokenizer.encode(text)], self.runner.shape.seq_len) for text in texts
        ]
        scores = iter(self.continuations([window for of_text in windows for window in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def texts(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A continuation of each (context, settings); ``until`` are words that end it."""
        return [
            answer
            for number, group in enumerate(groups_of(asked, self.batch))
            for answer in self._together(group, number)
        ]

    def _together(self, asked: Sequence[tuple[str, Mapping[str, Any]]], number: int) -> list[str]:
        """One batch where the settings are the same, else one by one."""
        _, settings = asked[0]
        if any(other != settings for _, other in asked):
            return [answer for one in asked for answer in self._together([one], number)]
        until = settings.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        new = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        room = max(1, self.runner.shape.seq_len - new)
        prompts = [([self.begin] if context == "" else self.tokenizer.encode(context))[-room:] for context, _ in asked]
        draws = bool(settings.get("do_sample", False))
        found = generate(
            self.runner,
            prompts,
            decode=self.tokenizer.decode,
            how=Sampling(
                temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
                top_k=int(settings.get("top_k", 0)),
                top_p=float(settings.get("top_p", 1.0)),
            ),
            stops=Stops(
                ids=frozenset() if self.tokenizer.eod is None else frozenset([self.tokenizer.eod]),
                words=tuple(word for word in until if word != ""),
            ),
            max_new_tokens=new,
            first_row=number * self.batch,
        )
        return [one.text for one in found]


def rolling_windows(ids: Sequence[int], longest: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(context, predicted): every token but the first is predicted once, ``longest`` of them at a time.

    What the last window has room for beside its own is context, as the harness has it.
    """
    bounds = [(first, min(first + longest, len(ids))) for first in range(1, len(ids), longest)]
    return [(ids[max(0, stop - 1 - longest) : first], ids[first:stop]) for first, stop in bounds]


def harness_model(answers: Answers) -> "LM":
    """``answers`` as the harness's model. Raises ``AquilaError`` where lm_eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise AquilaError(_MISSING) from error

    class Model(TemplateLM):  # type: ignore[misc]  # the package may be absent
        @property
        def eot_token_id(self) -> int:
            return answers.begin

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return answers.tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answers.continuations([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return answers.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return answers.texts([request.args for request in requests])

    model: LM = Model()
    return model


def run_tasks(answers: Answers, tasks: Sequence[str], *, folder: Path | None, limit: int | None) -> dict[str, Any]:
    """The harness's results by task, its own tasks and those of the YAML files in ``folder``.

    Every rank runs the harness and has the same results. Raises ``AquilaError`` where lm_eval is not installed or
    knows no such task.
    """
    model = harness_model(answers)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise AquilaError(f"--tasks {' '.join(unknown)}: the harness knows no such task; is it in --task-path?")
    found = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    results: dict[str, Any] = found["results"]
    return results
