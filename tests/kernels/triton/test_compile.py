"""All kernels compile for Hopper at Aquila2-7B's sizes, on a machine without a GPU too: Triton brings its assembler."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aquila.kernels import triton as room

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[kernels]'")

# In a process of its own, where kernels are not interpreted. Prints a line a kernel: name and PTX instructions.
COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_aquila.kernels.triton import adamw, cross_entropy, fp8, rms_norm, rope, swiglu
from megatron_aquila.kernels.triton.launch import block_of, num_warps

FLOATS = {"eps", "lr", "decay", "add1", "beta2", "add2"}
FLOAT32 = {"inverse_rms", "grad_weight_parts", "cos", "sin"}
ROWS = dict.fromkeys(("out", "log_sum", "weights", "top", "top_grad"), "*fp32") | {"columns": "*i64", "is_mine": "*i1"}
SCALARS = {"step": "*i64", "factor": "*fp64", "applies": "*i1"}
NUMBERS = FLOATS | {"num_rows", "num_heads", "num_samples", "size", "num_columns", "num_real"}

def compiled(name, kernel, warps, pointers={}, **constants):
    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in FLOATS:
            return "fp32"
        if argument in NUMBERS or "stride" in argument:
            return "i32"
        return pointers.get(argument, "*fp32" if argument in FLOAT32 else "*bf16")
    names = kernel.arg_names
    sizes = {"size", "num_columns"} | ({"num_rows"} if name == "fp8_cast" else set())
    signature = {argument: kind(argument) for argument in names}
    by_16 = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(names)
             if signature[argument] != "constexpr" and argument not in NUMBERS - sizes}
    source = ASTSource(fn=kernel, signature=signature, attrs=by_16,
                       constexprs={(names.index(k),): v for k, v in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(name, *sorted(set(re.findall(r"(?:ld.global|st.global|cp.async.c.)[.\\w:]*", code.asm["ptx"]))))

common = dict(SIZE=4096, BLOCK=4096, ADDS=True, ROUNDS_FIRST=True)
compiled("norm", rms_norm.rms_norm_forward, 8, **common)
compiled("norm_backward", rms_norm.rms_norm_backward, 8, STAGES=rms_norm._stages(4096, 2, 3), **common)
for interleaved in (False, True):
    compiled("rope", rope.rope_rotate, 8, HALF=64, BLOCK=64, HEADS=32, BACK=interleaved, INTERLEAVED=interleaved)
compiled("swiglu", swiglu.swiglu_forward, 4, SIZE=11008, BLOCK=2048)
compiled("swiglu_backward", swiglu.swiglu_backward, 4, SIZE=11008, BLOCK=2048)
for top in (False, True):
    compiled("statistics", cross_entropy.cross_entropy_statistics, 8, pointers=ROWS, TOP=top, BLOCK=cross_entropy.BLOCK)
    compiled("gradient", cross_entropy.cross_entropy_gradient, 8, pointers=ROWS, TOP=top, BLOCK=cross_entropy.BLOCK)
wide = dict(param="*fp32", grad="*fp32", exp_avg="*fp32", exp_avg_sq="*fp32", other="*bf16", **SCALARS)
narrow = dict(wide, param="*i16", exp_avg="*bf16", exp_avg_sq="*bf16", other="*i16")
for other, pointers in (("nothing", wide), ("publish", wide), ("remainder", narrow)):
    beta = dict(LOG2_BETA1=-0.152, LOG2_BETA2=-0.074)
    compiled("adamw", adamw.adamw_update, 4, pointers=pointers, OTHER=other, BLOCK=1024, **beta)
bits = dict(x="*i16", largest="*i32", scale="*fp32")
compiled("fp8_largest", fp8.fp8_largest, 8, pointers=bits, BLOCK=128)
for kind, top, tiny, mantissa, layouts in (
    ("fp8e4nv", 448.0, 121, 3, (True, False)), ("fp8e4nv", 448.0, 121, 3, (False, True)),
    ("fp8e5", 57344.0, 113, 2, (True, True)),
):
    pointers = dict(bits, by_rows="*" + kind, by_columns="*" + kind)
    compiled("fp8_cast", fp8.fp8_cast, 8, pointers=pointers, TOP=top, TINY=tiny << 23, MANTISSA=mantissa, SMALLEST=-120,
             ROWS=layouts[0], COLUMNS=layouts[1], BLOCK=128)
"""


def test_memory_is_read_16_bytes_a_thread_and_ahead_of_time(tmp_path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-"], input=COMPILE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [
        "norm", "norm_backward", "rope", "rope", "swiglu", "swiglu_backward",
        *["statistics", "gradient"] * 2, *["adamw"] * 3, "fp8_largest", *["fp8_cast"] * 3,
    ]  # fmt: skip
    for name, *instructions in lines:
        # statistics and the largest are a number a row
        is_small = name in ("statistics", "fp8_largest")
        assert is_small or "st.global.v4.b32" in instructions, f"{name}: {instructions}"
        ahead = any(word.startswith("cp.async.cg") for word in instructions)
        assert ahead == (name == "norm_backward"), f"{name}: {instructions}"
        assert ahead or "ld.global.v4.b32" in instructions, f"{name}: {instructions}"


def test_a_kernel_s_name_says_of_which_op_it_is() -> None:
    """The bare name is all that a trace has of it: a profile sums by it, and knows the optimizer's by it."""
    for file in Path(room.__path__[0]).glob("*.py"):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        kernels = [one.name for one in functions if "triton.jit" in map(ast.unparse, one.decorator_list)]
        assert all(name.startswith(f"{file.stem}_") for name in kernels), f"{file.name}: {kernels}"
