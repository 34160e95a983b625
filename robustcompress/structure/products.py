"""Matrix products and attention: what is summed over meets its partner; what is not goes on."""

from __future__ import annotations

from robustcompress.structure.labels import Label, Shape, permuted
from robustcompress.structure.steps import Labels, Operand, Step, join


def product(step: Step) -> Labels:
    """Matrix products: what is summed over meets its partner; what is not goes on."""
    left, right = step.operands[-2:]
    return _multiplied(step, left, right, shape=step.shape)


def _multiplied(step: Step, left: Operand, right: Operand, *, shape: Shape) -> Labels:
    rank = len(shape)
    rest: list[Operand] = []
    summed: list[Label | None] = []
    for operand, gone in ((left, rank - 1), (right, rank - 2)):
        along = [label for label in operand.labels if gone in label.live]
        summed.append(along[0] if along else None)
        inside = [*(operand.shape or shape)]
        inside[gone] = 1
        rest.append(Operand(tuple(label for label in operand.labels if gone not in label.live), tuple(inside)))
    one, other = summed
    met = one is not None and other is not None and len(one.live) == len(other.live) == 1
    if met and one is not None and other is not None:
        step.ledger.couple(one.ids, other.ids.transpose(-1, -2))
    else:  # a partner without units, such as a weight outside a layer, or units told apart in other dimensions, too
        for label in summed:
            if label is not None:
                step.ledger.hide(label.units())
    return join(rest, shape, step.ledger)


def attention(step: Step) -> Labels:
    """Fused attention: queries and keys are summed over their width, values go on."""
    query, key, value = step.operands[:3]
    swapped = Operand(
        tuple(
            permuted(label, [*range(len(step.shape) - 2), len(step.shape) - 1, len(step.shape) - 2])
            for label in key.labels
        ),
        None if key.shape is None else (*key.shape[:-2], key.shape[-1], key.shape[-2]),
    )
    weights = (*step.shape[:-1], (key.shape or step.shape)[-2])
    mixed = Operand(_multiplied(step, query, swapped, shape=weights), weights)
    return _multiplied(step, mixed, value, shape=step.shape)
