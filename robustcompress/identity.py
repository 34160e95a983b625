"""What makes a run the same run: when it goes on, and in all processes that carry it out together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.checkpoint import digest, fingerprint
from robustcompress.distributed import Parts, World, plan
from robustcompress.errors import Problems
from robustcompress.goal import Goal
from robustcompress.outcome import settings_of
from robustcompress.resolve import Request
from robustcompress.train import HOW, augmentation


def identity_of(request: Request, goal: Goal, reference: nn.Module) -> dict[str, Any]:
    """All that a run's weights depend on, as plain JSON by name, but for the parts of its batches."""
    settings = settings_of(goal, request.device)
    identity = {
        **fingerprint(reference),
        "strategy": request.strategy.identity(),
        "data": goal.data.sha256,
        "augmentation": augmentation(goal.recipe, goal.data.name),
        "budget": goal.budget.to_json(),
        "threat": goal.threat.to_json(),
        "seed": goal.seed,
        **{name: settings[name] for name in ("objective", "recipe", "epochs", "pretrained", "round_to")},
    }
    identity |= request.companions
    if request.latency_table is not None:
        identity["latency_table"] = request.latency_table.sha256
    return identity | {"recipe": {key: value for key, value in settings["recipe"].items() if key not in HOW}}


def with_parts(identity: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The identity of a run whose batches are cut so: by how many parts, whoever computes them."""
    if parts.total == 1:
        return dict(identity)
    recipe = {key: value for key, value in identity["recipe"].items() if key != "accumulate"}
    return {**identity, "recipe": recipe, "parts": parts.total}


def parts_for(accumulate: int, world: World, recorded: Mapping[str, Any]) -> Parts:
    """The parts of a run, given the identity under which it is recorded already; empty where it is not."""
    return plan(accumulate, world, recorded=recorded.get("parts", 1) if recorded else None)


def check_alike(world: World, identity: Mapping[str, Any]) -> None:
    """Raise an InputError in all processes that names what was not given alike to all of them."""
    if world.size == 1:
        return
    everyone = world.gather({name: digest(value) for name, value in identity.items()})
    problems = Problems("the processes were not started alike")
    for rank, other in enumerate(everyone):
        for name in sorted(everyone[0].keys() | other.keys()):
            if other.get(name) != everyone[0].get(name):
                problems.add(f"{name}: process {rank} was given another than process 0")
    problems.raise_if_any()


@torch.no_grad()
def take_weights(world: World, model: nn.Module) -> None:
    """Give a network the values that it has in the first process: each may have drawn its own.

    Raises:
        InputError: The processes have networks of other shapes.
    """
    if world.size == 1:
        return
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    check_alike(world, {"model": {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}})
    for name, values in world.broadcast({name: tensor.detach() for name, tensor in tensors.items()}).items():
        tensors[name].copy_(values)
