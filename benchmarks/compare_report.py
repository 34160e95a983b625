"""The tables of a grid, from the cells that are there. No figure is made here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import read_cells, read_failures
from benchmarks.common import provenance, table
from benchmarks.grid import EPOCHS, MACS, Grid
from benchmarks.intervals import Estimate, Noise, estimate, pooled
from robustcompress.budget import human
from robustcompress.errors import InputError
from robustcompress.robust import RobustReport, ThreatModel
from robustcompress.robust.report import AttackResult

Record = Mapping[str, Any]
ROBUST = "autoattack"
NOT_RUN = "*Not run yet.*"

PREAMBLE = (
    "Robust accuracy means AutoAttack (standard) at the stated radius; PGD-20 is a progress meter. Means over the "
    "seeds; in brackets the 95 % interval over seeds and test images together (`benchmarks/intervals.py`). Differences "
    "are in points, paired by seed and image; how much training varies is pooled over all rows; **bold** where the "
    "interval leaves out zero. Nothing is corrected for the number of comparisons: of twenty differences, one is "
    "bold by chance."
)


@dataclass(frozen=True, slots=True)
class Row:
    """Cells that differ in nothing but the seed.

    Attributes:
        arm: The strategy or control.
        labels: Its place on the axes.
        account: Equal epochs, or equal training compute.
        cells: By seed.
    """

    arm: str
    labels: Mapping[str, str]
    account: str
    cells: Mapping[int, Record]

    @property
    def seeds(self) -> list[int]:
        """The seeds that are finished."""
        return sorted(self.cells)

    def flags(self, attack: str) -> list[torch.Tensor]:
        """Which images each seed gets right, bool `[N]` each; of images that all seeds judged."""
        found = [flags_of(self.cells[seed], attack) for seed in self.seeds]
        n = min(len(f) for f in found)
        return [f[:n] for f in found]

    def accuracy(self, attack: str, noise: Noise | None = None) -> Estimate:
        """Mean over the seeds; `noise` says how much training varies, where more is known than these seeds tell."""
        return estimate(self.flags(attack), noise=noise)

    def against(self, other: Row, attack: str, noise: Noise | None = None) -> Estimate | None:
        """The difference from another row, by the seeds that both have; None where they share none."""
        seeds = [seed for seed in self.seeds if seed in other.cells]
        if not seeds:
            return None
        differences = []
        for seed in seeds:
            mine, theirs = self.cells[seed], other.cells[seed]
            if report_of(mine).images_sha256 != report_of(theirs).images_sha256:
                raise InputError(f"{mine['name']} and {theirs['name']} were judged on different images")
            a, b = flags_of(mine, attack), flags_of(theirs, attack)
            n = min(len(a), len(b))
            differences.append(a[:n].double() - b[:n].double())
        n = min(len(difference) for difference in differences)  # some may have been judged on more images than others
        return estimate([difference[:n] for difference in differences], low=-1.0, noise=noise)

    def mean(self, *keys: str) -> float:
        """Mean of a number in the results."""
        values = []
        for cell in self.cells.values():
            value: Any = cell["results"]
            for key in keys:
                value = value[key]
            values.append(float(value))
        return statistics.fmean(values)


_REPORTS: dict[int, tuple[Record, RobustReport]] = {}
"""By identity; the cell is held too, so that no other can come to have its identity."""


def report_of(cell: Record) -> RobustReport:
    """The report of a cell, parsed once."""
    if id(cell) not in _REPORTS:
        _REPORTS[id(cell)] = (cell, RobustReport.from_json(cell["results"]["report"]))
    return _REPORTS[id(cell)][1]


def flags_of(cell: Record, attack: str) -> torch.Tensor:
    """Which images a cell gets right under an attack, bool `[N]`."""
    result: AttackResult = report_of(cell).result(attack)
    return result.correct


def attacks_of(cells: Iterable[Record]) -> list[str]:
    """Names of the attacks, as the first cell has them."""
    return [result.name for result in report_of(next(iter(cells))).attacks]


def rows_of(grid: Grid, cells: Mapping[str, Record]) -> list[Row]:
    """Finished cells, gathered over the seeds, in the order of the grid."""
    found: dict[tuple[Any, ...], Row] = {}
    for cell in grid.cells:
        if cell.name in cells:
            key = (cell.account, tuple(cell.labels.items()), cell.arm)
            row = found.setdefault(key, Row(cell.arm, cell.labels, cell.account, {}))
            row.cells[cell.seed] = cells[cell.name]  # type: ignore[index]
    return list(found.values())


def find(grid: Grid, rows: Sequence[Row], arm: str, labels: Mapping[str, str], account: str) -> Row | None:
    """The row of an arm at the same place and under the same account; None where there is none.

    What the others' training is matched to spends just that, and so stands under both accounts.
    """
    accounts = (MACS, EPOCHS) if account == MACS and arm == grid.matched_to else (account,)
    for row in rows:
        if row.arm == arm and row.account in accounts and all(labels.get(k) == v for k, v in row.labels.items()):
            return row
    return None


class Tables:
    """Rows of a grid with what all of them together say about the noise of training.

    Args:
        grid: The grid.
        rows: Its rows.
    """

    def __init__(self, grid: Grid, rows: Sequence[Row]) -> None:
        self.grid, self.rows = grid, rows
        self._noise: dict[tuple[str, str | None], Noise | None] = {}

    def accuracy(self, row: Row, attack: str) -> str:
        """Accuracy in per cent, with its interval."""
        return row.accuracy(attack, self._noise_of(attack, None)).points(signed=False)

    def baseline(self, name: str, row: Row) -> Row | None:
        """What a row is compared with; None where that is not there, or is the row itself."""
        other = find(self.grid, self.rows, name, row.labels, row.account)
        return None if other is row else other

    def difference(self, row: Row, name: str, attack: str) -> Estimate | None:
        """From the baseline of that name; None where there is none."""
        other = self.baseline(name, row)
        return None if other is None else row.against(other, attack, self._noise_of(attack, name))

    def shown(self, row: Row, name: str, attack: str) -> str:
        """The difference in points with its interval, bold where that leaves out zero."""
        found = self.difference(row, name, attack)
        text = "" if found is None else found.points(signed=True)
        return f"**{text}**" if found is not None and found.significant else text

    def _noise_of(self, attack: str, name: str | None) -> Noise | None:
        if (attack, name) not in self._noise:
            found = [row.accuracy(attack) for row in self.rows]
            if name is not None:
                others = [(row, self.baseline(name, row)) for row in self.rows]
                found = [f for row, other in others if other is not None and (f := row.against(other, attack))]
            self._noise[attack, name] = pooled([f.values for f in found])
        return self._noise[attack, name]


def summarise(grid: Grid, out: Path) -> str:
    """Everything about a grid, as Markdown."""
    names = [cell.name for cell in grid.cells]
    cells, failures = read_cells(out, names), read_failures(out, names)
    rows = rows_of(grid, cells)
    parts = [setting(list(cells.values())), PREAMBLE]
    for account in (EPOCHS, MACS):
        for labels in _places(rows, account):
            parts.append(_section(grid, rows, labels, account))
    parts.append(_masks(rows))
    parts.append(_state(grid, cells, failures))
    parts.append(_provenance(list(cells.values())))
    return "\n\n".join(part for part in parts if part)


def headline(grid: Grid, out: Path) -> str:
    """AutoAttack accuracy of every arm at every budget, and what it differs by from the baselines, in one table."""
    cells = read_cells(out, [cell.name for cell in grid.cells])
    if not cells:
        return NOT_RUN
    rows = rows_of(grid, cells)
    tables = Tables(grid, rows)
    attacks = attacks_of(cells.values())
    judged = ROBUST if ROBUST in attacks else attacks[-1]
    what, cost = ("weights", "nonzeros") if counts_zeros(rows) else ("MACs", "macs")
    head = ["arm", what, "training MACs", "clean %", f"{judged} %", *(f"- {name}" for name in grid.baselines)]
    lines = []
    for row in sorted(
        rows, key=lambda r: (r.account != EPOCHS, -r.mean("after", cost) // (r.mean("before", cost) / 800))
    ):
        whole = _whole(grid, rows, row.labels)
        line = [row.arm + (" (matched)" if row.account == MACS else "")]
        line.append(f"{row.mean('after', cost) / row.mean('before', cost):.2f}")
        line.append(f"{row.mean('training', 'macs') / whole.mean('training', 'macs'):.2f}x" if whole else "")
        line += [f"{100 * row.accuracy('clean').mean:.1f}", tables.accuracy(row, judged)]
        line += [tables.shown(row, name, judged) for name in grid.baselines]
        lines.append(line)
    state = f"{len(cells)} of {len(grid.cells)} cells finished."
    return f"{table(head, lines)}\n\n{setting(list(cells.values()))} {state}"


def verdict(grid: Grid, out: Path) -> str:
    """Which arms differ from the baselines, and which do not, as the intervals say: a list in Markdown."""
    cells = read_cells(out, [cell.name for cell in grid.cells])
    if not cells:
        return f"- {grid.about}: not run yet."
    tables = Tables(grid, rows_of(grid, cells))
    attacks = [a for a in (ROBUST, "pgd-20") if a in attacks_of(cells.values())]
    lines = []
    for account in (EPOCHS, MACS):
        for labels in _places(tables.rows, account):
            mine = [r for r in tables.rows if r.account == account and dict(r.labels) == dict(labels)]
            for name in grid.baselines:
                said = [text for attack in attacks if (text := _sorted_out(tables, mine, name, attack))]
                if said:
                    place = ", ".join(text for text in (_place(labels), account) if text)
                    lines.append(f"  - {place}, against `{name}`: {'; '.join(said)}.")
    return "\n".join([f"- {grid.about}:", *lines])


def _sorted_out(tables: Tables, rows: Sequence[Row], name: str, attack: str) -> str:
    """Which of some rows are better than a baseline, which worse; empty where that cannot be said."""
    found = {row.arm: tables.difference(row, name, attack) for row in rows}
    known = {arm: difference for arm, difference in found.items() if difference is not None and difference.seeds > 1}
    if not known:
        return ""
    better = [arm for arm, difference in known.items() if difference.significant and difference.mean > 0]
    worse = [arm for arm, difference in known.items() if difference.significant and difference.mean < 0]
    said = [f"{kind} {', '.join(arms)}" for kind, arms in (("better:", better), ("worse:", worse)) if arms]
    others = len(known) - len(better) - len(worse)
    if not said:
        said = [f"none of {others} arms differs"]
    elif others:
        said.append(f"no difference shown for the other {others}")
    return f"under {'AutoAttack' if attack == ROBUST else attack.upper()} {', '.join(said)}"


def setting(cells: Sequence[Record]) -> str:
    """What all cells share."""
    cell = cells[0]
    s, report = cell["settings"], report_of(cell)
    judges = ROBUST in attacks_of(cells)
    data, model, before = s["data"], s["model"], cell["results"]["before"]
    arguments = ", ".join(f"{key}={value}" for key, value in model["kwargs"].items() if key != "num_classes")
    fewest, most = (f(flags_of(c, ROBUST).numel() for c in cells) for f in (min, max)) if judges else (0, 0)
    count = f"{fewest}" if fewest == most else f"{fewest} (some cells: {most})"
    judged = [f"AutoAttack ({r.suite}) on the first {count}" for r in report.attacks if r.name == ROBUST]
    objective = s["objective"]
    steps = f" with {objective['steps']} steps" if "steps" in objective else ""
    loss = (
        "the arm's objective"
        if len({c["settings"]["objective"]["name"] for c in cells}) > 1
        else objective["name"] + steps
    )
    return (
        f"{model['name'].partition(':')[2] or model['name']} ({arguments or 'as it is'}; {human(before['macs'])} MACs, "
        f"{human(before['params'])} parameters); {data['name']}: {data['train']} training, {data['val']} validation, "
        f"{data['test']} test images (sha256 {data['sha256'][:12]}); {ThreatModel.from_json(s['threat']).label()}; "
        f"{loss}; {s['epochs']:g} epochs of batch {s['training']['batch_size']}, peak learning "
        f"rate {s['training']['lr']:g}, averaged weights for every arm; clean and PGD-20 on {report.n} test images"
        + "".join(f", {text}" for text in judged)
        + "."
    )


def _places(rows: Sequence[Row], account: str) -> list[dict[str, str]]:
    """The points of the axes that have rows of their own."""
    mine = [row for row in rows if row.account == account]
    budgets = any("budget" in row.labels for row in mine)  # then arms without one stand in every section
    found: list[dict[str, str]] = []
    for row in mine:
        if ("budget" in row.labels or not budgets) and dict(row.labels) not in found:
            found.append(dict(row.labels))
    return found


def _place(labels: Mapping[str, str]) -> str:
    """A point of the axes in words."""
    return ", ".join(
        (f"at most {value} of the reference's MACs" if _is_number(value) else f"{value} kept")
        if key == "budget"
        else f"{key} {value}"
        for key, value in labels.items()
    )


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def counts_zeros(rows: Sequence[Row]) -> bool:
    """Whether a grid's budgets are densities: then zeros are what its networks have been given."""
    return any("density" in cell["settings"]["budget"] for row in rows for cell in row.cells.values())


def _section(grid: Grid, rows: Sequence[Row], labels: Mapping[str, str], account: str) -> str:
    mine = [r for r in rows if r.account == account and dict(r.labels) == dict(labels)]
    free = [r for r in rows if r not in mine and r.account == EPOCHS and "budget" not in r.labels]
    free = [r for r in free if all(labels.get(k) == v for k, v in r.labels.items())]
    if account == MACS:
        free = [r for r in free if r.arm == grid.matched_to]
    place = _place(labels) or "all arms"
    note = (
        "Every arm trains for the same number of epochs; what that cost is in the last columns."
        if account == EPOCHS
        else "Epochs are chosen so that every arm spends the multiply-adds that the reference spends on its training."
    )
    shown = _table(grid, [*free, *mine], rows, labels, account)
    return f"### {place[:1].upper() + place[1:]}, {account}\n\n{note}\n\n{shown}"


def mask_of(cell: Record) -> Mapping[str, float] | None:
    """What a cell's mask was good for before it was fine-tuned; None where nothing was cut."""
    found = [entry for entry in cell["results"]["history"] if entry.get("event") == "mask"]
    return found[0] if found else None


def _masks(rows: Sequence[Row]) -> str:
    """What the cut leaves, before any fine-tuning; and how much of the first mask a search changed."""
    lines = []
    for row in rows:
        masks = [mask for cell in row.cells.values() if (mask := mask_of(cell)) is not None]
        if not masks or row.account != EPOCHS:
            continue
        line = [row.arm, _place(row.labels)]
        line += [f"{100 * statistics.fmean(mask[key] for mask in masks):.1f}" for key in ("val_clean", "val_robust")]
        line.append(_spread_of(100 * mask["val_robust"] for mask in masks))
        line.append(_mean_of(row, "changed", "{:.1%}"))
        line.append(_mean_of(row, "flips", "{:.1%}"))
        line.append(_mean_of(row, "gamma", "{:.2g}"))
        lines.append(line)
    if not lines:
        return ""
    head = ("arm", "budget", "clean %", "pgd-10 %", "lowest to highest seed", "changed", "flips", "gamma")
    note = (
        'On the validation images, after batch-norm statistics were re-estimated. "changed" is the share of the first '
        'mask\'s bits that the search changed; "flips" is the share that S2AP\'s ascents flipped, at radius "gamma".'
    )
    return f"### Masks before fine-tuning\n\n{note}\n\n{table(head, lines)}"


def _mean_of(row: Row, key: str, form: str) -> str:
    """Mean over seeds of what the last record with this key says."""
    found = [[e[key] for e in cell["results"]["history"] if key in e][-1:] for cell in row.cells.values()]
    values = [value for last in found for value in last]
    return form.format(statistics.fmean(values)) if values else ""


def _spread_of(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.1f} to {ordered[-1]:.1f}"


def _whole(grid: Grid, rows: Sequence[Row], labels: Mapping[str, str]) -> Row | None:
    """The row whose training cost is the unit: what others are matched to, else the first baseline."""
    name = grid.matched_to or next(iter(grid.baselines), None)
    return None if name is None else find(grid, rows, name, labels, EPOCHS)


def _table(grid: Grid, mine: Sequence[Row], rows: Sequence[Row], labels: Mapping[str, str], account: str) -> str:
    attacks = attacks_of(mine[0].cells.values())
    tables = Tables(grid, rows)
    costs = {"weights": "nonzeros"} if counts_zeros(rows) else {"MACs": "macs", "params": "params"}
    head = ["arm", "seeds", *costs, *(f"{attack} %" for attack in attacks)]
    judged = ROBUST if ROBUST in attacks else attacks[-1]
    compared = [a for a in ("pgd-20", judged) if a in attacks]
    head += [f"{attack} - {name}" for name in grid.baselines for attack in compared]
    head += ["training MACs", "seconds"]
    whole = _whole(grid, rows, labels)
    lines = []
    for row in mine:
        line = [row.arm, str(len(row.cells))]
        line += [f"{row.mean('after', key) / row.mean('before', key):.2f}" for key in costs.values()]
        line += [tables.accuracy(row, attack) for attack in attacks]
        line += [tables.shown(row, name, attack) for name in grid.baselines for attack in compared]
        cost = row.mean("training", "macs")
        line.append(f"{cost / whole.mean('training', 'macs'):.2f}x" if whole else human(cost))
        line.append(f"{row.mean('training', 'seconds'):.0f}")
        lines.append(line)
    return table(head, lines)


def _state(grid: Grid, cells: Mapping[str, Record], failures: Mapping[str, str]) -> str:
    """Cells without a figure, and figures to be read with care."""
    missing = [cell.name for cell in grid.cells if cell.name not in cells and cell.name not in failures]
    lines = [f"{len(cells)} of {len(grid.cells)} cells are finished."]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    lines += [f"Failed: {name}: {error}." for name, error in failures.items() if name not in cells]
    lines += [f"Over its budget: {name}." for name, cell in cells.items() if not cell["results"]["meets_budget"]]
    warnings: dict[str, list[str]] = {}
    for name, cell in cells.items():
        for warning in report_of(cell).warnings:
            warnings.setdefault(warning, []).append(name)
    lines += [f"Warned of in {len(found)} cells ({found[0]}, ...): {text}" for text, found in warnings.items()]
    return "\n".join(lines)


def _provenance(cells: Sequence[Record]) -> str:
    commits = sorted({(cell["code"]["commit"] or "unknown")[:10] for cell in cells})
    first = provenance(cells[0])
    return first if len(commits) == 1 else f"{first} (first cell; all: {', '.join(commits)})"


def cell_table(grid: Grid, out: Path) -> str:
    """One line a cell, for the page beside the results."""
    cells = read_cells(out, [cell.name for cell in grid.cells])
    if not cells:
        return ""
    attacks = attacks_of(cells.values())
    head = ["cell", "MMACs", "k params", "epochs", *(f"{attack} %" for attack in attacks), "images/s", "seconds"]
    lines = []
    for name, cell in cells.items():
        results, report = cell["results"], report_of(cell)
        line = [name, f"{results['after']['macs'] / 1e6:.2f}", f"{results['after']['params'] / 1e3:.1f}"]
        line.append(f"{cell['settings']['epochs']:g}")
        for attack in attacks:
            found = report.result(attack)
            line.append(f"{100 * found.accuracy:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]")
        line += [f"{results['training'][key]:.0f}" for key in ("images_per_s", "seconds")]
        lines.append(line)
    return "Every cell, with the 95 % interval over its test images (Wilson):\n\n" + table(head, lines)
