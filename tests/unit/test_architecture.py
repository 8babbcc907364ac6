"""The walls of the house: who imports whom, what no file may do, what every op folder holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "kernels",
    "model",
    "worker",
    "cluster",
    "launch",
)  # each may import itself and what is left of it

# Parts that may name a third-party module at all, and files inside model/worker that may go lower.
THIRD_PARTY = {
    "ray": ("cluster/",),
    "yaml": ("cluster/",),
    "triton": ("kernels/",),
    "torch.distributed": ("model/parallel/", "worker/distributed.py", "worker/rendezvous.py"),
    "transformers": (),
    "accelerate": (),
}

# The lead of every answer to "why is this import inside a function": (file, why).
LAZY_IMPORTS = {
    "kernels/__init__.py": "public ops are loaded when first named",
    "kernels/dispatch.py": "the implementation table imports what was chosen",
    "kernels/platform.py": "asks for triton only where there is a device",
    "model/registry.py": "architectures are loaded by name",
    "cluster/executors.py": "ray is imported only by the ray executor",
    "cluster/retrieval_plot.py": "matplotlib is an extra",
    "cluster/cli.py": "a verb loads only what it needs",
}

TORCH_CUDA = {
    "kernels/platform.py": "the one place that asks the machine",
    "kernels/testing.py": "timers",
    "kernels/nvcc.py": "builds for the device it finds",
    "kernels/side_stream.py": "forks and joins the caller's stream",
    "worker/device.py": "sets the rank's device and reads its memory",
    "worker/worker.py": "picks the rank's device",
    "worker/cuda_graph.py": "capture and replay",
}

MAX_LINES = 300
HARD_LINES = 500
LONG_FILES: dict[str, str] = {
    "model/parallel/partition.py": "all of the sharding maths, in one place",
}

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, with where it stands."""

    path: str
    line: int
    module: str
    in_function: bool
    type_checking: bool


def product_files() -> list[Path]:
    files = [ROOT / "launch.py"]
    for part in PARTS[:-1]:
        files += sorted((ROOT / part).rglob("*.py"))
    return files


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, in_function: bool, checking: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            check = checking or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(rel(path), child.lineno, alias.name, inside, check)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = rel(path).split("/")[: -child.level]
                    base = ".".join([*package, *([base] if base else [])])
                for alias in child.names:
                    yield Import(rel(path), child.lineno, f"{base}.{alias.name}", inside, check)
            yield from walk(child, inside, check)

    yield from walk(tree_of(path), False, False)


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_imports_point_down() -> None:
    wrong = []
    for path in product_files():
        level = PARTS.index(part_of(rel(path)))
        for item in imports_of(path):
            top = item.module.split(".")[0]
            if top == "tests" or (top in PARTS and PARTS.index(top) > level):
                wrong.append(f"{item.path}:{item.line} imports {item.module}")
    assert not wrong, "\n".join(wrong)


def test_third_party_walls() -> None:
    wrong = []
    for path in product_files():
        for item in imports_of(path):
            for module, allowed in THIRD_PARTY.items():
                if f"{item.module}.".startswith(f"{module}.") and not item.path.startswith(allowed):
                    wrong.append(f"{item.path}:{item.line} imports {item.module}")
    assert not wrong, "\n".join(wrong)


def test_launch_reaches_only_the_cluster_facade() -> None:
    ours = {i.module for i in imports_of(ROOT / "launch.py") if i.module.split(".")[0] in PARTS}
    assert all(module.startswith("cluster.cli.") for module in ours), ours


def test_kernels_import_only_torch_and_ops_below() -> None:
    """An op folder knows itself, the shared kernel files, and torch (numpy and triton where named)."""
    allowed = {"torch", "triton", "numpy", "kernels", "__future__"}
    wrong = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for item in imports_of(path):
            top = item.module.split(".")[0]
            if path.name == f"{top}_impl.py":
                continue  # an optional backend's own file, loaded only where it is installed
            if top not in allowed and top not in _standard_library():
                wrong.append(f"{item.path}:{item.line} imports {item.module}")
    assert not wrong, "\n".join(wrong)


@cache
def _standard_library() -> frozenset[str]:
    return frozenset(sys.stdlib_module_names)


def test_no_imports_inside_functions() -> None:
    wrong = [
        f"{item.path}:{item.line} imports {item.module} inside a function"
        for path in product_files()
        for item in imports_of(path)
        if item.in_function and item.path not in LAZY_IMPORTS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles_hidden_by_type_checking() -> None:
    """A TYPE_CHECKING import of our own code would point at what the file may not know."""
    wrong = []
    for path in product_files():
        level = PARTS.index(part_of(rel(path)))
        for item in imports_of(path):
            top = item.module.split(".")[0]
            if item.type_checking and top in PARTS and PARTS.index(top) > level:
                wrong.append(f"{item.path}:{item.line} {item.module}")
    assert not wrong, "\n".join(wrong)


def test_no_dangerous_calls() -> None:
    wrong = []
    for path in product_files():
        for item in imports_of(path):
            if item.module.split(".")[0] in FORBIDDEN_MODULES:
                wrong.append(f"{item.path}:{item.line} imports {item.module}")
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            target = node.func
            if isinstance(target, ast.Name) and target.id in FORBIDDEN_CALLS:
                wrong.append(f"{rel(path)}:{node.lineno} calls {target.id}")
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.value, ast.Name)
                and (target.value.id, target.attr) in FORBIDDEN_ATTRIBUTES
            ):
                wrong.append(f"{rel(path)}:{node.lineno} calls {target.value.id}.{target.attr}")
    assert not wrong, "\n".join(wrong)


def test_no_assert_and_no_bare_except() -> None:
    """Asserts vanish under ``python -O``; what goes wrong gets an error with a name."""
    wrong = []
    for path in product_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{rel(path)}:{node.lineno} assert")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{rel(path)}:{node.lineno} bare except")
    assert not wrong, "\n".join(wrong)


def test_torch_cuda_only_where_named() -> None:
    wrong = []
    for path in product_files():
        if rel(path) in TORCH_CUDA or rel(path).endswith(
            ("_impl.py", "cuda_launch.py", "tuning.py")
        ):
            continue
        for node in ast.walk(tree_of(path)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "cuda"
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                wrong.append(f"{rel(path)}:{node.lineno} torch.cuda")
    assert not wrong, "\n".join(wrong)


def test_file_sizes() -> None:
    wrong = []
    for path in product_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = HARD_LINES if rel(path) in LONG_FILES else MAX_LINES
        if lines > limit:
            wrong.append(f"{rel(path)}: {lines} lines, allowed {limit}")
    assert not wrong, "\n".join(wrong)


def test_every_public_definition_has_a_docstring() -> None:
    wrong = []
    for path in product_files():
        module = tree_of(path)
        if module.body and ast.get_docstring(module) is None:
            wrong.append(f"{rel(path)}: module")
        for node in module.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ):
                wrong.append(f"{rel(path)}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


@cache
def known_files() -> frozenset[str]:
    """What git knows (a clean clone has nothing else); all files where there is no git."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return frozenset(n for n in listed.stdout.splitlines() if (ROOT / n).exists())
    return frozenset(rel(path) for path in ROOT.rglob("*") if path.is_file())


def op_folders() -> list[Path]:
    names = {n.split("/")[1] for n in known_files() if re.fullmatch(r"kernels/\w+/__init__.py", n)}
    return [ROOT / "kernels" / name for name in sorted(names)]


@pytest.mark.parametrize("folder", op_folders(), ids=lambda p: p.name)
def test_op_folder(folder: Path) -> None:
    """api, reference, and a test of the same name that also holds a benchmark case."""
    for name in ("api.py", "reference.py"):
        assert (folder / name).is_file(), f"{rel(folder)} has no {name}"
    test = ROOT / "tests" / "kernels" / f"test_{folder.name}.py"
    assert test.is_file(), f"{rel(folder)} has no {rel(test)}"
    assert "mark.benchmark" in test.read_text(encoding="utf-8"), f"{rel(test)}: no benchmark case"


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_tree() -> dict[str, str]:
    """Path -> comment, of the file tree in README (the block that starts with ``launch.py``)."""
    block = re.search(r"```text\n(launch\.py.*?)```", readme(), re.S)
    assert block is not None, "README.md: no file tree"
    entries: dict[str, str] = {}
    folder = ""
    for line in block.group(1).splitlines():
        name, _, comment = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            entries[name] = comment.strip()
        else:
            entries[folder + name] = comment.strip()
    return entries


def test_readme_tree_matches_the_disk() -> None:
    entries = readme_tree()
    for name, comment in entries.items():
        found = any(path == name or path.startswith(name) for path in known_files())
        assert found, f"README.md names {name}, which is not there"
        assert comment, f"README.md: {name} has no comment"
    for path in sorted(known_files()):
        top, _, rest = path.partition("/")
        if top.startswith("."):
            continue
        assert (f"{top}/" if rest else top) in entries, f"{top} is missing in README.md's file tree"
        # One line per op would only repeat docs/kernels.md.
        if top in PARTS and rest and top != "kernels" and rest != "__init__.py":
            child, _, below = rest.partition("/")
            name = f"{top}/{child}" + ("/" if below else "")
            assert name in entries, f"{name} is missing in README.md's file tree"


def test_readme_names_real_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", readme()))
    assert {"demo", "test"} <= named
    assert named <= targets, named - targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_real_files(page: str) -> None:
    """Every path in backticks with a slash and a known ending exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    ours = "cluster|worker|model|kernels|configs|tests|docs|assets|benchmarks"
    paths = re.findall(rf"`((?:{ours})/[\w./-]+\.(?:py|md|yaml|svg))`", text)
    missing = [p for p in paths if not (ROOT / p).exists()]
    assert not missing, f"{page} names {missing}"
