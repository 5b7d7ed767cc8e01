"""The quickstart's model on samples four times as long: perplexity by position before and after, as a picture.

    python examples/quickstart/run.py                   # makes quickstart-out
    python examples/long_context/run.py [--quickstart quickstart-out] [--output-dir long-context-out]

Every step prints the command it runs. The first step that fails ends the program.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_aquila.errors import DataError
from megatron_aquila.observe.plot import plot_positions

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/long_context")
LANGUAGES = {"zh": 0.5, "en": 0.3, "code": 0.2}  # weights of the quickstart's blend
TRAINED_LEN, LENGTH, BINS, PROCESSES = 128, 512, 16, 2
HELD_OUT = 0.019  # of the documents, from the end: within the 2 % that the quickstart only validates on
BEFORE = {
    "as it is": ["--rope-scaling", "none"],
    "linear": ["--rope-scaling", "linear"],
    "ntk": ["--rope-scaling", "ntk"],
    "yarn": ["--rope-scaling", "yarn"],
}
AS_BEFORE = [  # the control: as many tokens and steps as in extend.yaml, in samples of the quickstart's length
    *("--seq-len", TRAINED_LEN, "--rope-scaling", "none", "--rope-factor", 1, "--train-samples", 1920),
    *("--micro-batch-size", 16, "--global-batch-size", 32, "--lr-warmup-samples", 160),
]
AFTER: dict[str, list[object]] = {"as it is, trained on": AS_BEFORE, "yarn, trained on": []}


def run(*command: object) -> str:
    """Print a command, run it in the repository and return what it printed; its failure ends the program."""
    words = [sys.executable, *map(str, command)]
    print("$ " + shlex.join(["python", *words[1:]]), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"long_context: the command above failed with status {done.returncode}")
    return done.stdout


def tokenizer_flags(quickstart: Path) -> list[object]:
    """The quickstart's tokenizer as preprocessing and training take it."""
    files = {"vocab": "vocab.json", "merge": "merges.txt", "special-tokens": "special_tokens.txt"}
    flags = [part for name, file in files.items() for part in (f"--{name}-file", quickstart / "tokenizer" / file)]
    return ["--tokenizer-type", "AquilaTokenizer", *flags]


def hold_out(quickstart: Path, out: Path) -> list[Path]:
    """Token files of the last documents of each language, which no run trains on."""
    prefixes = []
    for language in LANGUAGES:
        lines = (quickstart / "corpus" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        text = out / f"{language}.jsonl"
        text.write_text("".join(lines[len(lines) - int(len(lines) * HELD_OUT) :]), encoding="utf-8")
        settings = ["--json-keys", "text", "--output-prefix", out / language, "--append-eod", "--workers", 1]
        run("tools/preprocess_data.py", "--input", text, *settings, *tokenizer_flags(quickstart))
        prefixes.append(out / f"{language}_text_document")
    return prefixes


def evaluate(load: Path, data: list[Path], *flags: object) -> list[dict[str, Any]]:
    """Scores by position on samples of ``LENGTH`` tokens: a row a bin."""
    windows = ["--seq-len", LENGTH, "--by-position", BINS, "--json"]
    printed = run("-m", "megatron_aquila", "evaluate", "--load", load, "--data", *data, *windows, *flags)
    rows: list[dict[str, Any]] = json.loads(printed)["total"]["by_position"]
    return rows


def train(quickstart: Path, out: Path, name: str, *flags: object) -> Path:
    """The quickstart's weights, trained on as extend.yaml and ``flags`` say; the folder of their checkpoints."""
    blend = [
        part
        for language, weight in LANGUAGES.items()
        for part in (weight, quickstart / "data" / f"{language}_text_document")
    ]
    places = ["--data-path", *blend, "--data-cache-path", out / "cache", "--log-dir", out / name / "logs"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    script = ["pretrain_aquila.py", "--config", HERE / "extend.yaml", "--load", quickstart / "checkpoints"]
    save = out / name / "checkpoints"
    run(*torchrun, *script, *places, *tokenizer_flags(quickstart), "--save", save, *flags)
    return save


def main() -> None:
    """Evaluate, train, evaluate again, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=ROOT / "quickstart-out", help="what the quickstart left")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "long-context-out", help="folder for all outputs")
    options = parser.parse_args()
    quickstart, out = options.quickstart.absolute(), options.output_dir.absolute()
    if not (quickstart / "checkpoints" / "latest").exists():
        sys.exit(f"long_context: {quickstart} has no checkpoints; run examples/quickstart/run.py, or give --quickstart")
    if out.exists() and any(out.iterdir()):
        sys.exit(f"long_context: {out} is not empty; give another --output-dir, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    data = hold_out(quickstart, out)
    curves = {name: evaluate(quickstart / "checkpoints", data, *flags) for name, flags in BEFORE.items()}
    for name, flags in AFTER.items():
        trained = train(quickstart, out, name.replace(", ", "-").replace(" ", "-"), *flags)
        curves[name] = evaluate(trained, data)
    (out / "long-context.json").write_text(json.dumps({"trained_len": TRAINED_LEN, "curves": curves}, indent=1) + "\n")
    print(f"{'positions':<12}" + "".join(f"{name:>22}" for name in curves))
    for rows in zip(*curves.values(), strict=True):
        print(f"{rows[0]['first']:>4}-{rows[0]['last']:<7}" + "".join(f"{row['perplexity']:>22.1f}" for row in rows))
    try:
        plot_positions(
            curves,
            out / "long-context.svg",
            title="The quickstart's model on samples of 512 tokens, four times those of its training",
            trained_len=TRAINED_LEN,
        )
    except DataError as error:
        sys.exit(f"long_context: {error}")
    print(f"picture: {out / 'long-context.svg'}, figures: {out / 'long-context.json'}")


if __name__ == "__main__":
    main()
