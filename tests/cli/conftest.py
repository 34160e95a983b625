"""Saved results that several tests read, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from robustcompress.cli import main

SMALL = ["--model-arg", "stem_stride=4", "--epochs", "0.4", "--attack-steps", "1", "--eps", "0.1"]
SMALL += ["--train-limit", "300", "--test-limit", "40", "--batch-size", "64", "--attacks", "clean,pgd-2"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What one call did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the results `grape` and `none`."""
    directory = tmp_path_factory.mktemp("results")
    for strategy in ("grape", "none"):
        out = str(directory / strategy)
        assert main(["compress", "resnet8", "--strategy", strategy, *SMALL, "--out", out, "--quiet"]) == 0
    return directory


@pytest.fixture
def grape(saved: Path, tmp_path: Path) -> Path:
    """A copy of a result that a test may write into."""
    import shutil

    return Path(shutil.copytree(saved / "grape", tmp_path / "grape"))
