"""All that moves while a run trains, gathered into tensors and plain JSON, and put back in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from robustcompress.data import Batches
from robustcompress.errors import CheckpointError
from robustcompress.structure import AnyEdit
from robustcompress.train import Midway, Selection

Tensors = dict[str, torch.Tensor]


class Stateful(Protocol):
    """Anything that can tell its state and take it back, such as an `nn.Module`: tensors and plain JSON by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take a state."""
        ...


@dataclass(slots=True, kw_only=True)
class State:
    """Where a run's state lives.

    Attributes:
        modules: Networks by name: "model", and "average" where there is one.
        optimizers: By name: "optimizer" goes on from phase to phase, "phase" belongs to one.
        generators: By name; torch's global ones come by themselves.
        edits: Every structural edit so far, in order.
        batches: Knows the epoch of the training images.
        selection: The best epoch so far, in a phase that selects.
        kept: What strategies and training methods registered.
        midway: What matters within an epoch alone; None where nothing is trained.
        device: Where it trains.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generators: dict[str, torch.Generator]
    edits: tuple[AnyEdit, ...]
    batches: Batches
    selection: Selection | None
    kept: dict[str, Stateful] = field(default_factory=dict)
    midway: Midway | None = None
    device: torch.device

    def gather(self, *, within: bool = False) -> tuple[Tensors, dict[str, Any]]:
        """The state: tensors where they are, and the rest as plain JSON.

        Args:
            within: Whether an epoch has begun that is not at its end.
        """
        tensors: Tensors = {}
        record: dict[str, Any] = {"epoch": self.batches.epoch, "device": self.device.type, "values": {}, "kept": {}}
        record["edits"] = [edit.to_json() for edit in self.edits]
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in _named(module).items()}
        for name, optimizer in self.optimizers.items():
            for key, value in _optimizer_state(optimizer, self._known()).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    record["values"][f"{name}/{key}"] = value
        for name, generator in self.generators.items():
            tensors[f"generator/{name}"] = generator.get_state()
        tensors["generator/torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.selection is not None:
            record["best"] = list(self.selection.best)
            tensors |= {f"best/{key}": tensor for key, tensor in (self.selection.state or {}).items()}
        for name, thing in self.kept.items():
            state = thing.state_dict()
            tensors |= {f"kept/{name}/{key}": v for key, v in state.items() if isinstance(v, torch.Tensor)}
            record["kept"][name] = {key: v for key, v in state.items() if not isinstance(v, torch.Tensor)}
        if within and self.midway is not None:
            found = self.midway.state_dict()
            tensors |= {f"midway/{key}": v for key, v in found.items() if isinstance(v, torch.Tensor)}
            record["midway"] = {key: v for key, v in found.items() if not isinstance(v, torch.Tensor)}
        return tensors, record

    def is_finite(self) -> bool:
        """Whether weights, averages and running statistics hold nothing infinite, and no NaN."""
        named = [tensor for module in self.modules.values() for tensor in _named(module).values()]
        return all(bool(tensor.isfinite().all()) for tensor in named)

    def restore(self, tensors: Tensors, record: Mapping[str, Any]) -> bool:
        """Put a state back.

        Returns:
            Whether all of it was: generators of another kind of device cannot be.

        Raises:
            CheckpointError: It is the state of other networks or optimizers.
        """
        if record["edits"] != [edit.to_json() for edit in self.edits]:
            raise CheckpointError(
                "the network was edited otherwise there; a strategy must put what it decides by looking at weights "
                "through session.decide()"
            )
        for name, module in self.modules.items():
            _load_named(name, _named(module), _part(tensors, name))
        for name, optimizer in self.optimizers.items():
            values = {key: v for key, v in record["values"].items() if key.startswith(f"{name}/")}
            stored = _part(tensors, name) | {key.removeprefix(f"{name}/"): v for key, v in values.items()}
            _load_optimizer(name, optimizer, stored, self._known())
        for name, thing in self.kept.items():
            if name not in record["kept"]:
                if getattr(thing, "optional", False):
                    continue
                raise CheckpointError(f"it knows nothing of {name!r}, which this run keeps")
            thing.load_state_dict({**_part(tensors, f"kept/{name}"), **record["kept"][name]})
        if self.selection is not None:
            best = {key: tensor.to(self.device) for key, tensor in _part(tensors, "best").items()}
            self.selection.best, self.selection.state = tuple(record["best"]), best or None
        if "midway" in record:
            if self.midway is None:
                raise CheckpointError("it was written within an epoch, and nothing is trained here")
            self.midway.load_state_dict({**_part(tensors, "midway"), **record["midway"]})
        self.batches.epoch = record["epoch"]
        return self._restore_generators(_part(tensors, "generator"), same_device=record["device"] == self.device.type)

    def _restore_generators(self, states: Tensors, *, same_device: bool) -> bool:
        torch.set_rng_state(states["torch"])
        if same_device and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)
        for name, generator in self.generators.items():
            if same_device or generator.device.type == "cpu":
                generator.set_state(states[name])
            else:  # a run must not draw again what it drew before
                generator.manual_seed(generator.initial_seed() + int(states["torch"].long().sum()))
        return same_device

    def _known(self) -> set[int]:
        """Parameters that the networks hold already."""
        return {id(p) for module in self.modules.values() for p in module.parameters()}


def _part(tensors: Tensors, name: str) -> Tensors:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def _named(module: nn.Module) -> Tensors:
    """Parameters and buffers, each once, also those that a state dict leaves out."""
    return {name: p.detach() for name, p in module.named_parameters()} | dict(module.named_buffers())


@torch.no_grad()
def _load_named(what: str, present: Tensors, stored: Tensors) -> None:
    """Copy values in place, so that every tensor keeps its identity and its layout."""
    if present.keys() != stored.keys():
        differ = sorted(present.keys() ^ stored.keys())
        raise CheckpointError(f"its {what} has other tensors than this one: {', '.join(differ[:5])}")
    for name, tensor in present.items():
        if tensor.shape != stored[name].shape:
            raise CheckpointError(
                f"its {what} has {name} of shape {list(stored[name].shape)}, this one {list(tensor.shape)}"
            )
        tensor.copy_(stored[name])


def _positions(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Every parameter by its place: names change from run to run for what no network holds."""
    return {
        f"{g}.{i}": parameter
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }


def _optimizer_state(optimizer: torch.optim.Optimizer, known: set[int]) -> dict[str, Any]:
    """State by place and name; and the values of parameters that no network holds, such as scores of gates."""
    found: dict[str, Any] = {}
    for place, parameter in _positions(optimizer).items():
        if id(parameter) not in known:
            found[f"{place}.parameter"] = parameter.detach()
        found |= {f"{place}.state.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return found


@torch.no_grad()
def _load_optimizer(what: str, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], known: set[int]) -> None:
    places = _positions(optimizer)
    loose = {place: p for place, p in places.items() if id(p) not in known}
    kept = {key.removesuffix(".parameter"): v for key, v in stored.items() if key.endswith(".parameter")}
    _load_named(what, {place: p.detach() for place, p in loose.items()}, kept)
    optimizer.state.clear()
    for key, value in stored.items():
        place, inside, name = key.partition(".state.")
        if not inside:
            continue
        if place not in places:
            raise CheckpointError(f"its {what} holds more parameters than this one")
        parameter = places[place]
        if isinstance(value, torch.Tensor) and name != "step":  # Adam counts its steps on the CPU
            value = value.to(parameter.device)
        optimizer.state[parameter][name] = value
