"""Who may import whom, what is imported only where it is used, and what `import statewise` costs."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "src" / "statewise"
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# Package -> those it may import. `cli` may import everything, and nothing imports it.
STACK = ["core", "ops", "nn", "layers", "models"]
BELOW = {name: STACK[:i] for i, name in enumerate(STACK)} | {
    "text": ["core"],
    "tasks": ["core", "text"],
    "training": [*STACK, "tasks"],
    "report": ["core"],
    "comparing": [*STACK, "tasks", "training", "report"],
    "recipes": [*STACK, "tasks", "training", "interpret", "report", "comparing", "decoding"],
    "testing": STACK,
    "interpret": [*STACK, "tasks", "training"],
    "decoding": ["core", "models"],
    "serving": ["core", "ops", "models"],
    "hf": [*STACK, "text", "training", "decoding", "serving"],
    "bench": [*STACK, "tasks", "training", "testing", "decoding", "serving"],
    "cli": [
        *STACK,
        "tasks",
        "training",
        "testing",
        "report",
        "comparing",
        "recipes",
        "interpret",
        "bench",
        "decoding",
        "serving",
        "text",
        "hf",
    ],
}

# Optional or slow to import: only inside functions, or in the one file that is for them.
HEAVY = {
    "beartype", "huggingface_hub", "jaxtyping", "jinja2", "lm_eval", "matplotlib", "numba", "onnx", "onnxruntime",
    "onnxscript", "pandas", "pyarrow", "pytest", "ray", "rich", "safetensors", "scipy", "sklearn",
    "tensorboard", "transformers", "triton", "tyro",
}  # fmt: skip
AT_HOME = {
    "numba": ["in_numba"], "triton": ["in_triton.py"], "tyro": ["cli/"], "rich": ["cli/"],
    "jinja2": ["report/"], "transformers": ["hf/in_transformers.py"], "huggingface_hub": ["hf/on_hub.py"],
    "lm_eval": ["hf/in_lm_eval.py"],
}  # fmt: skip


def imports(tree: ast.AST, here: tuple[str, ...], *, top: bool) -> list[tuple[str, int]]:
    """(dotted name, line) of every import; top: only those that run when the module is imported."""
    found: list[tuple[str, int]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["statewise", *here[:-1]][: len(here) + 1 - node.level] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            found += [(".".join([*module, alias.name]), node.lineno) for alias in node.names]
        elif top and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing_only(node)):
            continue
        else:
            found += imports(node, here, top=top)
    return found


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


PACKAGED = [path for path in FILES if path.parent != ROOT]


def wrong_way(tree: ast.AST, here: tuple[str, ...]) -> list[str]:
    """Imports of a package that does not stand below."""
    return [
        f"{'/'.join(here)}:{line} imports {name}"
        for name, line in imports(tree, here, top=False)
        if name.startswith("statewise.") and name.split(".")[1] in BELOW
        if name.split(".")[1] not in (here[0], *BELOW[here[0]])
    ]


def test_imports_go_one_way():
    wrong = [w for path in PACKAGED for w in wrong_way(TREES[path], path.relative_to(ROOT).parts)]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "here, code, count",
    [
        (("core", "layer.py"), "from ..ops import linear_scan", 1),
        (("core", "layer.py"), "def f():\n    import statewise.layers.gru", 1),
        (("ops", "linear_scan", "in_numba.py"), "from ...layers import GRU", 1),
        (("tasks", "copy.py"), "from ..models import Stack\nfrom statewise.training import fit", 2),
        (("layers", "gru.py"), "from ..core import Cell\nfrom .lstm import LSTMState\nfrom .. import core", 0),
    ],
)
def test_wrong_ways_are_seen(here, code, count):
    assert len(wrong_way(ast.parse(code), here)) == count


def test_every_package_has_its_place():
    assert {path.relative_to(ROOT).parts[0] for path in PACKAGED} == set(BELOW)
    assert len(PACKAGED) > 60


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name} at the top"
        for path in FILES
        for name, line in imports(TREES[path], path.relative_to(ROOT).parts, top=True)
        if (package := name.split(".")[0]) in HEAVY
        if not any(home in str(path.relative_to(ROOT)) for home in AT_HOME.get(package, []))
    ]
    assert not wrong, wrong


CODE_FROM_FILES = {"eval", "exec", "torch.load", "torch.save", "os.system", "pickle.load", "pickle.loads"}


def test_no_code_from_files():
    """No pickle, no eval or exec, no torch.load, no shell."""
    wrong = []
    for path in FILES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call):
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                risky = [f"{k}=" for k in ("shell", "allow_pickle") if flags.get(k, "False") != "False"]
                risky += [name for name in [ast.unparse(node.func)] if name in CODE_FROM_FILES]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in risky]
        found = imports(TREES[path], path.relative_to(ROOT).parts, top=False)
        wrong += [f"{path.relative_to(ROOT)}:{line} {n}" for n, line in found if n.split(".")[0] in ("pickle", "dill")]
    assert not wrong, wrong


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


EVERYTHING = "import statewise, statewise.core, statewise.ops, statewise.nn, statewise.layers, statewise.models; "
EVERYTHING += "import statewise.tasks, statewise.training, statewise.testing, statewise.cli"


def test_importing_opens_no_socket_and_loads_no_extra():
    code = """
import socket, sys, torch
def refuse(*args, **kwargs):
    raise RuntimeError("a socket was opened")
socket.socket.__init__ = refuse
socket.create_connection = socket.getaddrinfo = refuse
import urllib.request
urllib.request.urlopen = refuse
before = set(sys.modules)
"""
    loaded = set(run(f"{code}{EVERYTHING}; print(*(set(sys.modules) - before))").split())
    packages = {name.split(".")[0] for name in loaded}
    assert "statewise.layers.gru" in loaded and "statewise.training" in loaded
    assert not packages & (HEAVY - {"rich", "tyro"}), packages & HEAVY


COST = """
import time, torch
before = time.process_time()
{what}
print(time.process_time() - before)
"""


def test_import_costs_little_beyond_torch():
    """Processor time, the least of several runs: other work on the machine does not count."""
    what, seconds = "from statewise import Cell, RecurrentLayer, LSTM, GRU, RNN, chunked, stream, unroll", 0.3
    costs: list[float] = []
    for _ in range(6):
        costs.append(float(run(COST.format(what=what))))
        if costs[-1] <= seconds / 2:
            break
    assert min(costs) <= seconds, f"{what!r} costs {min(costs):.2f} s of processor time beyond torch, {costs}"


def test_import_loads_torch_only_when_asked():
    code = "import statewise, sys; print('torch' in sys.modules); statewise.Cell; print('torch' in sys.modules)"
    assert run(code).split() == ["False", "True"]
