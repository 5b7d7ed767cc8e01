"""What the page of benchmarks shows of each: its tables, their columns, and a few words about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.common import Row


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, the value of a row's that stands below it, its factor, and how many decimals it has; text as it is.

    ``is_needed``: where a row does not have it, its table was measured in another way than the page tells of.
    """

    heading: str
    key: str
    factor: float = 1
    decimals: int = 1
    is_needed: bool = False

    def cell(self, row: Row) -> str:
        """What the row has there; a dash for nothing."""
        value = row.get(self.key)
        if isinstance(value, float):
            return f"{value * self.factor:,.{self.decimals}f}"
        if isinstance(value, int) and not isinstance(value, bool):
            scaled = value * self.factor
            return f"{scaled:,.{self.decimals}f}" if self.factor != 1 else f"{value:,}"
        return "–" if value in (None, "") else str(value)


STEP_SHAPE = ("model", "seq_len", "micro_batch", "recompute")

TABLES: Mapping[str, Mapping[str, tuple[Column, ...]]] = MappingProxyType(
    {
        "ceilings": {
            "copy": (Column("MiB", "mib"), Column("TB/s", "tbytes_per_second", 1, 2)),
            "gemm": (
                Column("model", "model"),
                Column("linear", "linear"),
                Column("product", "product"),
                Column("tokens", "tokens"),
                Column("out", "n"),
                Column("in", "k"),
                Column("TFLOP/s", "tflops"),
            ),
            "attention": (
                Column("model", "model"),
                Column("backend", "backend"),
                Column("S", "seq_len"),
                Column("B", "batch"),
                Column("direction", "direction"),
                Column("TFLOP/s", "tflops"),
                Column("", "error"),
            ),
        },
        "kernels": {
            "kernels": (
                Column("model", "model"),
                Column("op", "op"),
                Column("kernel", "name"),
                Column("direction", "direction"),
                Column("µs", "seconds", 1e6),
                Column("rate", "rate", 1, 2),
                Column("", "unit"),
                Column("of the ceiling, %", "ceiling_share", 100),
                Column("largest error, 1e-6", "largest_error", 1e6, 2),
                Column("", "error"),
            ),
        },
        "step": {
            "step": (
                Column("model", "model"),
                Column("S", "seq_len"),
                Column("B", "micro_batch"),
                Column("our recompute", "recompute"),
                Column("who", "name"),
                Column("to fit into memory", "to_fit"),
                Column("ms a step", "seconds", 1e3),
                Column("steps", "calls"),
                Column("tokens/s", "tokens_per_second", 1, 0),
                Column("MFU, %", "mfu", 100),
                Column("of the bf16 peak (fp8), %", "bf16_equivalent", 100),
                Column("of the best matmul, %", "ceiling_share", 100),
                Column("GiB", "peak_gib"),
                Column("our plan, GiB", "planned_gib"),
                Column("of the best transformers", "ratio", 1, 2),
                Column("", "error"),
            ),
            "loop": (
                *(Column(key, key) for key in STEP_SHAPE),
                Column("who", "name"),
                Column("ms a step, one at a time", "seconds", 1e3),
                Column("the host's ms", "host_seconds", 1e3),
                Column("of the step, %", "host_share", 100),
                Column("clip and update, ms", "update_seconds", 1e3, 2),
                Column("of a step of 262,144 tokens, %", "update_share", 100, 2),
                Column("the log between its lines, %", "log_between", 100, 2),
                Column("a line every step, %", "log_every_step", 100, 2),
            ),
            "left out": tuple(Column(key, key) for key in (*STEP_SHAPE, "why")),
        },
        "fp8": {
            "all steps": (
                Column("parameters", "parameters"),
                Column("steps", "steps"),
                Column("furthest from bf16, %", "worst", 100, 3),
                Column("at the end, %", "last", 100, 3),
                Column("within 0.5 %", "holds"),
            ),
            "loss": (
                Column("to step", "last_step"),
                Column("bf16", "bf16", 1, 4),
                Column("fp8", "fp8", 1, 4),
                Column("difference, %", "difference", 100, 3),
            ),
        },
        "cpu": {
            "step": (
                Column("who", "name"),
                Column("ms", "seconds", 1e3),
                Column("fastest", "fastest", 1e3),
                Column("slowest", "slowest", 1e3),
                Column("calls", "calls"),
                Column("tokens/s", "tokens_per_second", 1, 0),
                Column("of the matmul's rate, %", "gemm_share", 100),
                Column("of the best transformers", "ratio", 1, 2),
            ),
            "ops": (
                Column("forward and backward of one token", "name"),
                Column("ours, µs", "ours_us"),
                Column("plain torch or transformers, µs", "theirs_us"),
            ),
            "traffic": (
                Column("8 ranks", "layout"),
                Column("all-reduce", "all_reduce"),
                Column("all-gather", "all_gather"),
                Column("reduce-scatter", "reduce_scatter"),
                Column("all-to-all", "all_to_all"),
                Column("messages", "messages"),
                Column("MiB moved", "num_bytes", 2**-20),
                Column("MiB sent", "sent_bytes", 2**-20),
            ),
        },
        "loader": {
            "data set": (
                Column("documents", "documents"),
                Column("tokens", "tokens"),
                Column("s to write", "seconds_to_write"),
            ),
            "start-up": (
                Column("S", "seq_len"),
                Column("start", "start"),
                Column("samples", "samples"),
                Column("s to the first microbatch", "seconds", 1, 2),
                Column("peak GiB", "peak_memory_gib", 1, 2),
                Column("of which imports", "memory_before_gib", 1, 2),
            ),
            "reading": (
                Column("S", "seq_len"),
                Column("reader", "reader"),
                Column("rules for documents", "rules"),
                Column("samples/s", "samples_per_second", 1, 0),
                Column("million tokens/s", "tokens_per_second", 1e-6, 2),
                Column("times megatron-core's", "ratio", 1, 2, is_needed=True),
                Column("turns", "calls"),
                Column("own memory, GiB", "own_memory_gib", 1, 2),
            ),
        },
        "checkpoint": {
            "saving": (
                Column("written", "name"),
                Column("MB", "num_bytes", 1e-6, 0),
                Column("s that training stands still", "stall_seconds", 1, 2),
                Column("the first save", "first_stall", 1, 2),
                Column("longest", "longest_stall", 1, 2),
                Column("in plain copies", "stall_in_copies", 1, 1),
                Column("s until it is published", "seconds", 1, 2),
                Column("saves", "calls"),
            ),
        },
        "convert": {
            "converting": (
                Column("conversion", "name"),
                Column("GB of weights", "num_bytes", 1e-9),
                Column("seconds", "seconds"),
                Column("in plain copies of the files", "in_copies"),
                Column("own memory, GB", "own_bytes", 1e-9, 2),
            ),
        },
        "index_build": {
            "building": (
                Column("who", "name"),
                Column("samples", "samples"),
                Column("CPU seconds", "cpu_seconds"),
                Column("seconds", "seconds"),
                Column("peak MiB", "peak_mib"),
            ),
        },
        "preprocess": {
            "start-up": (
                Column("seconds", "seconds", 1, 2),
                Column("CPU seconds", "cpu_seconds", 1, 2),
                Column("peak MiB, all processes", "peak_mib", 1, 0),
                Column("slowest", "slowest", 1, 2),
                Column("runs", "calls"),
            ),
            "corpora": (
                Column("corpus", "corpus"),
                Column("MB", "megabytes"),
                Column("documents", "documents"),
                Column("tokens", "tokens"),
                Column("seconds", "seconds", 1, 2),
                Column("MB/s", "megabytes_per_second"),
                Column("MB/s behind the start", "megabytes_per_second_behind_start"),
                Column("CPU seconds", "cpu_seconds", 1, 2),
                Column("MB per CPU second", "megabytes_per_cpu_second"),
                Column("peak MiB, all processes", "peak_mib", 1, 0),
                Column("backend", "backend"),
                Column("slowest", "slowest", 1, 2),
                Column("runs", "calls"),
            ),
            "beside megatron-core": (
                Column("who", "name"),
                Column("corpus", "corpus"),
                Column("MB", "megabytes"),
                Column("documents", "documents"),
                Column("seconds", "seconds", 1, 2),
                Column("MB/s", "megabytes_per_second", 1, 2),
                Column("times megatron-core's", "ratio", 1, 2),
                Column("CPU seconds", "cpu_seconds", 1, 2),
                Column("peak MiB, all processes", "peak_mib", 1, 0),
                Column("the same files", "same_files"),
                Column("slowest", "slowest", 1, 2),
                Column("runs", "calls"),
            ),
        },
    }
)

ABOUT: Mapping[str, str] = MappingProxyType(
    {
        "ceilings": """\
What the GPU gives for the products, copies and attention of the 7B and the 34B, sustained on random data.""",
        "kernels": """\
Each kernel against its reference in plain torch, the same under torch.compile, torch's own where it has one, and
liger-kernel where it is installed. The error is the largest difference from float64, as a share of the tensor's largest
value. Ceilings are a copy's bandwidth, torch's best attention at the same shape, and the best matmul of the model's; in
fp8 a product may exceed that, which is in bf16. Packed documents halve in length from the first to the last.""",
        "step": """\
Whole steps, with data, clipping, AdamW and the report, against transformers' LlamaForCausalLM of the same shape with
SDPA, fused AdamW and torch.compile, in one run; ours with the kernels a run chooses, and with those that torch.compile
makes. Where the plan exceeds the GPU, our optimizer's states are narrow: weights, gradients and states together take 12
bytes a parameter, not 18. The loop's table holds the host's own time, that of clip and update, computed for a step of
262,144 tokens, and what the log adds to a step.""",
        "fp8": """\
The loss of a model of 219 million parameters in fp8 beside that in bf16, from the same weights on the same samples: the
means of windows of steps. What fp8 gains at the 7B's sizes is measured by `step`.""",
        "cpu": """\
The step of a model of 4 layers of 256 against transformers, what an op costs beside its arithmetic, and what 8 ranks
say in a step of the same 32 samples: planned by `plan/traffic.py`, and counted on fake ranks to be just that.""",
        "loader": """\
Start-up and reading of documents whose lengths are log-normal, in one thread: samples from all over the data, in
microbatches of 4; where megatron-core is installed, its GPTDataset in turns, sample by sample. Each way reads samples
of its own, in a file that is in memory. Peak memory counts the mapped files' pages that were touched.""",
        "checkpoint": """\
One rank's state, saved to a local disk at once and from a copy in host memory while training goes on, in turns with
plain copies of the same tensors.""",
        "convert": """\
`aquila convert` on the 34B's sizes with few of its 60 layers, random weights in bf16, each command in a process of its
own. Own memory is what is no file's page, at its peak. Every conversion reads all tensors back; the largest tensor is
1.2 GB, twice that in fp32.""",
        "index_build": """\
Document order, sample index and sample order of a data set, built and written: ours, and Megatron-LM's way repeated in
numpy (its sample index is C++ too, ours in both).""",
        "preprocess": """\
JSON lines to token files by `aquila preprocess`, from the start of the command to closed and hashed files with their
manifest: corpora, and one document alone for what starting takes, which the speed behind the start leaves out. The
fastest of the runs, with the corpus in memory; CPU seconds are of all processes together, and memory that several share
is counted once. megatron-core brings its builder and not its tool: beside it, preprocess_data.py's way is repeated
(`benchmarks/megatron_preprocess.py`), with the same tokenizer and processes, on the beginning of the first corpus,
imports included.""",
    }
)
