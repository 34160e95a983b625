"""A result without the training, with a history of every kind, and what a hostile record would say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.models import identify
from robustcompress.strategies import make_strategy

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{7*7}}`|\n# x\u202e[a](javascript:alert(3))</style>"
)
THREAT = rc.ThreatModel("linf", 0.1)

HISTORY: tuple[dict[str, Any], ...] = (
    {"phase": "pretrain", "epoch": 1, "steps": 3, "loss": 2.3, "robust": 0.1, "clean": 0.2},
    {"phase": "search", "epoch": 1, "steps": 3, "loss": 2.2, "robust": 0.2, "hamming": 0.25, "sharpness": 0.02},
    {"phase": "search", "event": "scores", "changed": 0.25},
    {"phase": "candidates", "event": "candidate", "config": [1, 2], "bypassed": [], "val_clean": 0.4}
    | {"val_robust": 0.2, "reward": 0.5, "macs": 1000},
    {"phase": "candidates", "event": "candidate", "config": [0, 1], "bypassed": ["layers.0"], "val_clean": 0.5}
    | {"val_robust": 0.3, "reward": 0.7, "macs": 900},
    {"phase": "prune", "event": "prune", "widths": {"conv1": 3}, "macs": 900.0, "params": 40.0},
    {"phase": "tail", "epoch": 1, "steps": 3, "loss": 1.9, "robust": 0.3, "val_clean": 0.5, "val_robust": 0.25},
)


def build_result(data: rc.DataSplits) -> rc.CompressResult:
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.25, stem_stride=4)
    example = torch.zeros(2, 3, 32, 32)
    spec, before = identify(model), rc.measure(model, example)
    editor = rc.StructuralEditor(model, example)
    editor.prune(editor.editable[0].name, range(1, editor.editable[0].width))
    editor.grow(editor.editable[1].name, 2)
    settings = {
        "objective": {"name": "pgd-at", "steps": 3},
        "recipe": {"batch_size": 64, "lr": 0.05},
        "epochs": 2.0,
        "pretrained": False,
        "round_to": 2,
        "device": "1 CPU threads",
        "versions": {"robustcompress": rc.__version__, "torch": torch.__version__},
    }
    return rc.CompressResult(
        model=model.eval(),
        spec=spec,
        strategy=make_strategy("hydra").to_json(),
        edits=editor.edits,
        before=before,
        after=rc.measure(model, example),
        budget={"macs": 0.99},
        history=HISTORY,
        report=rc.evaluate(model, data.test, THREAT, attacks=("clean", "fgsm", "pgd-2"), max_images=30),
        threat=THREAT,
        data={"name": "digits", "sha256": data.sha256, "classes": list(data.classes), "image_shape": [3, 32, 32]}
        | {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        settings=settings,
        seed=0,
    )


def spoil(value: Any) -> Any:
    """The same data with something hostile in every text."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {key: spoil(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    return [spoil(item) for item in value] if isinstance(value, list | tuple) else value


def hostile(result: rc.CompressResult) -> rc.CompressResult:
    """A result whose every text was written by somebody who wants the page to do something."""
    assert result.report is not None
    attacks = tuple(
        replace(attack, name=attack.name if attack.name == "clean" else attack.name + HOSTILE, suite=HOSTILE)
        for attack in result.report.attacks
    )
    autoattack = replace(attacks[1], name="autoattack", broken_by={HOSTILE: 3})
    report = replace(result.report, attacks=(*attacks, autoattack), warnings=(HOSTILE,))
    data = {**result.data, "name": HOSTILE, "sha256": HOSTILE, "classes": [f"{HOSTILE}{i}" for i in range(10)]}
    events = ("grow", "candidate", HOSTILE)
    history = [*map(spoil, result.history), *({"event": event, HOSTILE: HOSTILE, "phase": HOSTILE} for event in events)]
    return replace(
        result,
        strategy=spoil(dict(result.strategy)),
        data=data,
        settings=spoil(dict(result.settings)),
        history=tuple(history),
        report=report,
    )


@pytest.fixture(scope="session")
def digits() -> rc.DataSplits:
    return rc.load_data("digits", train_limit=200, test_limit=40)


@pytest.fixture(scope="session")
def result(digits: rc.DataSplits) -> rc.CompressResult:
    return build_result(digits)


@pytest.fixture
def saved(result: rc.CompressResult, tmp_path: Path) -> Path:
    return result.save(tmp_path / "result")
