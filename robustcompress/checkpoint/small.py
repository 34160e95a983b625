"""The small form of a checkpoint's tensors: fewer bits for what a run can do with less of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

LEVELS = 127
HALF_MAX = 6e4
"""Matrices that hold larger values are kept as they are: float16 ends at 65504."""


def encode(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Round the matrices among a run's tensors.

    Weights become float16. Averaged weights become int8 differences from them, a selected epoch's weights int8
    differences from the averaged ones, moments of an optimizer int8 differences from zero; each row (the first
    dimension) has its own scale, so the error is at most 1/254 of the row's largest difference. Second moments are
    rounded upwards in their square roots: Adam then takes smaller steps, never larger ones. Vectors, counters and
    generators are kept as they are.

    Where a selected epoch is carried, SGD's momentum is not.

    Args:
        tensors: By the names that `journal` gives them: "model/...", "average/module....", "best/...",
            "optimizer/...".

    Returns:
        The arrays to store, and how each rounded tensor is made of them, by name.
    """
    arrays: dict[str, torch.Tensor] = {}
    forms: dict[str, dict[str, Any]] = {}
    selected = any(name.startswith("best/") for name in tensors)
    decoded: dict[str, torch.Tensor] = {}
    for name in _ordered(tensors):
        tensor = tensors[name].detach().cpu()
        if selected and name.endswith(".momentum_buffer"):
            continue
        if tensor.dim() < 2 or not tensor.is_floating_point() or not _fits(tensor):
            arrays[name] = tensor
            continue
        form: dict[str, Any] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        form["stride"] = list((tensor if is_dense(tensor) else tensor.contiguous()).stride())
        base = next((b for b in _bases(name) if b in decoded and decoded[b].shape == tensor.shape), None)
        if base is None and not _is_moment(name):
            form["kind"], arrays[name] = "half", tensor.half()
        else:
            form |= {"kind": "roots" if name.endswith("_avg_sq") else "rows", "base": base}
            values = tensor.float() - (decoded[base].float() if base is not None else 0)
            arrays[name], arrays[f"{name}#scale"] = _rounded(values, upwards=form["kind"] == "roots")
        forms[name] = form
        if name.startswith(("model/", "average/")):
            decoded[name] = _decoded(name, form, arrays, decoded)
    return arrays, forms


def decode(arrays: Mapping[str, torch.Tensor], forms: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Undo `encode`, up to its rounding."""
    tensors: dict[str, torch.Tensor] = {}
    for name in _ordered(arrays):
        if name in forms:
            tensors[name] = _decoded(name, forms[name], arrays, tensors)
        elif not (name.endswith("#scale") and name.removesuffix("#scale") in forms):
            tensors[name] = arrays[name]
    return tensors


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _ordered(names: Mapping[str, Any]) -> Iterator[str]:
    """Bases before what is told as a difference from them."""
    first = ("model/", "average/")
    for prefix in first:
        yield from (name for name in names if name.startswith(prefix))
    yield from (name for name in names if not name.startswith(first))


def _bases(name: str) -> Iterator[str]:
    kind, _, rest = name.partition("/")
    if kind == "average":
        yield f"model/{rest.removeprefix('module.')}"
    elif kind == "best":
        yield f"average/module.{rest}"
        yield f"model/{rest}"


def _is_moment(name: str) -> bool:
    return name.endswith((".momentum_buffer", ".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq"))


def _fits(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and bool(tensor.isfinite().all()) and float(tensor.abs().max()) < HALF_MAX


def _rounded(values: torch.Tensor, *, upwards: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`[R, ...]` as int8, and one float32 scale a row, `[R]`."""
    values = values.clamp_min(0).sqrt() if upwards else values
    rows = values.flatten(1)
    scale = rows.abs().amax(1) / LEVELS
    ratio = rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    levels = ratio.ceil() if upwards else ratio.round()
    return levels.clamp(-LEVELS, LEVELS).to(torch.int8).view(values.shape), scale


def _decoded(
    name: str, form: Mapping[str, Any], arrays: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    stored = arrays[name].view(form["shape"]).float()
    if form["kind"] != "half":
        scale = arrays[f"{name}#scale"].view(-1, *[1] * (stored.dim() - 1))
        stored = stored * scale
        if form["kind"] == "roots":
            stored = stored.square()
        elif form["base"] is not None:
            stored = stored + tensors[form["base"]].float()
    dtype = getattr(torch, form["dtype"].removeprefix("torch."))
    result = torch.empty_strided(form["shape"], form["stride"], dtype=dtype)
    return result.copy_(stored)
