"""The shape of the package itself, read from its sources: who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "robustcompress"
SOURCES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    {"errors", "untrusted", "durable", "allocator"},
    {"distributed"},
    {"interrupt", "lock"},
    {"structure", "robust", "data", "models"},
    {"min_robust"},
    {"budget", "latency"},
    {"train"},
    {"checkpoint", "goal"},
    {"run"},
    {"budgeted"},
    {"session", "teacher", "terminal", "machine", "hub"},
    {"shapes"},
    {"search"},
    {"diagnostics"},
    {"bounded"},
    {"strategies", "result", "records", "recipe_text"},
    {"export", "plots", "stability", "widths", "front", "cuts", "sensitivity"},
    {"artefact", "certify"},
    {"search_plot", "width_plot", "front_plot", "sensitivity_plot"},
    {"reach"},
    {"latency_table"},
    {"teacher_source"},
    {"resolve", "calibration"},
    {"outcome", "reproduce"},
    {"identity"},
    {"series"},
    {"smallest"},
    {"api"},
    {"practice"},
    {"recipe", "pareto"},
    {"publish"},
    {"quickstart"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Of one layer, and yet strangers to each other.
INDEPENDENT = (
    {"structure", "robust"},
    {"structure", "data"},
    {"structure", "models"},
    {"robust", "models"},
    {"strategies", "result"},
)

CONFINED = {
    "torch_pruning": {"structure/trace.py"},
    "pyautoattack": {"robust/autoattack.py"},
    "thop": {"budget.py"},
    "timm": {"models/timm_models.py"},
    "optuna": {"search/optuna_search.py"},
    "huggingface_hub": {"hub/client.py"},
}
HEAVY = (
    *("torchvision", "onnx", "onnxscript", "onnxruntime", "matplotlib", "thop", "torch_pruning"),
    *("pyautoattack", "rich", "sklearn", "scipy", "PIL", "yaml", "timm", "huggingface_hub", "optuna"),
)


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def component(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module, node
            if node.module == "robustcompress":
                yield from ((f"robustcompress.{name.name}", node) for name in node.names)


each = pytest.mark.parametrize("path", SOURCES, ids=label)


def test_the_sources_are_found() -> None:
    assert {"api", "session", "strategies", "structure", "robust"} <= {component(p) for p in SOURCES}


def test_every_component_has_its_layer() -> None:
    unknown = {component(p) for p in SOURCES} - set(RANK)
    assert not unknown, f"say in LAYERS where {unknown} belong"


@each
def test_imports_point_downwards(path: Path) -> None:
    ours = component(path)
    for module, node in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "robustcompress" or len(parts) == 1:
            continue
        theirs = parts[1]
        if theirs not in RANK or theirs == ours:
            continue  # a name that the package itself exports, such as its version
        assert RANK[theirs] <= RANK[ours], f"line {node.lineno}: {ours} must not know of {theirs}"
        assert {ours, theirs} not in INDEPENDENT, f"line {node.lineno}: {ours} and {theirs} know nothing of each other"


@each
def test_only_the_front_imports_the_package_as_a_whole(path: Path) -> None:
    if component(path) in ("__init__", "__main__", "cli"):
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "robustcompress":
            names = {name.name for name in node.names} - {"__version__"}
            assert all((ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file() for name in names), names
        elif isinstance(node, ast.Import):
            assert all(name.name != "robustcompress" for name in node.names)


@each
def test_foreign_libraries_live_in_one_file(path: Path) -> None:
    for module, node in imports(ast.parse(path.read_text())):
        home = CONFINED.get(module.split(".")[0])
        assert home is None or label(path) in home, f"line {node.lineno}: {module} is imported in {home} alone"


@each
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module, _ in imports(ast.Module([node], [])):
                assert module.split(".")[0] not in HEAVY, f"line {node.lineno}: import {module} in the function"


@each
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    said = ast.get_docstring(ast.parse(text))
    assert said and len(said) > 10
    assert "from __future__ import annotations" in text or not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(text).body
    )


@each
def test_nothing_is_pickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = {module.split(".")[0] for module, _ in imports(tree)}
    assert modules.isdisjoint({"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
            assert not (is_torch and node.func.attr in ("load", "save")), f"line {node.lineno}: torch.{node.func.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}: {node.func.id}"


@each
def test_names_are_not_a_drawer(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


def modules_after(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_costs_little_more_than_torch() -> None:
    torch_alone, ours = modules_after("import torch"), modules_after("import torch, robustcompress")
    heavy = {name for name in ours if name.split(".")[0] in HEAVY}
    assert not heavy, sorted(heavy)[:10]
    extra = {name for name in ours - torch_alone if not name.startswith("robustcompress")}
    assert len(extra) < 150, sorted(extra)


def test_what_the_front_exports_is_there_and_named() -> None:
    import robustcompress

    assert sorted(robustcompress.__all__) == sorted(set(robustcompress.__all__))
    for name in robustcompress.__all__:
        assert getattr(robustcompress, name) is not None
