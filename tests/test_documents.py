"""Pages: commands, flags, links and files that they name exist, and Chinese pages have the English commands."""

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_aquila.__main__ import COMMANDS, main
from megatron_aquila.commands.megatron_preprocess import MEANINGS
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.migrate import known_flags

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md", "examples/*/README.md")
    for path in sorted(ROOT.glob(pattern))
]
WRITTEN = [page for page in PAGES if page.name != "from-megatron.md"]  # that one is generated, of flags not ours
TWINS = [("README.md", "README_zh.md"), ("docs/getting-started.md", "docs/getting-started_zh.md")]
GROUPS = {  # commands whose first word says which
    "data": "verify inspect stats merge index trace",
    "tokenizer": "train compare extend resize",
    "ckpt": "list show verify diff tag prune",
    "convert": "inspect",
    "selftest": "resume",
    "doctor": "hang",
    "config": "show from-megatron",
}
ELSEWHERE = {
    "--output-dir": "examples/quickstart/run.py",
    "--threads": "benchmarks/cpu.py",
    "--clock": "benchmarks/cpu.py",
    "--ours": "benchmarks/step.py",
    "--minutes": "tests/chaos/__main__.py",
    "--injections": "tests/chaos/__main__.py",
    "--launcher": "tests/chaos/__main__.py",
    "--kinds": "tests/chaos/__main__.py",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def read(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Code blocks, each with its language and its lines without comments; a continued line is one."""
    found = []
    for language, body in FENCE.findall(text):
        lines = (re.sub(r"(^|\s+)#( .*)?$", "", line).strip() for line in body.replace("\\\n", " ").splitlines())
        found.append((language, [re.sub(r"\s+", " ", line) for line in lines if line]))
    return found


def spans(text: str) -> list[str]:
    """Inline code; one that runs over a line's end is one line."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def links(text: str) -> list[str]:
    """Targets of links within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    return [target for target in found if "://" not in target]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def flags_of(*path: str) -> frozenset[str]:
    """Every flag that the help of a command names."""
    told = io.StringIO()
    with redirect_stdout(told), suppress(SystemExit):
        main([*path, "--help"])
    return frozenset(FLAG.findall(told.getvalue()))


@cache
def torchrun_flags() -> frozenset[str]:
    return frozenset(get_args_parser()._option_string_actions)


def calls(text: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The calls of our commands and of torchrun that a line, a block or a span of a page makes, each with its words."""
    for part in re.split(r"\s(?:\||>|&&)\s", text.removeprefix("$ ")):
        try:
            words = shlex.split(part)
        except ValueError:  # prose with an apostrophe
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[:1] == ["torchrun"]:
            own = next(
                (at for at, word in enumerate(words) if word.endswith((".py", "...")) or word == "-m"), len(words)
            )
            yield ("torchrun",), words[1:own]
            words = ["python", *words[own:]]
        if words[:2] == ["python", "..."]:
            words[1] = "pretrain_aquila.py"
        if words[:2] == ["python", "pretrain_aquila.py"]:
            yield ("pretrain",), words[2:]
        elif words[:2] == ["python", "tools/preprocess_data.py"]:
            yield ("preprocess",), words[2:]
        elif words[:1] == ["aquila"] or words[:3] == ["python", "-m", "megatron_aquila"]:
            rest = words[1 if words[0] == "aquila" else 3 :]
            deep = 2 if len(rest) > 1 and rest[1] in GROUPS.get(rest[0], "").split() else 1
            yield tuple(rest[:deep]), rest[deep:]


def unknown(text: str) -> list[str]:
    """The commands and flags of ``calls`` that do not exist."""
    wrong = []
    for path, words in calls(text):
        given = [match[0] for word in words if (match := FLAG.match(word))]
        if path == ("torchrun",):
            wrong += [f"torchrun {flag}" for flag in given if flag not in torchrun_flags()]
        elif not path or path[0] not in COMMANDS:
            wrong += [] if not path or not path[0].isalpha() or path[0].isupper() else [f"aquila {path[0]}"]
        elif given:
            wrong += [" ".join((*path, flag)) for flag in given if flag.replace("_", "-") not in flags_of(*path)]
    return wrong


@cache
def all_flags() -> frozenset[str]:
    """Every flag of any command, Megatron's and torchrun's among them."""
    paths = [(name, *sub) for name in COMMANDS for sub in [(), *((word,) for word in GROUPS.get(name, "").split())]]
    return frozenset({*known_flags(), *MEANINGS, *torchrun_flags(), *ELSEWHERE}).union(
        *(flags_of(*path) for path in paths)
    )


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_command_of_a_page_exists_with_its_flags(page: Path) -> None:
    text = read(page)
    lines = [line for _, block in blocks(text) for line in block]
    assert [wrong for line in [*lines, *spans(text)] for wrong in unknown(line)] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    named = {flag.replace("_", "-") for span in spans(read(page)) for flag in FLAG.findall(span)}
    assert named - all_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in links(read(page)):
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        if not to.exists() or (anchor and anchor not in anchors(read(to))):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Tests, files of the repository and targets of make; the changelog also names what is gone."""
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    text = read(page)
    for span in [*spans(text), *(line for _, block in blocks(text) for line in block)]:
        path = re.match(r"(?:tests|docs|examples|tools|benchmarks)/[\w/.-]+", span)
        assert path is None or (ROOT / path[0].rstrip(".")).exists(), span
        made = re.match(r"make ([a-z]+)", span)
        assert made is None or made[1] in targets, span


@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_the_chinese_page_has_the_english_commands(english: str, chinese: str) -> None:
    one, other = read(english), read(chinese)
    assert blocks(one) == blocks(other)
    assert set(spans(one)) == set(spans(other))
    pages = [{target.partition("#")[0].replace("_zh.md", ".md") for target in links(text)} for text in (one, other)]
    assert pages[0] == pages[1]


def repeated(text: str) -> list[str]:
    """Measured times, speeds and amounts of memory in paragraphs and points that lead to the page of benchmarks."""
    parts = re.split(r"\n\s*\n|\n- ", FENCE.sub("", text))
    figure = r"\d[\d.,]* (?:m?s|min|[KMG]i?B|tok/s|tokens/s)\b"
    return [found for part in parts if "benchmarks.md" in part for found in re.findall(figure, part)]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=name_of)
def test_a_figure_of_the_benchmarks_stands_on_their_page_only(page: Path) -> None:
    assert repeated(read(page)) == []


def test_the_readme_leads_to_every_page() -> None:
    led = set(links(read("README.md")))
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md") if not path.stem.endswith("_zh")} <= led
    assert "docs/getting-started_zh.md" in links(read("README_zh.md"))


def test_every_experiment_says_what_was_expected_measured_and_kept() -> None:
    rows = [line.strip("| ").split(" | ") for line in read("docs/log.md").splitlines() if line.startswith("| ")]
    assert rows[0] == ["tried", "expected", "measured", "kept"]
    assert len(rows) > 30
    assert [row for row in rows if len(row) != 4 or "" in row or "expected: " in row[2]] == []


def test_every_extra_is_in_the_table() -> None:
    extras = set(re.findall(r'^        "([a-z-]+)": \[', read("setup.py"), re.MULTILINE))
    table = re.findall(r"^\| (`.*?) \|", read("docs/getting-started.md"), re.MULTILINE)
    assert set(re.findall("`([a-z-]+)`", " ".join(table))) == extras != set()


def test_the_config_of_getting_started_trains_with_its_commands(tmp_path: Path) -> None:
    found = blocks(read("docs/getting-started.md"))
    body = next(body for language, body in FENCE.findall(read("docs/getting-started.md")) if language == "yaml")
    (tmp_path / "my.yaml").write_text(body)
    starts = [words for _, block in found for line in block for path, words in calls(line) if path == ("pretrain",)]
    assert len(starts) == 2
    for words in starts:
        flags = [str(tmp_path / "my.yaml") if word == "my.yaml" else word for word in words]
        config = load_config(flags, world_size=4, to_train=True).config
        assert config.parallel.pipeline == 2


def test_every_command_is_asked_for_what_it_has() -> None:
    """The help of each names what is looked for here: a command without flags would pass anything over."""
    assert GROUPS.keys() <= COMMANDS.keys()
    for flag, file in ELSEWHERE.items():
        assert re.search(rf'"{flag}"|\b{flag[2:].replace("-", "_")}\b', read(file)), flag
    assert {"--load", "--prompt"} <= flags_of("generate")
    assert {"--tp", "--no-overlap", "--zero"} <= flags_of("pretrain")
    assert flags_of("data", "merge") == {"--help", "--overwrite", "--partial"}


def test_what_is_wrong_is_found() -> None:
    assert unknown("aquila parity my.yaml --tp 2 --pp 2") == []
    assert unknown("aquila convert to-hf --checkpoint a --output b") == ["convert --checkpoint", "convert --output"]
    assert unknown("$ aquila ckpt list DIR --deep | head") == ["ckpt list --deep"]
    assert unknown("NNODES=2 torchrun --nproc 8 pretrain_aquila.py --tpp 2") == ["torchrun --nproc", "pretrain --tpp"]
    assert unknown("aquila traim --tp 2") == ["aquila traim"]
    text = "# A `b`, c\n\n```bash\na --b \\\n    c  # d\n\n# e\n```\n[x](#a-b-c) `f\ng` [y](z.md) [w](https://w)\n"
    assert blocks(text) == [("bash", ["a --b c"])]
    assert repeated("- 3 s\n- built in 3.6 s, 1,004 MiB ([them](benchmarks.md))\n\n2 s") == ["3.6 s", "1,004 MiB"]
    assert (spans(text), links(text), anchors(text)) == (["b", "f g"], ["#a-b-c", "z.md"], {"a-b-c"})
