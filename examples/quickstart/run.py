"""The quickstart: corpus, tokenizer, training data, a run, its resume on another layout, conversion, generation.

    python examples/quickstart/run.py [--output-dir quickstart-out]

Every step prints the command it runs, so that each can be run alone. The first step that fails ends the program.
"""

import argparse
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aquila.observe.meters import Row
from megatron_aquila.observe.plot import plot_log
from megatron_aquila.observe.writers import LOG_NAME, read_log

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/quickstart")
LANGUAGES = {"zh": 0.5, "en": 0.3, "code": 0.2}  # weights of the blend
VOCAB_SIZE, PROCESSES = 4096, 4
STOP_SAMPLES = 960  # of the 2,880 of pretrain.yaml
PROMPTS = ("今天上午，", "这本书", "酒店的房间", "Return the", "The following", "def __init__(self")
MUST_FALL = 2.0  # nats below ln(vocabulary), the loss of a model that knows nothing
MARKER = ".aquila-quickstart"  # in a folder that an earlier quickstart may have filled
OUTPUTS = ("corpus", "tokenizer", "data", "checkpoints", "logs", "tensorboard", "huggingface")
FIRST, SECOND = ("tp 2 x pp 2", ["--tp", 2, "--pp", 2]), ("tp 1 x pp 2 x dp 2", ["--tp", 1, "--pp", 2])


@dataclass(frozen=True)
class Layout:
    """Where everything of the quickstart lies below ``out``."""

    out: Path

    def corpus(self, language: str) -> Path:
        """The documents of a language."""
        return self.out / "corpus" / f"{language}.jsonl"

    def data(self, language: str) -> Path:
        """The .bin/.idx pair of a language, without the ending; preprocessing appends the key's name to its prefix."""
        return self.out / "data" / f"{language}_text_document"

    def tokenizer_flags(self) -> list[object]:
        """The tokenizer as preprocessing, training and conversion take it."""
        folder = self.out / "tokenizer"
        files = {"vocab": "vocab.json", "merge": "merges.txt", "special-tokens": "special_tokens.txt"}
        flags = [part for name, file in files.items() for part in (f"--{name}-file", folder / file)]
        return ["--tokenizer-type", "AquilaTokenizer", *flags]


def run(*command: object) -> None:
    """Print a command and run it in the repository; its failure ends the program."""
    words = [str(word) for word in command]
    print("$ " + shlex.join(["python", *words[1:]] if words[0] == sys.executable else words), flush=True)
    # One thread a process, since four processes share a laptop's cores; the loopback, since nothing leaves the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    status = subprocess.run(words, cwd=ROOT, env=environment).returncode
    if status != 0:
        sys.exit(f"quickstart: the command above failed with status {status}")


def make_corpus(at: Layout) -> None:
    """Real text in two languages, and code."""
    run(sys.executable, HERE / "corpus.py", "--output-dir", at.out / "corpus", "--download-dir", at.out / "downloads")


def train_tokenizer(at: Layout) -> None:
    """A byte-level BPE with Aquila's eight special tokens at the end of the vocabulary."""
    inputs = [at.corpus(language) for language in LANGUAGES]
    command = [sys.executable, "-m", "megatron_aquila", "tokenizer", "train", "--input", *inputs]
    run(*command, "--vocab-size", VOCAB_SIZE, "--output", at.out / "tokenizer")


def preprocess(at: Layout) -> None:
    """Text to .bin/.idx files in Megatron's format."""
    for language in LANGUAGES:
        prefix = at.out / "data" / language
        prefix.parent.mkdir(exist_ok=True)
        files = ["--input", at.corpus(language), "--json-keys", "text", "--output-prefix", prefix]
        settings = [*at.tokenizer_flags(), "--append-eod", "--workers", 2]
        run(sys.executable, "tools/preprocess_data.py", *files, *settings)


def pretrain(at: Layout, *flags: object) -> None:
    """One training command; what both runs share stands in pretrain.yaml and here."""
    blend = [part for language, weight in LANGUAGES.items() for part in (weight, at.data(language))]
    places = ["--data-path", *blend, "--data-cache-path", at.out / "data" / "cache", "--save", at.out / "checkpoints"]
    outputs = ["--log-dir", at.out / "logs", "--tensorboard-dir", at.out / "tensorboard"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    script = ["pretrain_aquila.py", "--config", HERE / "pretrain.yaml"]
    run(*torchrun, *script, *places, *at.tokenizer_flags(), *outputs, *flags)


def train(at: Layout) -> None:
    """The first half: tensor, pipeline and sequence parallel, with the sharded optimizer."""
    pretrain(at, *FIRST[1], "--sequence-parallel", "--exit-samples", STOP_SAMPLES)


def resume(at: Layout) -> None:
    """The second half from the first one's checkpoint, on another layout."""
    pretrain(at, *SECOND[1], "--no-sequence-parallel", "--load", at.out / "checkpoints")


def trace(at: Layout) -> None:
    """The texts that the first samples were cut from, found by what the checkpoint says its run read."""
    command = [sys.executable, "-m", "megatron_aquila", "data", "trace"]
    run(*command, "--run", at.out / "checkpoints", "--step", 1)


def convert(at: Layout) -> None:
    """A Hugging Face folder; the command reloads it in transformers and refuses it unless logits and ids are ours."""
    places = ["--from", at.out / "checkpoints", "--to", at.out / "huggingface"]
    run(sys.executable, "-m", "megatron_aquila", "convert", *places)


def generate(at: Layout) -> None:
    """Continuations by the last checkpoint. After two minutes of training they are words, not thoughts."""
    how = ["--temperature", 0.7, "--top-k", 20, "--max-new-tokens", 32]
    command = [sys.executable, "-m", "megatron_aquila", "generate", "--load", at.out / "checkpoints"]
    run(*command, *how, "--prompt", *PROMPTS)


def check_log(rows: Sequence[Row]) -> None:
    """End the program unless every step is there once and in order, and the loss fell far enough."""
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(rows) + 1)):
        sys.exit(f"quickstart: the log's steps do not join: {steps}")
    loss, start = mean(rows[-4:], "loss"), math.log(VOCAB_SIZE)
    if not loss < start - MUST_FALL:
        sys.exit(
            f"quickstart: the loss ended at {loss:.3f}; it must fall {MUST_FALL} below ln({VOCAB_SIZE}) = {start:.3f}"
        )


def mean(rows: Sequence[Row], name: str) -> float:
    """Mean of a figure over rows."""
    return statistics.fmean(float(row[name]) for row in rows)


def describe(name: str, rows: Sequence[Row]) -> str:
    """A line on the part of the run that one layout trained."""
    first, last = rows[0], rows[-1]
    speed = statistics.median(float(row["tokens_per_second"]) for row in rows)
    losses = f"loss {float(first['loss']):.3f} -> {float(last['loss']):.3f}"
    share = f"{mean(rows, 'gemm_share'):.1%} of this CPU's measured GEMM rate"
    return f"{name}: steps {first['step']} to {last['step']}, {losses}, {speed:,.0f} tokens/s, {share}"


def show(at: Layout) -> None:
    """A picture and a summary of the log."""
    rows = read_log(at.out / "logs" / LOG_NAME)
    check_log(rows)
    stopped = next(index for index, row in enumerate(rows, start=1) if row["consumed_samples"] == STOP_SAMPLES)
    picture = at.out / "training.png"
    plot_log(rows, picture, title="Aquila quickstart", marks={stopped: f"{FIRST[0]}, then {SECOND[0]}"})
    print(f"knowing nothing, the loss is ln({VOCAB_SIZE}) = {math.log(VOCAB_SIZE):.3f}")
    print(describe(FIRST[0], rows[:stopped]))
    print(describe(SECOND[0], rows[stopped:]))
    outputs = {
        "picture": picture,
        "log": at.out / "logs" / LOG_NAME,
        "TensorBoard": at.out / "tensorboard",
        "checkpoints": at.out / "checkpoints",
        "Hugging Face model": at.out / "huggingface",
        "corpus and its provenance": at.out / "corpus",
    }
    for name, path in outputs.items():
        print(f"{name:<28}{path}")
    print("next: python -m megatron_aquila parity examples/quickstart/pretrain.yaml --tp 2 --pp 2 --sp --dp 2")
    print("      examples/aquila2_7b/README.md has the recipe for GPUs, docs/ explains each part")


STEPS = {
    "corpus": make_corpus,
    "tokenizer": train_tokenizer,
    "preprocess": preprocess,
    f"train, {FIRST[0]}": train,
    f"resume, {SECOND[0]}": resume,
    "trace what the first step read": trace,
    "convert, compare in transformers": convert,
    "generate": generate,
    "summary": show,
}


def prepare(out: Path) -> None:
    """Make ``out`` ready. What an earlier quickstart left is deleted, downloads kept; other files end the program."""
    if not out.is_dir() and out.exists():
        sys.exit(f"quickstart: {out} is no folder; give another --output-dir")
    others = [path.name for path in out.iterdir() if path.name != "downloads"] if out.exists() else []
    if others and MARKER not in others:
        sys.exit(
            f"quickstart: {out} holds {', '.join(sorted(others)[:3])}, and not from a quickstart; "
            "give another --output-dir, or empty it"
        )
    for name in OUTPUTS:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Made by examples/quickstart/run.py, which replaces what is here when it runs again.\n")


def main() -> None:
    """Run the steps in order, each timed. What an earlier quickstart left is replaced; downloads are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "quickstart-out", help="folder for all outputs")
    at = Layout(parser.parse_args().output_dir.absolute())
    prepare(at.out)
    started, seconds = time.monotonic(), {}
    for number, (name, step) in enumerate(STEPS.items(), start=1):
        print(f"\n=== {number}/{len(STEPS)} {name} ===", flush=True)
        begun = time.monotonic()
        step(at)
        seconds[name] = time.monotonic() - begun
    print("\n" + ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items()))
    print(f"quickstart finished in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
