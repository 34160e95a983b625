"""What each operation that autograd recorded does to labels.

Nothing here knows of layers: `Couplings` gives a layer's output its labels, and asks for everything in between. An
operation without a rule of its own passes the labels of operands that broadcast to its result, or of one whose labelled
dimensions keep their size; what else it does to channels shows when the trace is proven. Where labels cannot be
followed, their units are set aside as opaque.
"""

from __future__ import annotations

from collections.abc import Callable

from robustcompress.structure import moves, products
from robustcompress.structure.labels import Label, Shape
from robustcompress.structure.steps import Labels, Step, hide, join


def carry(step: Step) -> Labels:
    """The labels of an operation's output."""
    if not any(operand.labels for operand in step.operands):
        return ()
    name = step.function.name()
    rule = next((rule for prefixes, rule in _RULES if name.startswith(prefixes)), _default)
    return tuple(label for label in rule(step) if label.live)  # a lone unit may have lost its dimension


def _default(step: Step) -> Labels:
    given = [operand for operand in step.operands if operand.labels]
    if all(_broadcasts(operand.shape, step.shape) for operand in given):
        return join(given, step.shape, step.ledger)
    kept: list[Label] = []
    for operand in given:
        for label in operand.labels:
            shape = operand.shape or ()
            same = {d for d in label.live if len(shape) == len(step.shape) and shape[d] == step.shape[d]}
            if same and len(given) == 1:
                kept.append(_narrowed(label, label.live - same, step))
            else:
                step.ledger.hide(label.units())
    return tuple(kept)


def _narrowed(label: Label, dims: frozenset[int], step: Step) -> Label:
    """Without dimensions whose positions are mixed, as the places of a table of positions are when it is resized."""
    if not dims:
        return label
    first = label.ids[tuple(slice(1) if d in dims else slice(None) for d in range(label.ids.dim()))]
    step.ledger.couple(label.ids, first)
    return Label(first, label.live - dims)


def _broadcasts(inside: Shape | None, outside: Shape) -> bool:
    if inside is None or len(inside) > len(outside):
        return False
    return all(a in (1, b) for a, b in zip(reversed(inside), reversed(outside), strict=False))


_RULES: tuple[tuple[tuple[str, ...], Callable[[Step], Labels]], ...] = (
    (
        ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward"),
        moves.view,
    ),
    (("PermuteBackward",), moves.permute),
    (("TransposeBackward",), moves.transpose),
    (("TBackward",), moves.turn),
    (("ExpandBackward",), moves.expand),
    (("MeanBackward", "SumBackward", "AmaxBackward", "AminBackward", "MaxBackward", "MinBackward"), moves.reduce),
    (("StdBackward", "VarBackward", "VarMeanBackward", "LinalgVectorNormBackward", "LogsumexpBackward"), moves.reduce),
    (("CatBackward",), moves.cat),
    (("StackBackward",), moves.stack),
    (("SliceBackward",), moves.cut),
    (("SplitBackward", "SplitWithSizesBackward"), moves.split),
    (("SelectBackward", "UnbindBackward"), moves.select),
    (("IndexSelectBackward",), moves.index_select),
    (("IndexBackward",), moves.index),
    (("RollBackward",), moves.roll),
    (("FlipBackward",), moves.flip),
    (("RepeatBackward",), moves.repeat),
    (("ConstantPadNdBackward",), moves.pad),
    (("MmBackward", "AddmmBackward", "BmmBackward", "BaddbmmBackward"), products.product),
    (("ScaledDotProduct",), products.attention),
    (("PixelShuffleBackward", "PixelUnshuffleBackward", "Im2ColBackward", "ConvolutionBackward"), hide),
    (("TopkBackward", "SortBackward", "GatherBackward", "ScatterBackward", "CumsumBackward"), hide),
)
"""Looked up in order by the beginning of autograd's own names."""
