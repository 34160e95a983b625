"""The predictor: a sum over layers of products of widths, on numbers and on tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import Tensor

from robustcompress.structure.groups import inside


@dataclass(frozen=True, slots=True)
class Side:
    """How many channels one side of a layer has, as a sum over groups.

    Attributes:
        groups: Group names, each with the positions that one of its channels takes.
        fixed: Positions that belong to no group.
        reference: Positions at the reference's widths.
    """

    groups: tuple[tuple[str, int], ...]
    fixed: int
    reference: int

    def ratio(self, widths: Mapping[str, Any]) -> Any:
        """Positions at these widths (numbers or tensors) over those of the reference."""
        return sum((copies * widths[name] for name, copies in self.groups), self.fixed) / self.reference


@dataclass(frozen=True, slots=True)
class Term:
    """A share of the time, in proportion to the product of some sides' ratios.

    Attributes:
        ms: Milliseconds at the reference's widths, not negative.
        sides: What it is in proportion to.
        layer: The layer whose share it is.
    """

    ms: float
    sides: tuple[Side, ...]
    layer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Predicts the time of one image through onnxruntime, for any widths; the same every time it is asked.

    Ours, after the look-up tables of resource-aware search (NetAdapt, Yang et al. 2018), with few coefficients in
    place of a table: `constant + sum over layers (a * product of both sides' ratios + b * written side's ratio)`. It
    never falls as a width rises. The truth does: onnxruntime works on blocks of channels, so that of two networks the
    wider may be the faster. What that is worth to the widths that are chosen is measured (see `LatencyLimit`).

    Attributes:
        reference_ms: Median of the reference, measured.
        narrowest_ms: The narrowest network, measured.
        constant: Milliseconds that no width changes.
        terms: What the widths decide.
        widths: The reference's, for groups that are not named in a question.
        held_out: Mean relative error on networks that a fit had not seen.
        networks: How many networks were measured.
    """

    reference_ms: float
    narrowest_ms: float
    constant: float
    terms: tuple[Term, ...]
    widths: Mapping[str, int]
    held_out: float
    networks: int

    @overload
    def predict(self, widths: Mapping[str, float], *, without: Collection[str] = ()) -> float: ...

    @overload
    def predict(self, widths: Mapping[str, Tensor], *, without: Collection[str] = ()) -> Tensor: ...

    def predict(self, widths: Mapping[str, Any], *, without: Collection[str] = ()) -> Any:
        """Milliseconds of the network with these group widths.

        Args:
            widths: Numbers, or scalar tensors, through which gradients run. Groups that are not named have the
                reference's width.
            without: Blocks that have left the network. What the constant holds of them stays, so that this is an upper
                bound for networks that were never measured.
        """
        known = {**self.widths, **widths}
        total: Any = self.constant
        for term in self.terms:
            if inside(term.layer, without):
                continue
            share: Any = term.ms
            for side in term.sides:
                share = share * side.ratio(known)
            total = total + share
        return total

    def to_json(self) -> dict[str, Any]:
        """The model as plain JSON."""
        return asdict(self) | {"widths": dict(self.widths)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LatencyModel:
        """Read what `to_json` wrote, also after a way through JSON."""
        terms = tuple(
            Term(term["ms"], tuple(_side(side) for side in term["sides"]), term.get("layer", ""))
            for term in record["terms"]
        )
        return cls(**{**record, "terms": terms, "widths": dict(record["widths"])})


def _side(record: Mapping[str, Any]) -> Side:
    return Side(tuple((name, copies) for name, copies in record["groups"]), record["fixed"], record["reference"])
