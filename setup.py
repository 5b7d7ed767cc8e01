"""The package and its C++ extension. Settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Read, not imported: the package's dependencies need not be there yet."""
    match = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_aquila/__init__.py").read_text(), re.MULTILINE)
    assert match is not None, 'megatron_aquila/__init__.py has no line __version__ = "..."'
    return match[1]


native = Pybind11Extension(
    "megatron_aquila._native",
    sorted(str(path.relative_to(HERE)) for path in HERE.glob("csrc/*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(str(path.relative_to(HERE)) for path in HERE.glob("csrc/*.hpp")),
    cxx_std=17,
    # Without contraction a * b - c rounds twice, as numpy and Megatron's x86 builds do, on every processor.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
    extra_link_args=["-pthread"],
    # No compiler: the numpy path gives the same values, and a run says so.
    optional=True,
)

setup(
    name="megatron_aquila",
    version=version(),
    description="Megatron-style pretraining of the Aquila2 family: Megatron's layout and data format, with proofs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_aquila", "megatron_aquila.*"]),
    package_data={"megatron_aquila": ["_native.pyi", "py.typed"]},
    ext_modules=[native],
    entry_points={"console_scripts": ["aquila = megatron_aquila.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "pydantic>=2",
        "annotated-types",
        "tyro",
        "pyyaml",
        "rich",
        "safetensors",
        "tokenizers>=0.21",
        "regex",
        "tensorboard",
    ],
    extras_require={
        "data": ["orjson", "zstandard", "pyarrow"],
        "fast": ["gigatoken", "orjson"],
        "ray": ["ray"],
        "hf": ["transformers>=5"],
        "quickstart": ["transformers>=5", "matplotlib"],
        "plots": ["matplotlib"],
        "kernels": ["triton>=3.6"],
        "flash": ["flash-attn"],
        "wandb": ["wandb"],
        "spm": ["sentencepiece", "protobuf"],
        "lm-eval": ["lm_eval"],
        "benchmarks": ["transformers>=5", "liger-kernel"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-regex",
            "pre-commit",
            "codespell",
            "clang-format",
            "matplotlib",
            "transformers>=5",
            # its interpreter runs the kernels on a CPU; beside CUDA torch brings the version that it needs
            'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
            "orjson",
            "zstandard",
            "pyarrow",
            "sentencepiece",
            "protobuf",
            'gigatoken; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
)
