"""What a step is said to cost, against the convolutions that it carries out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_cost import passes, teacher_passes
from robustcompress.robust import ThreatModel
from robustcompress.robust.objectives import OBJECTIVES, objective_from_name
from robustcompress.train.loop import CLEAN_EVERY

WIDTH, LAYERS, IMAGES = 12, 4, 4
OPTIONS = {"semantic-at": {"hierarchy": "digits"}, "crown-ibp": {"warm_up": 0.2, "ramp": 0.6}}
LOOKS = {"natural": 0, "trades": 0, "mart": 0, "distil": 0, "rslad": 0, "iad": 0, "ibp": 0, "crown-ibp": 0}


class Convolutions(TorchDispatchMode):
    """Counts what the inner layers do, forwards and for each gradient; the ends are cheaper backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name == "aten::convolution" and tuple(args[1].shape[:2]) == (WIDTH, WIDTH):
            self.count += len(args[0]) / IMAGES
        elif name == "aten::convolution_backward" and tuple(args[2].shape[:2]) == (WIDTH, WIDTH):
            self.count += sum(args[-1][:2]) * len(args[1]) / IMAGES
        return func(*args, **(kwargs or {}))


def net() -> nn.Sequential:
    inner = [layer for _ in range(LAYERS) for layer in (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *inner, nn.Flatten(), nn.Linear(WIDTH * 64, 10))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_passes_are_those_of_a_step(name: str) -> None:
    student, teacher = net(), net()
    objective = objective_from_name(name, **OPTIONS.get(name, {}))
    told = objective.to_json()
    with Convolutions() as seen:
        trains = objective.taught_by(teacher).begin()
        trains.loss(
            student, torch.rand(IMAGES, 3, 8, 8), torch.arange(IMAGES), ThreatModel("linf", 0.05)
        ).loss.backward()
    looked = LOOKS.get(name, 1 / CLEAN_EVERY)
    if name == "crown-ibp":  # the step at the end of the ramp is that of `ibp`
        assert passes(told) == passes(objective_from_name("ibp").to_json()) + 3 * 10 * 0.4
        return
    assert passes(told) + teacher_passes(told) - looked == pytest.approx(seen.count / LAYERS)
