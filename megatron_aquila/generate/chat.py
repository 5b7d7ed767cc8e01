"""The five templates of Aquila's chat models, and conversations in them as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import regex

from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import DataError

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """``system``, then the turns: ``human``, ``gap``, question, ``human_end``, ``assistant``, ``gap``, answer, its end.

    ``specials`` are the special tokens among these texts; ``stop_words`` end an answer beside the end of a document.
    """

    system: str
    human: str
    assistant: str
    gap: str
    human_end: str
    assistant_end: str
    specials: tuple[str, ...] = ("</s>",)
    stop_words: tuple[str, ...] = ()


def _named(*, system: str, human_end: str, assistant_end: str, mark: str = "") -> Template:
    return Template(
        system=system,
        human=f"{mark}Human:",
        assistant=f"{mark}Assistant:",
        gap=" ",
        human_end=human_end,
        assistant_end=assistant_end,
        stop_words=("###",),
    )


def _marked(*, system: str) -> Template:
    human, assistant, end = specials = "<|startofpiece|>", "<|endofpiece|>", "</s>"
    return Template(
        system=system, human=human, assistant=assistant, gap="", human_end="", assistant_end=end, specials=specials
    )


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "aquila": _named(system=f"{SYSTEM}###", human_end="###", assistant_end="</s>"),
        "aquila-chat": _named(system=f"{SYSTEM}###", human_end="###", assistant_end="###"),
        "aquila-legacy": _named(system=f"{SYSTEM}\n\n", human_end="\n", assistant_end="</s>", mark="### "),
        "aquila-v1": _marked(system=""),
        "aquila-v2": _marked(system=f"{SYSTEM}\n\n"),
    }
)


def chat_tokens(tokenizer: Tokenizer, template: Template, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
    """The prompt for the answer to ``question`` after the ``turns``, each a question and its answer.

    Special tokens come from the template alone: what looks like one in a question is text. Otherwise the ids are those
    of the whole text, a space at its end, as Aquila's own programs give it.

    Raises:
        DataError: the tokenizer lacks a special token of the template.
    """
    pieces = [(template.system, True)]
    for asked, answer in turns:
        pieces += _turn(template, asked)
        pieces += [(template.gap + answer, False), (template.assistant_end, True)]
    pieces += [*_turn(template, question), (" ", False)]
    ids: list[int] = []
    plain = ""
    for text, is_ours in pieces:
        for part in _parts(text, template.specials) if is_ours else [text]:
            if not (is_ours and part in template.specials):
                plain += part
                continue
            number = tokenizer.token_id(part)
            if number is None:
                raise DataError(f"the tokenizer has no special token {part}, which this chat template needs")
            ids += [*tokenizer.encode(plain), number]
            plain = ""
    return ids + tokenizer.encode(plain)


def _turn(template: Template, question: str) -> list[tuple[str, bool]]:
    """A question up to where its answer begins; whether each text is the template's."""
    return [
        (template.human, True), (template.gap + question, False), (template.human_end + template.assistant, True)
    ]  # fmt: skip


def _parts(text: str, specials: Sequence[str]) -> list[str]:
    """``text`` in order, special tokens apart."""
    pattern = "(" + "|".join(regex.escape(special) for special in specials) + ")"
    return [part for part in regex.split(pattern, text) if part != ""]
