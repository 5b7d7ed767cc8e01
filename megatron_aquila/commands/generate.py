"""``aquila generate``: continue prompts, or chat, with a checkpoint or a Hugging Face folder; also under torchrun."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal

import tyro

from megatron_aquila.commands.using import ModelOptions, on_ranks, read_source, read_tokenizer, running
from megatron_aquila.errors import Problem, refuse
from megatron_aquila.train.launcher import Launch

if TYPE_CHECKING:
    from megatron_aquila.data.tokenizer import Tokenizer
    from megatron_aquila.generate.generate import Continuation
    from megatron_aquila.generate.runner import Runner
    from megatron_aquila.generate.source import Source
    from megatron_aquila.generate.stops import Stops

TemplateName = Literal["aquila", "aquila-chat", "aquila-legacy", "aquila-v1", "aquila-v2"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Continue prompts. One prompt is shown as it grows; with --chat and no prompt, questions are read from stdin."""

    prompt: tuple[str, ...] = ()
    """texts to continue, or with --chat questions, each of a conversation of its own"""
    chat: TemplateName | None = None
    """Aquila's chat template: aquila-v1 for AquilaChat2-7B, -legacy for 34B, -v2 for 70B, aquila for 16K models,
    aquila-chat for AquilaChat-7B"""
    max_new_tokens: int = 128
    """tokens of a continuation; none goes beyond --seq-len"""
    temperature: float = 1.0
    """0 takes the likeliest token always"""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the fewest likeliest tokens that have this probability together"""
    repetition_penalty: float = 1.0
    """logits of tokens that are there already are divided by this where positive, else multiplied"""
    stop_words: tuple[str, ...] = ()
    """a continuation ends before any of these"""
    stop_ids: tuple[int, ...] = ()
    """tokens that end a continuation, beside the tokenizer's end of a document and those that the weights came with"""
    ignore_eod: bool = False
    """go on after the end of a document"""
    bos: bool | None = None
    """begin with the tokenizer's first token; default in a chat only, as the data here has none"""
    batch: int = 16
    """prompts at once"""
    seed: int = 1234
    """of what is drawn: the same at any layout"""
    json: bool = False
    """a JSON object a prompt, with the tokens, instead of text"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(GenerateOptions, prog="aquila generate", description=__doc__, args=argv)

    def work(launch: Launch) -> None:
        check(options)
        run(options, launch)

    return on_ranks(work)


def check(options: GenerateOptions) -> None:
    """Raise ``ConfigError`` with everything that cannot be meant."""
    flags = {
        "--temperature": (options.temperature, options.temperature >= 0, "it cannot be negative", "0 is greedy"),
        "--top-k": (options.top_k, options.top_k >= 0, "it cannot be negative", "0 takes all"),
        "--top-p": (options.top_p, 0 < options.top_p <= 1, "it is a share", "use one above 0, up to 1"),
        "--repetition-penalty": (
            options.repetition_penalty, options.repetition_penalty > 0, "it divides", "use 1 for none",
        ),
        "--seq-len": (
            options.seq_len, options.seq_len is None or options.seq_len > 1, "prompt and answer need 2", "use more",
        ),
        "--max-new-tokens": (options.max_new_tokens, options.max_new_tokens > 0, "nothing is to be made", "use 1"),
        "--batch": (options.batch, options.batch > 0, "nothing is to be made", "use 1 or more"),
        "--stop-words": (
            "''", "" not in options.stop_words, "nothing would ever be shown", "leave the empty word out",
        ),
        "--prompt": (
            "(not given)", bool(options.prompt) or options.chat is not None, "there is nothing to continue",
            "give texts, or --chat TEMPLATE for a conversation",
        ),
    }  # fmt: skip
    problems = [Problem(flag, value, why, way) for flag, (value, is_right, why, way) in flags.items() if not is_right]
    refuse(problems)


def run(options: GenerateOptions, launch: Launch) -> None:
    """Read the model and answer."""
    source = read_source(options, launch, replicates=False)
    tokenizer = read_tokenizer(options, source)
    stops = _stops(options, source, tokenizer)
    with running(options, source, launch) as runner:
        speaks = launch.rank == 0
        if options.prompt:
            _answer_all(options, runner, tokenizer, stops, speaks=speaks)
        else:
            _converse(options, runner, tokenizer, stops, speaks=speaks)


def _stops(options: GenerateOptions, source: "Source", tokenizer: "Tokenizer") -> "Stops":
    """What ends an answer: what the tokenizer and the weights' publisher say, the template's words, and the flags'."""
    from megatron_aquila.checkpoint.published import end_ids
    from megatron_aquila.generate.chat import TEMPLATES
    from megatron_aquila.generate.stops import Stops

    own = set() if tokenizer.eod is None else {tokenizer.eod}
    own = set() if options.ignore_eod else own | end_ids(source.reader)
    words = TEMPLATES[options.chat].stop_words if options.chat is not None else ()
    return Stops(ids=frozenset([*own, *options.stop_ids]), words=(*words, *options.stop_words))


def _answer_all(
    options: GenerateOptions, runner: "Runner", tokenizer: "Tokenizer", stops: "Stops", *, speaks: bool
) -> None:
    streams = speaks and len(options.prompt) == 1 and not options.json
    for first in range(0, len(options.prompt), options.batch):
        texts = options.prompt[first : first + options.batch]
        prompts = [_tokens(options, tokenizer, [], text) for text in texts]
        if streams and options.chat is None:
            print(texts[0], end="", flush=True)
        answers = _generate(options, runner, tokenizer, stops, prompts, first_row=first, streams=streams)
        for text, answer in zip(texts, answers, strict=True):
            if streams:
                print()
            elif speaks:
                print(_json(text, answer) if options.json else f"{text} >>> {answer.text!r}", flush=True)


def _json(prompt: str, answer: "Continuation") -> str:
    found = {"prompt": prompt, "text": answer.text, "tokens": answer.tokens, "is_ended": answer.is_ended}
    return json.dumps(found, ensure_ascii=False)


def _converse(
    options: GenerateOptions, runner: "Runner", tokenizer: "Tokenizer", stops: "Stops", *, speaks: bool
) -> None:
    """A question a line from rank 0's stdin, until its end; the answers so far are part of each prompt.

    Of a conversation that has become too long the first turns are left out, and a question that is too long by itself
    is not answered; rank 0 says so.
    """
    from megatron_aquila.parallel.collectives import gather_objects

    turns: list[tuple[str, str]] = []
    for number in count():
        if speaks and sys.stdin.isatty():
            print("> ", end="", flush=True)
        line, *_ = gather_objects(sys.stdin.readline() if speaks else None, runner.ctx.host_world)
        if line == "":
            return
        question, longest = line.rstrip("\n"), runner.shape.seq_len
        kept, prompt = _within(options, tokenizer, turns, question, longest)
        note = None
        if len(prompt) >= longest:
            note = f"not answered: with its template the question has {len(prompt)} tokens; ask a shorter one"
        elif len(kept) < len(turns):
            note = f"the first {len(turns) - len(kept)} of {len(turns)} turns are left out from here on"
        if note is not None and speaks:
            print(f"note: {note}; a sequence has {longest} tokens at most, see --seq-len", file=sys.stderr, flush=True)
        if len(prompt) >= longest:
            continue
        (answer,) = _generate(options, runner, tokenizer, stops, [prompt], first_row=number, streams=speaks)
        turns = [*kept, (question, answer.text)]
        if speaks:
            print(flush=True)


def _within(
    options: GenerateOptions, tokenizer: "Tokenizer", turns: list[tuple[str, str]], question: str, longest: int
) -> tuple[list[tuple[str, str]], list[int]]:
    """The last turns that leave room for an answer, and the prompt with them.

    Room is --max-new-tokens, or where that is less a quarter of the longest sequence, so that a short one has turns.
    """
    room = min(options.max_new_tokens, longest // 4)
    while len(prompt := _tokens(options, tokenizer, turns, question)) > longest - room and turns:
        turns = turns[1:]
    return turns, prompt


def _tokens(options: GenerateOptions, tokenizer: "Tokenizer", turns: list[tuple[str, str]], text: str) -> list[int]:
    from megatron_aquila.generate.chat import TEMPLATES, chat_tokens

    is_chat = options.chat is not None
    begins = tokenizer.bos is not None and (is_chat if options.bos is None else options.bos)
    head = [tokenizer.bos] if begins and tokenizer.bos is not None else []
    if options.chat is None:
        return head + tokenizer.encode(text)
    return head + chat_tokens(tokenizer, TEMPLATES[options.chat], turns, text)


def _generate(
    options: GenerateOptions,
    runner: "Runner",
    tokenizer: "Tokenizer",
    stops: "Stops",
    prompts: list[list[int]],
    *,
    first_row: int,
    streams: bool,
) -> "list[Continuation]":
    from megatron_aquila.generate.generate import generate
    from megatron_aquila.generate.sampling import Sampling

    return generate(
        runner,
        prompts,
        decode=tokenizer.decode,
        how=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        ),
        stops=stops,
        max_new_tokens=options.max_new_tokens,
        show=(lambda row, piece: print(piece, end="", flush=True)) if streams else (lambda row, piece: None),
        first_row=first_row,
    )
