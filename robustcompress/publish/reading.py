"""A result's records as numbers and names: what a stranger's file holds is doubted, and shown only where it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from robustcompress.export.metadata import without_paths
from robustcompress.publish.markup import plain
from robustcompress.result import CompressResult
from robustcompress.robust import AttackResult, RobustReport

BOUND = "Accuracy under attack is an upper bound on robustness, never a certificate."

ATTACKS = {"clean": "no attack", "autoattack": "AutoAttack", "worst case": "worst case"}
"""How attacks are called; others by their own names in capitals."""


def number(value: object) -> float | None:
    """A finite number as one; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def points(records: list[Mapping[str, Any]], key: str, *, scale: float = 1.0) -> list[tuple[float, float]]:
    """What records hold under a key, by their numbers 1, 2, ...; those that hold no number are passed over."""
    found = [(float(place), number(record.get(key))) for place, record in enumerate(records, 1)]
    return [(place, scale * value) for place, value in found if value is not None]


def model_name(result: CompressResult) -> str:
    """What the reference is called."""
    name = result.spec.name if result.spec is not None else type(result.model).__name__
    return plain(name.removeprefix("robustcompress:"), 120)


def strategy_name(result: CompressResult) -> str:
    """What the strategy is called."""
    return plain(result.strategy["name"], 120)


def data_name(result: CompressResult) -> str:
    """What the data are called."""
    return plain(result.data["name"], 120)


def attack_name(name: str) -> str:
    """What an attack is called, for people."""
    return ATTACKS.get(name, plain(name, 40).upper())


def attack_kind(attack: AttackResult) -> str:
    """What the accuracy under an attack can be taken for."""
    if attack.name == "clean":
        return "the images as they are"
    if attack.name != "autoattack":
        return "a progress meter, not a result"
    if attack.suite == "standard":
        return "the field's standard evaluation"
    return f"suite: {plain(attack.suite, 80) or 'not said'}; not the standard one"


def percent(share: float) -> str:
    """A share as per cent, such as "51.7 %"; "-" of NaN."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def interval(attack: AttackResult) -> str:
    """Its 95 % interval, such as "39.3 to 63.8 %"."""
    return f"{100 * attack.low:.1f} to {100 * attack.high:.1f} %"


def hardest(report: RobustReport) -> AttackResult | None:
    """AutoAttack where it was run; else the attack that left least; None where there was none."""
    for attack in report.attacks:
        if attack.name == "autoattack" and attack.n:
            return attack
    others = [attack for attack in report.attacks if attack.name != "clean" and attack.n]
    return min(others, key=lambda attack: attack.accuracy, default=None)


def doubts(report: RobustReport | None) -> list[str]:
    """What has to be read with the numbers, a sentence each, without the warnings."""
    if report is None:
        return ["Nothing was evaluated: this result says nothing about accuracy."]
    if report.robust_accuracy is not None:
        return []
    return [
        "AutoAttack was not run. Robust accuracy means AutoAttack at exactly the stated eps; what PGD or FGSM leave is "
        "a progress meter, and AutoAttack usually leaves less."
    ]


def pathless(value: Any) -> Any:
    """The same plain data with paths of this machine, which may hold a user's name, cut down to their last part."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: pathless(item) for key, item in value.items()}
    return [pathless(item) for item in value] if isinstance(value, list | tuple) else value


def short(value: object) -> str:
    """A value of a record for people: numbers short, texts as they are, lists and mappings in brief."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else plain(value, 30)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return plain(", ".join(f"{plain(k, 60)}={short(v)}" for k, v in list(value.items())[:20]))
    if isinstance(value, list | tuple):
        said = ", ".join(short(item) for item in value[:20])
        return plain(said + (f", … ({len(value)} in all)" if len(value) > 20 else ""))
    return plain(value)
