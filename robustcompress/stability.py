"""Do searches agree on what to keep: distances between the masks of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.models import ModelSpec, identify
from robustcompress.result import CompressResult
from robustcompress.structure import NEW, Bypass, Factorise, Insert, StructuralEditor
from robustcompress.structure.layout import Layout
from robustcompress.structure.weights import maskable_weights

Masks = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Distances between the masks of several results.

    Attributes:
        names: The results.
        matrix: Normalised Hamming distances in their order: symmetric, zeros on the diagonal.
        mean: The mean over all pairs: 0 where all keep the same.
        chance: What that mean would be if each result kept as many units of each group or layer, drawn at random.
    """

    names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    mean: float
    chance: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "names": list(self.names),
            "matrix": [list(row) for row in self.matrix],
            "mean": self.mean,
            "chance": self.chance,
        }


def hamming(a: CompressResult, b: CompressResult, *, reference: nn.Module | None = None) -> float:
    """Normalised Hamming distance between the masks of two results: the share of units that one keeps and one drops.

    Units are the channels of the reference, over all groups that can be edited; or, for results under a density budget,
    the weights of all convolutions and linear layers, kept where they are not zero. Channels that were grown are no
    units of the reference.

    Networks that were pretrained from different first weights share shapes, and nothing says that their units of one
    number do the same: between such results expect the distance of chance (see `Stability`). Stability between seeds
    says something where the searches start from one pretrained network.

    Args:
        a: A result.
        b: Another of the same reference.
        reference: The network that both began with, where it is not known by name.

    Returns:
        From 0 (the same mask) to 1.

    Raises:
        InputError: The results have different references, one is of channels and one of weights, or the reference is
            needed and not known.
    """
    return stability({"the first result": a, "the second": b}, reference=reference).mean


def stability(results: Mapping[str, CompressResult], *, reference: nn.Module | None = None) -> Stability:
    """Normalised Hamming distances between the masks of all pairs of results.

    Args:
        results: By name, at least two; else as in `hamming`.
        reference: As in `hamming`.

    Raises:
        InputError: As in `hamming`, or there are fewer than two results.
    """
    if len(results) < 2:
        raise InputError(f"{len(results)} results have no distance: give at least two")
    for name, result in results.items():
        if not isinstance(result, CompressResult):
            raise InputError(f"{name} is a {type(result).__name__}: give what compress() returned or load() read")
    masks = _masks(results, reference)
    names = tuple(masks)
    total = sum(bits.numel() for bits in next(iter(masks.values())).values())
    matrix = tuple(tuple(_differing(masks[a], masks[b]) / total for b in names) for a in names)
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    return Stability(
        names=names,
        matrix=matrix,
        mean=sum(matrix[i][j] for i, j in pairs) / len(pairs),
        chance=sum(_by_chance(masks[names[i]], masks[names[j]]) / total for i, j in pairs) / len(pairs),
    )


def _differing(a: Masks, b: Masks) -> int:
    return sum(int((a[name] != b[name]).sum()) for name in a)


def _by_chance(a: Masks, b: Masks) -> float:
    shares = [(a[name].double().mean().item(), b[name].double().mean().item(), a[name].numel()) for name in a]
    return sum(count * (p * (1 - q) + q * (1 - p)) for p, q, count in shares)


def _masks(results: Mapping[str, CompressResult], reference: nn.Module | None) -> dict[str, Masks]:
    first_name, first = next(iter(results.items()))
    began = {name: _began(result) for name, result in results.items()} if reference is None else {}
    for name, result in results.items():
        if began and began[name] != began[first_name]:
            theirs, ours = (r.spec.to_json() if r.spec is not None else "a model of one's own" for r in (result, first))
            raise InputError(f"{name} began with {theirs}, {first_name} with {ours}: masks need the same reference")
        if ("density" in result.budget) != ("density" in first.budget):
            kinds = {True: "single weights", False: "channels"}
            raise InputError(
                f"{name} is a choice of {kinds['density' in result.budget]}, {first_name} of "
                f"{kinds['density' in first.budget]}; compare results of one granularity"
            )
    if "density" in first.budget:
        masks = {name: _kept_weights(result) for name, result in results.items()}
    else:
        layout, widths = _reference_structure(first, reference)
        masks = {name: _kept_channels(name, result, layout, widths) for name, result in results.items()}
    shapes = {name: {key: bits.shape for key, bits in found.items()} for name, found in masks.items()}
    for name in results:
        if shapes[name] != shapes[first_name]:
            raise InputError(f"{name} and {first_name} began with networks of different shapes")
    return masks


def _began(result: CompressResult) -> ModelSpec | None:
    """What built the reference, with all its arguments: a name alone stands for the same network."""
    spec = result.spec
    if spec is None or spec.imports_code:
        return spec
    with torch.random.fork_rng(devices=[]):
        return identify(spec.build()) or spec


def _kept_weights(result: CompressResult) -> Masks:
    return {name: weight.detach() != 0 for name, weight in maskable_weights(result.model).items()}


def _reference_structure(result: CompressResult, reference: nn.Module | None) -> tuple[Layout, dict[str, int]]:
    """Where the reference's channels lie, and the widths of those groups that can be edited."""
    if reference is None:
        if result.spec is None or result.spec.imports_code:
            raise InputError("which channels there were is not known: pass reference=, the network it all began with")
        with torch.random.fork_rng(devices=[]):
            reference = result.spec.build()
    editor = StructuralEditor(reference, torch.zeros(2, *result.image_shape))
    return editor.layout, {group.name: group.width for group in editor.editable}


def _kept_channels(name: str, result: CompressResult, layout: Layout, widths: Mapping[str, int]) -> Masks:
    """Follow each channel of the reference through all edits; those of a block that left are gone."""
    origins = {group: list(range(width)) for group, width in widths.items()}
    for edit in result.edits:
        if isinstance(edit, Bypass):
            layout = layout.without(edit.module, layout.widths())
            origins = {group: channels if group in layout.groups else [] for group, channels in origins.items()}
            continue
        if isinstance(edit, Insert | Factorise) or edit.group not in origins:
            continue  # the classes, and what the reference does not have
        before = origins[edit.group]
        if any(source >= len(before) for source in edit.sources):
            raise InputError(f"the edits of {name} do not fit its reference: is this the network it began with?")
        origins[edit.group] = [NEW if source == NEW else before[source] for source in edit.sources]
    masks: Masks = {}
    for group, width in widths.items():
        masks[group] = torch.zeros(width, dtype=torch.bool)
        masks[group][[origin for origin in origins[group] if origin != NEW]] = True
    return masks
