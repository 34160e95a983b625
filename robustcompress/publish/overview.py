"""What a report page begins with: what was compressed, how, what it costs, and what it withstands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from robustcompress.budget import Budget, human
from robustcompress.publish import chart
from robustcompress.publish.markup import Html, Part, facts, figure, join, note, section, table, tag
from robustcompress.publish.reading import (
    BOUND,
    attack_name,
    data_name,
    doubts,
    hardest,
    interval,
    model_name,
    pathless,
    percent,
    short,
    strategy_name,
)
from robustcompress.result import CompressResult
from robustcompress.strategies import STRATEGIES
from robustcompress.structure import NEW, Bypass, Edit, Factorise

DIRECTIONS = {
    "grow": "grows a small network out of the reference",
    "prune": "prunes the reference",
    "search": "searches for a smaller network within the reference",
    "none": "trains the reference as it is, for comparison",
}


def header(result: CompressResult, title: str) -> Html:
    """The title, one sentence, and the numbers that matter most."""
    before, after = result.before, result.after
    lead = f"Trained on {data_name(result)} against {result.threat.label()}, seed {result.seed}."
    tiles = [
        tile(percent(after.macs / before.macs), f"of the multiply-adds: {human(after.macs)} of {human(before.macs)}"),
        tile(
            percent(after.params / before.params), f"of the parameters: {human(after.params)} of {human(before.params)}"
        ),
    ]
    report = result.report
    if report is not None:
        clean = report.result("clean")
        tiles.append(tile(percent(clean.accuracy), f"clean accuracy ({interval(clean)}, n={clean.n})"))
        attack = hardest(report)
        if attack is not None:
            meter = "" if attack.name == "autoattack" else ", a progress meter"
            said = (
                f"under {attack_name(attack.name)}{meter}, {report.threat.label()} ({interval(attack)}, n={attack.n})"
            )
            tiles.append(tile(percent(attack.accuracy), said))
    return join(
        [
            tag("h1", title),
            tag("p", lead, class_="lead"),
            tag("ul", tiles, class_="tiles"),
            tag("p", BOUND, " Intervals are 95 % Wilson intervals over the images that were judged."),
            [note(doubt) for doubt in doubts(report)],
        ]
    )


def tile(value: str, said: str) -> Html:
    """One number that matters."""
    return tag("li", tag("b", value), tag("span", said))


def compression(result: CompressResult) -> Html:
    """What was compressed, and how."""
    kind = STRATEGIES.get(str(result.strategy["name"]))
    options = {key: value for key, value in result.strategy.items() if key != "name"}
    kept = "kept" if result.meets_budget else "not kept"
    name = tag("code", result.spec.name) if result.spec is not None else f"{model_name(result)}, a network of its own"
    return section(
        "compression",
        "What was compressed, and how",
        facts(
            {
                "reference": [name, f" ({short(result.spec.kwargs)})" if result.spec and result.spec.kwargs else None],
                "strategy": [tag("code", strategy_name(result)), _does(kind)],
                "its options": short(pathless(options)) or None,
                "budget": f"{Budget(**result.budget)}: {kept}" if result.budget else None,
                "threat trained against": f"{result.threat.label()}, pixels from {result.threat.bounds[0]:g} to "
                f"{result.threat.bounds[1]:g}",
                "training objective": short(result.settings.get("objective")),
                "fine-tuned by": _of(result.settings, "finetune"),
                "teacher": _of(result.settings, "teacher"),
                "epochs": short(result.settings.get("epochs")),
                "edits": _edits(result),
                "images": f"{data_name(result)}: {' x '.join(map(str, result.image_shape))} in [0, 1], "
                f"{len(result.classes)} classes ({short(list(result.classes[:20]))})",
                "extra training images": _of(result.data, "extra"),
            }
        ),
        None if result.meets_budget else note(f"this network costs more than {Budget(**result.budget)}.", warning=True),
    )


def _of(record: Mapping[str, Any], key: str) -> str | None:
    """A part of a record that most results do not have."""
    return short(record[key]) if record.get(key) else None


def _does(kind: object) -> str | None:
    said = DIRECTIONS.get(str(getattr(kind, "direction", "")))
    return f", which {said}" if said else None


def _edits(result: CompressResult) -> str:
    """How many edits lead from the reference to this network, by what they do."""
    counts: Counter[str] = Counter()
    for edit in result.edits:
        if isinstance(edit, Edit):
            counts["grew a group" if NEW in edit.sources else "cut a group"] += 1
        else:
            kinds = {Bypass: "took a block out", Factorise: "factorised a layer"}
            counts[kinds.get(type(edit), "changed a block")] += 1
    return "; ".join(f"{count} that {what}" for what, count in counts.items()) or "none"


def costs(result: CompressResult) -> Html:
    """The costs, before and after."""
    ratios = [
        (name, 100 * float(ratio), 100.0, f"{100 * float(ratio):.1f} %", 0) for name, _, _, ratio in result.rows()
    ]
    said = ", ".join(f"{name} {written}" for name, _, _, written, _ in ratios)
    notes: list[Part] = [tag("p", result.after.note)] if result.after.note else []
    return section(
        "costs",
        "Costs",
        table(("cost", "before", "after", "ratio"), result.rows()),
        figure(
            chart.bars(ratios, alt=f"Costs after compression, of the reference: {said}", x="% of the reference"),
            "What is left of each cost; the outline is the reference.",
        ),
        tag(
            "p",
            "Multiply-adds are for one image. Times are medians of single images on the machine that compressed, "
            "and compare only with each other.",
            class_="small",
        ),
        notes,
    )
