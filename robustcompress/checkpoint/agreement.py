"""Whether the processes of a run are where they should be: at the same place, with the same bits."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from robustcompress.checkpoint.state import State
from robustcompress.distributed import DistributedError, World

DRIFT = 1e-3
"""Relative difference of a tensor's norm up to which it is put down to machines that round differently."""


def digest(value: Any) -> str:
    """SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def agree(world: World, phase: str, state: State) -> None:
    """Make sure that all processes begin a phase alike: edits, names and shapes, weights, optimizers, generators.

    What differs by rounding (machines that are not alike) is taken from the first process.

    Args:
        world: The processes; all call this.
        phase: Its name, for the message.
        state: Where this process's state lives.

    Raises:
        DistributedError: They have gone different ways.
    """
    if world.size == 1:
        return
    tensors, record = state.gather()
    told = {
        "edits of the network": digest(record["edits"]),
        "names or shapes of tensors": digest({name: list(tensor.shape) for name, tensor in tensors.items()}),
        "numbers beside the tensors": digest({key: value for key, value in record.items() if key != "edits"}),
        "states of random generators": _bits({n: t for n, t in tensors.items() if n.startswith("generator/")}),
        "values": _bits(tensors),
    }
    everyone = world.gather(told)
    for what, mine in everyone[0].items():
        others = [rank for rank, other in enumerate(everyone) if other[what] != mine]
        if not others:
            continue
        if what == "values":
            _mend(world, phase, state, tensors, record)
        else:
            raise DistributedError(_apart(phase, others[0], what))


def _mend(world: World, phase: str, state: State, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    norms = {name: float(tensor.double().norm()) for name, tensor in tensors.items()}
    everyone = world.gather(norms)
    for name, expected in everyone[0].items():
        for rank, other in enumerate(everyone):
            if not abs(other[name] - expected) <= DRIFT * max(abs(expected), 1e-6):
                raise DistributedError(_apart(phase, rank, f"values of {name}"))
    state.restore(world.broadcast({name: tensor.cpu() for name, tensor in tensors.items()}), record)


def _apart(phase: str, rank: int, what: str) -> str:
    return (
        f"before phase {phase!r} process {rank} has other {what} than process 0: they have gone different ways. Was "
        "every process given the same arguments and data? A strategy must put what it decides by looking at weights "
        "through session.decide()"
    )


def _bits(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
