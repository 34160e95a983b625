"""From measured networks to the predictor: non-negative least squares on few coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from robustcompress.latency.model import LatencyModel, Side, Term
from robustcompress.robust.attacks import eval_mode
from robustcompress.structure import StructuralEditor

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Pulls towards "time in proportion to multiply-adds" that are tried."""

FOLDS = 6
Array = Any  # numpy's own generic arrays say nothing about shapes either


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer, as the fit sees it.

    Attributes:
        family: Layers of one family share their coefficients: one kind of layer at one resolution.
        macs: Multiply-adds at the reference's widths.
        outputs: Numbers written at the reference's widths.
        sides: What the multiply-adds are in proportion to.
        written: What the outputs are in proportion to.
        name: The layer's.
    """

    family: str
    macs: float
    outputs: float
    sides: tuple[Side, ...]
    written: tuple[Side, ...]
    name: str = ""


def layers_of(editor: StructuralEditor, example: torch.Tensor) -> list[Layer]:
    """The layers whose time the widths decide.

    Args:
        editor: Of the reference; not touched.
        example: One input batch; its first image is used.
    """
    sides: dict[str, dict[str, Side]] = {}
    for axis, segments in editor.layout.axes.items():
        groups: dict[str, int] = {}
        for segment in segments:
            if segment.group is not None:
                groups[segment.group] = groups.get(segment.group, 0) + segment.copies
        fixed = sum(segment.fixed for segment in segments if segment.group is None)
        reference = editor.layout.axis_width(axis, editor.widths)
        sides.setdefault(axis.module, {})[axis.side] = Side(tuple(groups.items()), fixed, reference)
    shapes = _output_shapes(editor.model, example[:1])
    layers = []
    for name, module in editor.model.named_modules():
        if name not in sides or name not in shapes or not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        shape, weight = shapes[name], module.get_parameter("weight")
        places = shape[2:].numel() if isinstance(module, nn.modules.conv._ConvNd) else shape[:-1].numel()
        depthwise = "both" in sides[name]
        kind = type(module).__name__ + (" depthwise" if depthwise else "")
        written = tuple(side for key, side in sides[name].items() if key in ("out", "both"))
        layers.append(
            Layer(
                f"{kind} {places}", weight.numel() * places, shape.numel(), tuple(sides[name].values()), written, name
            )
        )
    return layers


def _output_shapes(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Size]:
    seen: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.shape}))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    ]
    try:
        with eval_mode(model), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def fit(layers: Sequence[Layer], widths: Sequence[Mapping[str, int]], ms: Sequence[float]) -> LatencyModel:
    """Fit the predictor to measured networks, on relative errors.

    Coefficients are not negative, so that the prediction never falls as a width rises. How strongly they are pulled
    towards "in proportion to multiply-adds" is what predicts left-out networks best.

    Args:
        layers: What `layers_of` found.
        widths: Of each network, all groups named; the first is the reference, the second the narrowest.
        ms: The median milliseconds of each.
    """
    full, times = dict(widths[0]), np.asarray(ms, dtype=np.float64)
    columns = _columns(layers, widths)
    prior = _prior(layers, columns, times)
    errors = [_held_out(columns, times, prior, ridge) for ridge in RIDGES]
    error = min(errors)
    # The weakest pull of several alike; a difference within rounding is none.
    ridge = next(ridge for ridge, found in zip(RIDGES, errors, strict=True) if found <= error + 1e-9)
    constant, *found = _solve(columns, times, prior, ridge).tolist()
    families = _families(layers)
    terms = []
    for index, (_, members) in enumerate(families.items()):
        macs, outputs = sum(layer.macs for layer in members), sum(layer.outputs for layer in members)
        for layer in members:
            terms.append(Term(found[2 * index] * layer.macs / macs, layer.sides, layer.name))
            terms.append(Term(found[2 * index + 1] * layer.outputs / outputs, layer.written, layer.name))
    return LatencyModel(
        reference_ms=float(times[0]),
        narrowest_ms=float(min(times)),
        constant=constant,
        terms=tuple(term for term in terms if term.ms > 0),
        widths=full,
        held_out=error,
        networks=len(times),
    )


def _families(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    families: dict[str, list[Layer]] = {}
    for layer in layers:
        families.setdefault(layer.family, []).append(layer)
    return families


def _columns(layers: Sequence[Layer], widths: Sequence[Mapping[str, int]]) -> Array:
    """`[networks, 1 + 2 families]`: a constant, then each family's multiply-adds and outputs over the reference's."""
    columns = [np.ones(len(widths))]
    for members in _families(layers).values():
        macs, outputs = np.zeros(len(widths)), np.zeros(len(widths))
        for layer in members:
            for row, known in enumerate(widths):
                macs[row] += layer.macs * float(np.prod([side.ratio(known) for side in layer.sides]))
                outputs[row] += layer.outputs * float(np.prod([side.ratio(known) for side in layer.written]))
        columns += [macs / sum(layer.macs for layer in members), outputs / sum(layer.outputs for layer in members)]
    return np.stack(columns, axis=1)


def _prior(layers: Sequence[Layer], columns: Array, times: Array) -> Array:
    """Coefficients if all multiply-adds cost the same and nothing else costs anything but a constant."""
    macs = np.array([sum(layer.macs for layer in members) for members in _families(layers).values()])
    share = macs / macs.sum()
    both = np.stack([np.ones(len(times)), columns[:, 1::2] @ share], axis=1)
    constant, slope = nonnegative(both / times[:, None], np.ones(len(times)))
    prior = np.zeros(columns.shape[1])
    prior[0], prior[1::2] = constant, slope * share
    return prior


def _solve(columns: Array, times: Array, prior: Array, ridge: float) -> Array:
    """Coefficients for relative errors, pulled towards the prior."""
    scale = prior + times.max() / len(prior)
    pull = np.sqrt(ridge) * np.diag(1 / scale)
    design = np.concatenate([columns / times[:, None], pull])
    return nonnegative(design, np.concatenate([np.ones(len(times)), pull @ prior]))


def _held_out(columns: Array, times: Array, prior: Array, ridge: float) -> float:
    """Mean relative error over networks left out in turn; the reference is known to every fit."""
    errors = []
    for fold in range(FOLDS):
        out = (np.arange(len(times)) % FOLDS == fold) & (np.arange(len(times)) > 0)
        if out.any():
            found = _solve(columns[~out], times[~out], prior, ridge)
            errors += (np.abs(columns[out] @ found - times[out]) / times[out]).tolist()
    return float(np.mean(errors)) if errors else 0.0


def nonnegative(design: Array, target: Array) -> Array:
    """Least squares without negative coefficients: the active-set method of Lawson and Hanson (1974, chapter 23).

    Args:
        design: `[rows, columns]`.
        target: `[rows]`.

    Returns:
        `[columns]`.
    """
    size = np.where(np.linalg.norm(design, axis=0) > 0, np.linalg.norm(design, axis=0), 1.0)
    scaled = design / size
    found, free = np.zeros(design.shape[1]), np.zeros(design.shape[1], dtype=bool)
    for _ in range(10 * design.shape[1]):
        gain = scaled.T @ (target - scaled @ found)
        gain[free] = -np.inf
        if free.all() or gain.max() <= 1e-12 * np.linalg.norm(target):
            break
        free[gain.argmax()] = True
        while free.any():
            trial = np.zeros_like(found)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            if trial[free].min() > 0:
                break
            # Go only as far as nothing becomes negative; what reaches zero is bound again.
            bad = free & (trial <= 0)
            reach = found[bad] / np.maximum(found[bad] - trial[bad], 1e-300)
            found = found + reach.min() * (trial - found)
            free &= found > 1e-14
            found[~free] = 0.0
        found = np.where(free, trial, 0.0) if free.any() else np.zeros_like(found)
    return found / size
