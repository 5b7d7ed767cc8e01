"""The rules of the house that a machine can check: who imports whom, who talks to torch, how long things are.

The rules are functions of source text, so that each is also shown to catch its breach.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_aquila"
NAME = PACKAGE.name

# room -> the rooms of ours it may import. `errors` may be imported by all, the extension by `data` and `kernels`.
ABOVE = {"train", "verify", "generate", "commands"}
MAY_IMPORT = {
    "plan": set(),
    "observe": set(),
    "kernels": {"_native"},
    "config": {"plan"},
    "parallel": {"plan", "kernels"},
    "pipeline": {"plan", "parallel"},
    "model": {"plan", "parallel", "kernels"},
    "data": {"plan", "_native"},
    "optim": {"plan", "parallel", "kernels"},
    "checkpoint": {"plan", "parallel"},
}
BELOW = set(MAY_IMPORT)
MAY_IMPORT |= {"train": BELOW, "verify": BELOW | {"train"}}
MAY_IMPORT |= {"generate": BELOW | {"train"}, "commands": BELOW | ABOVE, "__main__": {"commands"}}

TOUCHES_DISTRIBUTED = {
    "parallel/context.py",
    "parallel/collectives.py",
    "pipeline/wire.py",
    "train/env.py",
    "verify/dry.py",
    "verify/pool.py",
}
WITHOUT_TORCH = [
    "__init__.py", "errors.py", "plan/*.py", "config/*.py", "data/*.py",
    "observe/__init__.py", "observe/ledger.py", "observe/lineage.py",
    "observe/log.py", "observe/meters.py", "observe/plot.py", "observe/report.py",
    "observe/profile.py", "observe/writers.py",
    "pipeline/__init__.py", "pipeline/action.py", "pipeline/checks.py", "pipeline/draw.py", "pipeline/schedules.py",
    "pipeline/simulate.py", "pipeline/svg.py",
]  # fmt: skip

MODULE_LINES, FUNCTION_LINES = 400, 60
HARD_MODULE_LINES, HARD_FUNCTION_LINES = 500, 80
MEAN_FUNCTION_LINES = 16
# What may be longer, up to the hard limits, and why. The list may only shrink: an entry no longer needed is an error.
LONGER: dict[str, str] = {}

PICKLES = {
    "verify/pool.py": "messages between a process and its own children; never a file",
    "checkpoint/pickles.py": "the error of torch.load(weights_only=True); nothing is unpickled",
}

OPTIONAL = ("data/fast_json.py", "kernels/triton/*.py")  # doors to packages that need not be there
DISTRIBUTIONS = {"yaml": "pyyaml", "annotated_types": "annotated-types"}  # module -> what is installed

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imported(tree: ast.AST, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that the tree imports; with ``at_import_time`` without those inside functions or for types only."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the absolute import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not (at_import_time and (isinstance(node, Function) or is_typing_only(node))):
            names |= imported(node, at_import_time=at_import_time)
    return names


def ours(names: set[str], relative: str) -> set[str]:
    """Rooms (or top-level modules) of ours among imported names, the module's own left out."""
    own = relative.split("/")[0].removesuffix(".py")
    return {name.split(".")[1] for name in names if name.startswith(f"{NAME}.")} - {own}


def talks(names: set[str]) -> bool:
    """Whether ``torch.distributed`` is among imported names."""
    return any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names)


def forbidden_imports(relative: str, source: str) -> list[str]:
    names = imported(ast.parse(source))
    room = relative.split("/")[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(room, set()) | {"errors", "__version__"}
    wrong = [f"{relative} imports {name}" for name in sorted(ours(names, relative) - allowed)]
    if talks(names) and relative not in TOUCHES_DISTRIBUTED:
        wrong.append(f"{relative} imports torch.distributed")
    return wrong


def forbidden_code(relative: str, source: str) -> list[str]:
    """Constructs that the house does without."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            wrong.append(f"{line}: global")
        if isinstance(node, ast.Assert) and node.msg is None:
            wrong.append(f"{line}: an assert without a message")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                wrong.append(f"{line}: {node.func.id}")
            wrong += [f"{line}: shell={ast.unparse(word.value)}" for word in node.keywords if word.arg == "shell"]
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import and imported(ast.Module([node], [])) & {"pickle", "marshal"} and relative not in PICKLES:
            wrong.append(f"{line}: pickle")
    return wrong


def public_names(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The public classes, functions and methods of a module; what is inside a function is its own affair."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node, f"{prefix}{node.name}.")


def undocumented(source: str) -> list[str]:
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    return missing + [name for name, node in public_names(tree) if not ast.get_docstring(node)]


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function by name and line number, from its ``def`` to its end."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in nodes}


def too_long(relative: str, source: str, *, modules: int, functions: int) -> list[str]:
    """``path`` or ``path function`` of everything in a file that is longer than the limits."""
    long = [relative] if source.count("\n") > modules else []
    return long + [
        f"{relative} {name.split(':')[0]}" for name, lines in function_lengths(source).items() if lines > functions
    ]


def module_name(relative: str) -> str:
    return ".".join([NAME, *relative.removesuffix(".py").split("/")]).removesuffix(".__init__")


def files(*patterns: str, root: Path = PACKAGE) -> dict[str, str]:
    """Source text by path relative to ``root``."""
    paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


SOURCES = files("**/*.py")
SCRIPTS = files("*.py", "tools/*.py", "examples/**/*.py", "benchmarks/**/*.py", root=ROOT)


def closure(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything reachable from a module at import time."""
    seen, todo = set(), [start]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += graph.get(name, set())
    return seen


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules it imports when it is imported: the outside by name, ours with the packages they lie in."""
    known = {module_name(relative) for relative in sources}
    graph = {}
    for relative, source in sources.items():
        names = imported(ast.parse(source), at_import_time=True)
        parents = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
        inside = {name for name in names | parents if name in known}
        graph[module_name(relative)] = inside | {name for name in names if not name.startswith(f"{NAME}.")}
    return graph


@pytest.mark.parametrize("relative", SOURCES)
def test_imports_go_down_the_house(relative):
    assert not forbidden_imports(relative, SOURCES[relative])


def test_those_that_may_talk_do():
    assert {
        relative for relative, source in SOURCES.items() if talks(imported(ast.parse(source)))
    } == TOUCHES_DISTRIBUTED


@pytest.mark.parametrize("relative", SOURCES | SCRIPTS)
def test_forbidden_code(relative):
    assert not forbidden_code(relative, (SOURCES | SCRIPTS)[relative])


@pytest.mark.parametrize("relative", SOURCES | SCRIPTS)
def test_public_names_have_docstrings(relative):
    assert not undocumented((SOURCES | SCRIPTS)[relative])


def test_every_room_is_in_the_table():
    assert {relative.split("/")[0] for relative in SOURCES if "/" in relative} <= set(MAY_IMPORT)


def test_nothing_is_too_long():
    everything = SOURCES | SCRIPTS
    aim = {"modules": MODULE_LINES, "functions": FUNCTION_LINES}
    hard = {"modules": HARD_MODULE_LINES, "functions": HARD_FUNCTION_LINES}
    assert sorted(LONGER) == sorted(name for path, text in everything.items() for name in too_long(path, text, **aim))
    assert not [name for path, text in everything.items() for name in too_long(path, text, **hard)]


def test_functions_are_short_on_average():
    lengths = [lines for text in SOURCES.values() for lines in function_lengths(text).values()]
    assert sum(lengths) / len(lengths) <= MEAN_FUNCTION_LINES


def test_modules_import_each_other_in_one_direction():
    """No cycle among our modules at import time; a package's own ``__init__`` imports nothing of ours."""
    graph = {name: {n for n in names if n.startswith(f"{NAME}.")} for name, names in import_graph(SOURCES).items()}
    TopologicalSorter({name: names - {name} for name, names in graph.items()}).prepare()


def test_rooms_import_each_other_in_one_direction():
    rooms: dict[str, set[str]] = {}
    for relative, source in SOURCES.items():
        if "/" in relative:
            rooms.setdefault(relative.split("/")[0], set()).update(ours(imported(ast.parse(source)), relative))
    TopologicalSorter(rooms).prepare()


def test_pure_files_reach_no_torch():
    graph = import_graph(SOURCES)
    for relative in files(*WITHOUT_TORCH):
        reached = {name.split(".")[0] for name in closure(module_name(relative), graph)}
        assert "torch" not in reached, f"importing {relative} imports torch"


def test_what_is_imported_from_outside_is_required():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (required,) = (
        ast.literal_eval(word.value)
        for word in ast.walk(setup)
        if isinstance(word, ast.keyword) and word.arg == "install_requires"
    )
    found = {
        name.split(".")[0]: relative
        for relative, source in SOURCES.items()
        for name in imported(ast.parse(source), at_import_time=True)
        if not any(Path(relative).match(door) for door in OPTIONAL)
    }
    outside = {name: relative for name, relative in found.items() if name not in {*sys.stdlib_module_names, NAME}}
    named = {re.split("[<>=]", word)[0] for word in required}
    assert {name: where for name, where in outside.items() if DISTRIBUTIONS.get(name, name) not in named} == {}


def test_importing_the_package_imports_no_torch():
    code = f"import sys, {NAME}, {NAME}.config.schema, {NAME}.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("plan/memory.py", "from megatron_aquila.model.block import Block"),
        ("optim/clip.py", "def f():\n    import megatron_aquila.checkpoint.layout"),
        ("train/step.py", "from megatron_aquila.commands import pretrain"),
        ("kernels/adamw.py", "from megatron_aquila import parallel"),
        ("model/mlp.py", "import torch.distributed as dist"),
        ("model/mlp.py", "from torch import distributed"),
        ("model/mlp.py", "from torch.distributed.tensor import DTensor"),
    ],
)
def test_a_wrong_import_is_caught(relative, source):
    assert forbidden_imports(relative, source)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("train/step.py", "from megatron_aquila.optim.clip import clip_"),
        ("commands/parity.py", "import megatron_aquila.verify.parity"),
        ("parallel/context.py", "import torch.distributed as dist"),
        ("model/mlp.py", "from megatron_aquila.errors import DataError"),
    ],
)
def test_a_right_import_passes(relative, source):
    assert not forbidden_imports(relative, source)


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    global x",
        "assert x",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "import pickle",
        "from pickle import loads",
    ],
)
def test_forbidden_code_is_caught(source):
    assert forbidden_code("model/mlp.py", source)


def test_lengths_and_docstrings_are_caught():
    source = '"""Module."""\n\n\ndef f():\n' + "    pass\n" * 60
    assert too_long("x.py", source, modules=400, functions=60) == ["x.py f"]
    assert too_long("x.py", source, modules=63, functions=61) == ["x.py"]
    assert undocumented(source) == ["f"]
    assert undocumented("class A:\n    '''A.'''\n    def b(self): ...\n    def _c(self): ...") == ["the module", "A.b"]


def test_a_cycle_and_a_hidden_torch_are_caught():
    sources = {
        "plan/a.py": f"from {NAME}.plan import b",
        "plan/b.py": f"import {NAME}.plan.a\nfrom {NAME}.plan.c import d",
        "plan/c.py": "import torch.nn",
        "plan/late.py": "def f():\n    import torch",
    }
    graph = import_graph(sources)
    assert "torch.nn" in closure(f"{NAME}.plan.a", graph)
    assert closure(f"{NAME}.plan.late", graph) == {f"{NAME}.plan.late"}
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter(graph).prepare()
