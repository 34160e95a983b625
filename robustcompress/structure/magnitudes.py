"""How large the weights are that make up a channel."""

from __future__ import annotations

from collections.abc import Collection

import torch

from robustcompress.structure.editor import StructuralEditor
from robustcompress.structure.kinds import magnitudes_of


def group_norms(editor: StructuralEditor) -> dict[str, torch.Tensor]:
    """Euclidean norm of all weights that touch each channel: its rows, its columns and the scales of its norms.

    Returns:
        Per editable group, `[C]` on the CPU.
    """
    norms: dict[str, torch.Tensor] = {}
    for group in editor.editable:
        total = torch.zeros(group.width, dtype=torch.float64)
        for axis in group.members:
            if axis.side == "param":
                continue
            module = editor.model.get_submodule(axis.module)
            owners = editor.layout.owners(axis, group.name, editor.widths)
            for name, dim in magnitudes_of(module, axis.side):
                weight = module.get_parameter(name).detach().double().cpu()
                squares = weight.square().movedim(dim, 0).flatten(1).sum(1) if weight.dim() > 1 else weight.square()
                total.index_add_(0, owners[owners >= 0], squares[owners >= 0])
        norms[group.name] = total.sqrt()
    return norms


def reader_norms(editor: StructuralEditor, *, only: Collection[str]) -> dict[str, torch.Tensor]:
    """Sum of the magnitudes of all weights that read each channel, over outputs and kernel (HARP's first scores).

    Args:
        editor: Of the network.
        only: Which groups.

    Returns:
        Per group, `[C]` on the CPU.
    """
    norms = {name: torch.zeros(editor.groups[name].width, dtype=torch.float64) for name in only}
    for name, total in norms.items():
        for axis in editor.groups[name].readers:
            module = editor.model.get_submodule(axis.module)
            owners = editor.layout.owners(axis, name, editor.widths)
            for tensor, dim in magnitudes_of(module, axis.side):
                sums = module.get_parameter(tensor).detach().double().cpu().abs().movedim(dim, 0).flatten(1).sum(1)
                total.index_add_(0, owners[owners >= 0], sums[owners >= 0])
    return norms
