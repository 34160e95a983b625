"""What the README and the docs say is run, and what they claim is in a committed file."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from robustcompress.cli import build_parser
from robustcompress.data.digits import digits_source
from robustcompress.data.pools import Source
from robustcompress.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def few_digits(**options: Any) -> Source:
    """The embedded digits, but fewer: what the blocks do with them is the same, in a third of the time."""
    source = digits_source(**options)
    assert source.test is not None
    train, test = (replace(pool, labels=pool.labels[:n]) for pool, n in ((source.train, 440), (source.test, 80)))
    return replace(source, train=train, test=test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.name == "benchmarks.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustcompress.data.sources.digits_source", few_digits)
    before, module = dict(STRATEGIES), types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    try:
        exec(compile("\n".join(blocks), str(page), "exec"), module.__dict__)
    finally:
        STRATEGIES.clear()
        STRATEGIES.update(before)
    if page.name == "README.md":
        assert (tmp_path / "compact" / "model.safetensors").is_file()
        assert (tmp_path / "compact.onnx").is_file()


def test_shell_lines_are_commands_we_have() -> None:
    lines = [line.strip() for line in README.splitlines() if line.startswith("    robustcompress ")]
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])


def test_set_up_commands_stand_as_promised() -> None:
    commands = [line.strip() for line in README.splitlines() if "python3 -m venv .venv &&" in line]
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/robustcompress quickstart",
        "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_quickstart_table_is_the_committed_one() -> None:
    numbers = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
    table = README.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    for name, network in numbers["networks"].items():
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        for attack in ("clean", "pgd-20", "autoattack"):
            assert f"{100 * network['accuracies'][attack]['accuracy']:.1f}" in line
        assert f"n={network['accuracies']['autoattack']['n']}" in table


def test_the_table_of_distillation_is_the_committed_one() -> None:
    text = (
        (ROOT / "docs" / "distillation.md").read_text().split("<!-- distilled -->")[1].split("<!-- /distilled -->")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("| 0.")]
    for line, budget in zip(lines, ("0.5", "0.25"), strict=True):
        for attack in ("clean", "pgd-20", "pgd-100-margin"):
            means = []
            for arm in ("hydra+rslad", "hydra"):
                cells = (ROOT / "benchmarks" / "results" / "digits-distilled").glob(f"{arm}_{budget}_s?.json")
                reports = [json.loads(cell.read_text())["results"]["report"]["attacks"] for cell in cells]
                found = [entry["accuracy"] for report in reports for entry in report if entry["name"] == attack]
                assert len(found) == 3
                means.append(f"{100 * sum(found) / 3:.1f}")
            assert " against ".join(means) in line
