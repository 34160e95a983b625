"""How accurate a network is, as it is and under each attack, and over the radius of the attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustcompress.data import Images
from robustcompress.publish import chart
from robustcompress.publish.markup import Html, Part, figure, note, plain, section, table, tag
from robustcompress.publish.reading import BOUND, attack_kind, attack_name, doubts, number, percent
from robustcompress.result import CompressResult
from robustcompress.robust import AttackResult, RobustReport, ThreatModel, evaluate
from robustcompress.robust.statistics import wilson

CURVE_ATTACK = "pgd-20"


def attacks(result: CompressResult) -> Html:
    """The table and the picture of accuracies; what has to be read with them."""
    report = result.report
    if report is None:
        return section("attacks", "Accuracy under attack", [note(doubt) for doubt in doubts(report)])
    shown = [*report.attacks, *([report.worst_case] if len(report.attacks) > 1 else [])]
    rows = [_row(attack) for attack in shown]
    dots = [(attack_name(a.name), 100 * a.accuracy, 100 * a.low, 100 * a.high, _colour(a)) for a in shown if a.n]
    said = "; ".join(f"{name} {value:.1f} % ({low:.1f} to {high:.1f})" for name, value, low, high, _ in dots)
    columns = ("attack", "accuracy", "95 % interval", "images", "largest change", "what it can be taken for")
    caption = f"{report.threat.label()}, {report.n} test images, seed {report.seed} of the attacks"
    drawn = None
    if dots:
        picture = chart.intervals(dots, alt=f"Accuracy with 95 % intervals: {said}", x="accuracy (%)")
        drawn = figure(picture, "Dots are the accuracy on the judged images, lines their 95 % Wilson intervals.")
    return section(
        "attacks",
        "Accuracy under attack",
        table(columns, rows, caption=caption, text=(0, 5)),
        drawn,
        _suite(report),
        tag("p", BOUND, " An image that is misclassified without an attack counts as wrong under every attack."),
        tag(
            "p",
            "The numbers are those of the saved record; ",
            tag("code", "robustcompress evaluate"),
            " measures again.",
        ),
        [note(plain(said, 600)) for said in report.mistakes()],
        [note(doubt) for doubt in doubts(report)],
        [note(warning, warning=True) for warning in report.warnings],
        [note(odd, warning=True) for odd in _oddities(result, report)],
    )


def _row(attack: AttackResult) -> tuple[str, ...]:
    worst = attack.name == "worst case"
    change = f"{attack.max_perturbation:.4g}" if math.isfinite(attack.max_perturbation) else "-"
    return (
        attack_name(attack.name),
        percent(attack.accuracy),
        f"{100 * attack.low:.1f} to {100 * attack.high:.1f} %",
        str(attack.n),
        change,
        "images that withstood every attack above" if worst else attack_kind(attack),
    )


def _colour(attack: AttackResult) -> int:
    return {"clean": 0, "autoattack": 1, "worst case": 3}.get(attack.name, 2)


def _suite(report: RobustReport) -> Part:
    """What AutoAttack was made of."""
    for attack in report.attacks:
        if attack.name == "autoattack":
            first = ", ".join(f"{plain(name, 40)} {count}" for name, count in attack.broken_by.items())
            judged = "" if attack.n == report.n else f" It judged {attack.n} of the {report.n} images."
            broke = f" Images that each of its attacks was the first to break: {first}." if first else ""
            return tag("p", f"AutoAttack: the {plain(attack.suite, 200) or 'unnamed'} suite.{judged}{broke}")
    return None


def _oddities(result: CompressResult, report: RobustReport) -> list[str]:
    """What in the record itself does not go together."""
    found = []
    if report.threat != result.threat:
        found.append(
            f"the network was trained against {result.threat.label()} and attacked within {report.threat.label()}."
        )
    found += [
        f"{attack_name(attack.name)} changed an image by {attack.max_perturbation:.4g}, more than the threat allows."
        for attack in report.attacks
        if attack.max_perturbation > report.threat.limit
    ]
    return found


def measure_curve(
    result: CompressResult, images: Images, radii: Sequence[float], *, count: int | None, device: str
) -> list[dict[str, float]]:
    """Attack with PGD-20 at each radius: `{"eps", "n", "accuracy"}` a point, radius 0 (no attack) first."""
    found: list[dict[str, float]] = []
    for eps in sorted(set(radii)):
        threat = ThreatModel(result.threat.norm, eps, result.threat.bounds)
        report = evaluate(
            result.model, images, threat, attacks=("clean", CURVE_ATTACK), max_images=count, device=device
        )
        for name, radius in (("clean", 0.0), (CURVE_ATTACK, eps)):
            attack = report.result(name)
            if radius or not found:
                found.append({"eps": radius, "n": attack.n, "accuracy": attack.accuracy})
    return found


def recorded_curve(result: CompressResult) -> list[Mapping[str, Any]]:
    """The curve that the run itself measured; empty where it measured none."""
    found = result.settings.get("curve")
    return [point for point in found if isinstance(point, Mapping)] if isinstance(found, list) else []


def curve(result: CompressResult, measured: Sequence[Mapping[str, Any]]) -> Html | None:
    """Accuracy over the radius of the attack; None where nothing that can be drawn was measured."""
    found = []
    for point in measured[:100]:
        eps, n, accuracy = (number(point.get(key)) for key in ("eps", "n", "accuracy"))
        if eps is not None and n is not None and accuracy is not None and 0 <= accuracy <= 1 and 1 <= n <= 10**9:
            found.append((eps, int(n), accuracy, *wilson(min(int(n), round(accuracy * int(n))), int(n))))
    if not found:
        return None
    found.sort()
    series = chart.Series(
        name="PGD-20, 95 % intervals",
        points=[(eps, 100 * accuracy) for eps, _, accuracy, _, _ in found],
        low=[100 * low for *_, low, _ in found],
        high=[100 * high for *_, high in found],
        colour=2,
    )
    said = "; ".join(f"{percent(accuracy)} at {eps:.4g}" for eps, _, accuracy, _, _ in found)
    norm = result.threat.norm
    picture = chart.lines(
        [series],
        alt=f"Accuracy under PGD-20 by radius: {said}",
        x=f"eps ({norm})",
        y="accuracy (%)",
        y_range=(0.0, 102.0),
        marks=[(result.threat.eps, "trained against")],
    )
    rows = [
        (f"{eps:.4g}", percent(accuracy), f"{100 * low:.1f} to {100 * high:.1f} %", str(n))
        for eps, n, accuracy, low, high in found
    ]
    return section(
        "curve",
        "Security curve",
        tag("p", "How accuracy under PGD-20 falls as the attack may change more; AutoAttack usually leaves less."),
        figure(picture, f"Accuracy on test images, by the radius of the attack in {norm}; eps 0 is no attack."),
        table(("eps", "accuracy", "95 % interval", "images"), rows, text=()),
    )
