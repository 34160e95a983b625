"""The page about deployment: it names every example, its commands exist, and its code runs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

EXPORT = Path(__file__).parents[2] / "export"
README = (EXPORT / "README.md").read_text()
COMMANDS = re.findall(r"^    python (export/\S+\.py) (.*)$", README, re.MULTILINE)


def test_every_example_has_a_line_and_a_section() -> None:
    listed = {name.rstrip("/") for name in re.findall(r"^\| \[`([^`]+)`\]", README, re.MULTILINE)}
    there = {p.name for p in EXPORT.iterdir() if not p.name.startswith(".") and p.name != "__pycache__"}
    assert listed == there - {"README.md"}
    anchors = {
        re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in re.findall(r"^## (.*)$", README.lower(), re.M)
    }
    assert set(re.findall(r"\(#([^)]+)\)", README)) <= anchors


@pytest.mark.parametrize("script", sorted({name for name, _ in COMMANDS}))
def test_its_commands_are_understood(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXPORT.parent / script
    if "/server/" in script:  # its modules have short names, which must not stay behind in this process
        pytest.importorskip("fastapi", reason="the server's own requirements are not installed")
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=60, check=True)
        said = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr().out
    assert "example: python" in " ".join(said.split())
    for name, rest in COMMANDS:
        if name == script:
            for word in shlex.split(rest):
                assert not word.startswith("-") or re.search(rf"(?<![\w-]){word}\b", said), word


@pytest.mark.slow
def test_the_exported_program_runs_without_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(
        compile(block + "\ntorch.save(model(torch.ones(5, 3, 32, 32) / 2).detach(), 'wanted.pt')", "page", "exec"),
        names,
    )
    program = (
        "import sys, torch\n"
        "sys.modules['robustcompress'] = None\n"
        "found = torch.export.load('model.pt2').module()(torch.ones(5, 3, 32, 32) / 2)\n"
        "torch.testing.assert_close(found, torch.load('wanted.pt'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_openvino_agrees_with_onnxruntime(deployed: object) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    for kind in ("logits", "fixed", "probabilities", "resizing"):
        command = [sys.executable, str(EXPORT / "compare_openvino.py"), str(getattr(deployed, kind))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and "100.00 % same class" in done.stdout, done.stdout + done.stderr
