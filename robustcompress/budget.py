"""What a network costs, and how much of it is allowed."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from robustcompress.errors import Problems
from robustcompress.min_robust import MinRobust
from robustcompress.structure import StructuralEditor
from robustcompress.structure.groups import Axis, inside
from robustcompress.structure.kinds import slots_of
from robustcompress.structure.layout import span_width
from robustcompress.structure.weights import count_weights

DISAGREEMENT = 0.05
"""Relative difference between the two operation counters above which it is said."""


NOISE = 0.03
"""Two measurements of one network's latency may differ by this much before it is said that a limit is missed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one network costs.

    Attributes:
        macs: Multiply-adds for one image, as thop counts them (convolution, linear, and its small change for
            normalisation and pooling; not the two products between tokens inside attention, which every head takes with
            it when it goes; none for types of layers that thop does not know).
        params: Parameters, counted one by one.
        size: Bytes of the parameters and buffers in memory.
        latency_ms: Median time of one image through torch on the CPU, in milliseconds; None where not measured.
        weights: Weights of convolutions and linear layers; None in records older than this count.
        nonzeros: How many of them are not zero.
        compressed: Bytes of parameters and buffers after zlib, where measured: what zeros save on disk.
        note: Said when thop and half of torch's own FLOP counter differ by more than 5 %; else empty.
        onnx_ms: Median time of one image through onnxruntime on the CPU, one thread, in milliseconds; None where no
            limit on latency asked for it.
    """

    macs: int
    params: int
    size: int
    latency_ms: float | None = None
    note: str = ""
    weights: int | None = None
    nonzeros: int | None = None
    compressed: int | None = None
    onnx_ms: float | None = None

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return 1.0 if self.weights is None or self.nonzeros is None else self.nonzeros / max(1, self.weights)

    def to_json(self) -> dict[str, Any]:
        """The cost as plain JSON."""
        return {key: value for key, value in asdict(self).items() if key != "onnx_ms" or value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the compact model may cost; every limit given must hold at the end.

    Attributes:
        macs: Multiply-adds at batch 1, as a fraction of the reference model's.
        params: Parameters, as a fraction of the reference model's.
        max_macs: Multiply-adds at batch 1.
        max_params: Parameters.
        density: Weights of convolutions and linear layers that are not zero, as a fraction of the reference's weights:
            0.1 is what the field calls 90 % sparsity. For strategies with granularity="weight".
        latency: Milliseconds of one image through onnxruntime on the CPU, one thread, as a fraction of the reference
            model's.
        max_latency_ms: Those milliseconds, on the machine that compresses.
        min_robust: No limit but a demand: the smallest model that keeps this accuracy under attack, as the lower end of
            its 95 % interval. A number is shorthand for `MinRobust(number)`. `compress()` then compresses several
            times over.
    """

    macs: float | None = None
    params: float | None = None
    max_macs: float | None = None
    max_params: float | None = None
    density: float | None = None
    latency: float | None = None
    max_latency_ms: float | None = None
    min_robust: MinRobust | float | None = None

    def __post_init__(self) -> None:
        problems = Problems("the budget makes no sense")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "min_robust":
                demand = problems.attempt(lambda value=value: MinRobust.of(value))  # type: ignore[misc]
                object.__setattr__(self, "min_robust", demand or value)
            elif (
                not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0
            ):
                problems.add(f"{field.name}={value!r}: must be a positive number")
            elif field.name in ("macs", "params", "latency") and value > 4:
                absolute = "max_latency_ms" if field.name == "latency" else f"max_{field.name}"
                problems.add(
                    f"{field.name}={value!r} is a fraction of the reference; for an absolute limit use "
                    f"{absolute}, for {value:g} % write {value / 100:g}"
                )
        if isinstance(self.density, int | float) and self.density >= 1:
            problems.add(f"density={self.density!r}: must be below 1; for 90 % zeros write 0.1")
        if all(getattr(self, field.name) is None for field in fields(self)):
            problems.add("no limit is given; for half the multiply-adds write Budget(macs=0.5)")
        problems.raise_if_any()

    @property
    def demand(self) -> MinRobust | None:
        """What `min_robust` says in full; None where it says nothing."""
        return None if self.min_robust is None else MinRobust.of(self.min_robust)

    def limits(self, reference: Cost) -> tuple[float, float]:
        """The absolute limits (MACs, parameters) this sets for a given reference; infinite where nothing is said."""
        macs = [self.macs * reference.macs] if self.macs is not None else []
        macs += [self.max_macs] if self.max_macs is not None else []
        params = [self.params * reference.params] if self.params is not None else []
        params += [self.max_params] if self.max_params is not None else []
        return min(macs, default=math.inf), min(params, default=math.inf)

    @property
    def limits_latency(self) -> bool:
        """Whether anything is said about latency."""
        return self.latency is not None or self.max_latency_ms is not None

    def latency_limit(self, reference_ms: float) -> float:
        """The milliseconds this allows for a reference that takes `reference_ms`; infinite where nothing is said."""
        limits = [self.latency * reference_ms] if self.latency is not None else []
        limits += [self.max_latency_ms] if self.max_latency_ms is not None else []
        return min(limits, default=math.inf)

    def allows(self, cost: Cost, reference: Cost) -> bool:
        """Whether `cost` keeps every limit; that on latency within noise (3 %), and only where both were measured."""
        macs, params = self.limits(reference)
        latency = self.latency_limit(reference.onnx_ms or math.inf)
        quick = (cost.onnx_ms or 0.0) <= latency * (1 + NOISE)
        if self.density is not None and (cost.nonzeros is None or reference.weights is None):
            return False
        sparse = self.density is None or (cost.nonzeros or 0) <= self.density * (reference.weights or 0)
        return cost.macs <= macs and cost.params <= params and quick and sparse

    def to_json(self) -> dict[str, Any]:
        """The limits that are given."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """The limits in words, for example "macs <= 50 % of the reference"."""
        said = [str(self.demand)] if self.demand is not None else []
        for key, value in self.to_json().items():
            if key == "min_robust":
                continue
            absolute = key.startswith("max_")
            name, unit = key.removeprefix("max_").removesuffix("_ms"), " ms" if key.endswith("_ms") else ""
            said.append(f"{name} <= " + (f"{human(value)}{unit}" if absolute else f"{value:.3g} x reference"))
        return ", ".join(said)


def human(value: float) -> str:
    """A count with a unit: 555.4M, 11.17M, 8.1k."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def measure(model: nn.Module, example: torch.Tensor, *, latency: bool = False, compressed: bool = False) -> Cost:
    """Count a model's operations and parameters at batch 1.

    thop runs on a deep copy, because it leaves buffers in what it profiles.

    Args:
        model: The network; not touched.
        example: One input batch `[N, 3, H, W]`; its first image is used.
        latency: Also time it.
        compressed: Also compress the parameters and buffers, as a download of them would be.
    """
    macs, _ = _profile(model, example)
    flops = _flop_counter(model, example)
    params = sum(p.numel() for p in model.parameters())
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    note = ""
    if abs(macs - flops) > DISAGREEMENT * max(macs, flops):
        note = (
            f"thop counts {human(macs)} MACs, torch's FLOP counter {human(flops)}: thop also counts normalisation "
            "and pooling, but not what attention multiplies token by token, and neither sees every functional operation"
        )
    weights, nonzeros = count_weights(model)
    return Cost(
        macs=round(macs),
        params=params,
        size=size,
        latency_ms=_latency(model, example) if latency else None,
        note=note,
        weights=weights,
        nonzeros=nonzeros,
        compressed=_compressed(model) if compressed else None,
    )


def _compressed(model: nn.Module) -> int:
    packer, size = zlib.compressobj(), 0
    for tensor in [*model.parameters(), *model.buffers()]:
        size += len(packer.compress(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
    return size + len(packer.flush())


def _latency(model: nn.Module, example: torch.Tensor, *, runs: int = 20) -> float:
    twin, single = _single(model, example)
    twin, single = twin.cpu(), single.cpu()
    times = []
    with torch.inference_mode():
        for _ in range(runs + 3):
            start = time.perf_counter()
            twin(single)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def _single(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    # torch's counter asks every gradient for its function, and parameters handed from layer to layer have none.
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(twin.parameters())
    return twin, example[:1].detach().to(parameter.device, parameter.dtype)


def _profile(model: nn.Module, example: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Total MACs, and those of each leaf module by name."""
    twin, single = _single(model, example)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it imports distutils, and calls its own rule for PReLU deprecated
        import thop

        macs, _, tree = thop.profile(twin, inputs=(single,), verbose=False, ret_layer_info=True)
    return float(macs), dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, (operations, _, inner) in tree.items():
        if inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", float(operations)


def _flop_counter(model: nn.Module, example: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    twin, single = _single(model, example)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(single)
    return float(counter.get_total_flops()) / 2


class _Share(NamedTuple):
    """What one layer, or one parameter, has of the cost: in proportion to the widths of these axes.

    Multiply-adds go also with the positions of another dimension along which the layer is applied.
    """

    module: str
    axes: tuple[Axis, ...]
    macs: float
    params: int


class CostModel:
    """Predicts the cost of any widths without building the network.

    Every layer's share is thop's own count of the reference, scaled by the widths it reads and writes, so that the
    prediction is exact for convolutions, linear layers, batch norms and layer norms. Of taught layers (see
    `structure.teach_layer`) parameters are exact; multiply-adds are what thop counts, which is none for types that it
    does not know, subclasses of torch's layers among them. What thop counts for layers that hold no channels of their
    own (pooling) is bounded from above: it stays where groups shrink, and grows with the group that grows most. So a
    network that is predicted to keep a budget keeps it.

    Blocks that leave the network after this was made leave the prediction too. When parts have been inserted, or
    layers factorised, it is made anew from the network as it is then.

    Args:
        editor: The editor of the model as it is now.
        example: One input batch.
    """

    def __init__(self, editor: StructuralEditor, example: torch.Tensor) -> None:
        self._editor, self._example = editor, example
        self._count()

    def _count(self) -> None:
        editor = self._editor
        self._layout, self._start, self._rebuilt = editor.layout, editor.widths, editor.rebuilt
        self._macs, self._per_layer = _profile(editor.model, self._example)
        self._params = {name: p.numel() for name, p in editor.model.named_parameters()}
        self._layers: list[_Share] = []
        by_module: dict[str, list[Axis]] = {}
        for axis in self._layout.axes:
            if axis.side != "param":
                by_module.setdefault(axis.module, []).append(axis)
        for name, held in by_module.items():
            module = editor.model.get_submodule(name)
            # Each group of a grouped convolution reads as many channels as before: only what it writes counts.
            axes = [axis for axis in held if axis.side != "in" or slots_of(module, "in")]
            shares = [_Share(name, tuple(axes), self._per_layer.get(name, 0.0), 0)]
            # A weight scales with every side that it lies on, a bias with what is written.
            sides = {side: dict(slots_of(module, side)) for side in {axis.side for axis in axes}}
            for tensor, parameter in module.named_parameters(recurse=False):
                along = tuple(axis for axis in axes if tensor in sides[axis.side])
                if along == shares[0].axes and not shares[0].params:
                    shares[0] = shares[0]._replace(params=parameter.numel())
                elif along:
                    shares.append(_Share(name, along, 0.0, parameter.numel()))
            self._layers.extend(shares)
        self._owned = set(by_module)
        for axis in self._layout.axes:
            if axis.side == "param":
                self._layers.append(_Share(axis.module, (axis,), 0.0, self._params[axis.module]))
        self._counted: dict[frozenset[str], tuple[float, float, float, list[_Share]]] = {}

    def predict(self, widths: Mapping[str, int], *, without: Iterable[str] = ()) -> tuple[float, float]:
        """MACs and parameters of the network with these group widths.

        Args:
            widths: Of groups that are not named, those from when this was made count (or made anew).
            without: Blocks to leave out, beside those that the editor has bypassed.
        """
        macs, params = self._sums(widths, without)
        return float(macs), float(params)

    def relaxed(self, widths: Mapping[str, Any]) -> tuple[Any, Any]:
        """As `predict`, for widths that are no whole numbers: floats, or tensors, and then with their gradients."""
        return self._sums(widths)

    def macs_of_groups(self) -> dict[str, float]:
        """Multiply-adds now of the layers that write each group, and of those through which it passes.

        No layer is counted twice: one that writes several groups is shared out by positions. What is counted for layers
        that write none (pooling) is in none.
        """
        self._refresh()
        found = dict.fromkeys(self._start, 0.0)
        for layer in self._layers:
            for axis in layer.axes:
                if axis.side == "in":
                    continue
                width = self._layout.axis_width(axis, self._start)
                for segment in self._layout.axes[axis]:
                    if segment.group is not None:
                        found[segment.group] += layer.macs * segment.positions(self._start[segment.group]) / width
        return found

    def _refresh(self) -> None:
        if self._editor.rebuilt != self._rebuilt:
            self._count()

    def _sums(self, widths: Mapping[str, Any], without: Iterable[str] = ()) -> tuple[Any, Any]:
        self._refresh()
        widths = {**self._start, **widths}
        most = max((widths[name] / width for name, width in self._start.items()), default=1.0)
        macs, params, unowned, layers = self._left(frozenset((*self._editor.bypassed, *without)))
        macs = macs + unowned * max(0.0, most - 1)
        for layer in layers:
            scale: Any = 1.0
            for axis in layer.axes:
                scale = scale * (self._layout.axis_width(axis, widths) / self._layout.axis_width(axis, self._start))
            often: Any = 1.0
            for spans in self._layout.across.get(layer.module, ()) if layer.macs else ():
                often = often * (span_width(spans, widths) / span_width(spans, self._start))
            macs = macs + layer.macs * (scale * often - 1)
            params = params + layer.params * (scale - 1)
        return macs, params

    def _left(self, gone: frozenset[str]) -> tuple[Any, Any, float, list[_Share]]:
        """MACs, parameters, MACs of layers without channels, and layers of what these blocks leave."""
        if gone not in self._counted:
            per_layer = {name: macs for name, macs in self._per_layer.items() if not inside(name, gone)}
            macs = self._macs - sum(self._per_layer[name] for name in self._per_layer.keys() - per_layer.keys())
            unowned = macs - sum(count for name, count in per_layer.items() if name in self._owned)
            params = sum(count for name, count in self._params.items() if not inside(name, gone))
            layers = [layer for layer in self._layers if not inside(layer.module, gone)]
            self._counted[gone] = (macs, float(params), unowned, layers)
        return self._counted[gone]
