"""Write the tables and plots anew from the JSON files under benchmarks/results/. Makes no figure of its own.

Tables go between the markers of benchmarks/README.md, README.md, docs/models.md and docs/certify.md, and to the
README.md beside the cells of each grid; plots beside the cells. `--check` changes nothing and fails where a table
differs from its JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    any_model,
    certified,
    certified_deep,
    compare_plots,
    compare_report,
    deployment,
    distributed_step,
    endurance,
    evaluation_speed,
    factorised,
    kept_memory,
    latency,
    latency_budget,
    overfitting,
    regularisers,
    search_meta,
    search_step,
    search_surrogate,
    search_tuning,
    streaming,
    strong_attack,
    structure,
    trace_memory,
    training_memory,
    training_scaling,
    training_step,
)
from benchmarks.common import RESULTS, ROOT, read_json, write_text
from benchmarks.grid import Grid, read_grid

README = ROOT / "benchmarks" / "README.md"
CERTIFIED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    certified.MODULE: certified.markdown,
    certified_deep.MODULE: certified_deep.markdown,
}
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    structure.MODULE: structure.markdown,
    trace_memory.MODULE: trace_memory.markdown,
    training_step.MODULE: training_step.markdown,
    training_step.FULL: training_step.markdown,
    training_scaling.MODULE: training_scaling.markdown,
    training_memory.MODULE: training_memory.markdown,
    kept_memory.MODULE: kept_memory.markdown,
    distributed_step.MODULE: distributed_step.markdown,
    streaming.MODULE: streaming.markdown,
    strong_attack.MODULE: strong_attack.markdown,
    evaluation_speed.MODULE: evaluation_speed.markdown,
    search_step.MODULE: search_step.markdown,
    search_surrogate.MODULE: search_surrogate.markdown,
    search_tuning.MODULE: search_tuning.markdown,
    search_meta.MODULE: search_meta.markdown,
    latency.MODULE: latency.markdown,
    deployment.MODULE: deployment.markdown,
    latency_budget.MODULE: latency_budget.markdown,
    overfitting.MODULE: overfitting.markdown,
    regularisers.MODULE: regularisers.markdown,
    regularisers.PHOTOS: regularisers.markdown,
    factorised.MODULE: factorised.markdown,
    factorised.AGAIN: factorised.markdown_again,
    endurance.MODULE: endurance.markdown,
}
SPEED = (training_scaling, training_memory, distributed_step, streaming, strong_attack, evaluation_speed)
GRIDS = ROOT / "benchmarks" / "grids"
PLOT = "comparison.png"
QUICKSTART = "quickstart"
FRONT_PAGE = ROOT / "README.md"
MODELS = ROOT / "docs" / "models.md"
CERTIFICATES = ROOT / "docs" / "certify.md"
NOT_RUN = compare_report.NOT_RUN


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are those of the JSON files")
    options = parser.parse_args(argv)
    stale = [path for path, text in pages(RESULTS).items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if options.check else 'written'}")
    if options.check:
        return 1 if stale else 0
    for path, text in pages(RESULTS).items():
        write_text(path, text)
    traced = RESULTS / f"{structure.MODULE}.json"
    if traced.exists():
        print(f"{structure.plot(read_json(traced), traced.with_suffix('.png')).relative_to(ROOT)}: drawn")
    for script in (search_surrogate, search_meta, *SPEED):
        searched = RESULTS / f"{script.MODULE}.json"
        if searched.exists():
            print(f"{script.plot(read_json(searched), searched.with_suffix('.png')).relative_to(ROOT)}: drawn")
    for grid in grids():
        plot = compare_plots.plot_grid(grid, RESULTS / grid.name, RESULTS / grid.name / PLOT)
        if plot is not None:
            print(f"{plot.relative_to(ROOT)}: drawn")
    return 0


def grids() -> list[Grid]:
    """All declared grids."""
    return [read_grid(path) for path in sorted(GRIDS.glob("*.yaml"))]


def pages(results: Path) -> dict[Path, str]:
    """What every page that holds tables should say, given the results in a directory."""
    text = README.read_text()
    found, wanted, verdicts = {}, {}, []
    for grid in grids():
        if (results / grid.name).is_dir():
            verdicts.append(compare_report.verdict(grid, results / grid.name))
        out = results / grid.name
        found[grid.name] = compare_report.headline(grid, out)
        if found[grid.name] != NOT_RUN:
            wanted[out / "README.md"] = grid_page(grid, out)
    for module, markdown in TABLES.items():
        path = results / f"{module}.json"
        found[module] = markdown(read_json(path)) if path.exists() else NOT_RUN
    for module, content in found.items():
        text = fill(text, module, content)
    if verdicts:
        text = fill(text, "verdict", "\n".join(verdicts))
    path = results / f"{QUICKSTART}.json"
    table = quickstart_table(read_json(path)) if path.exists() else NOT_RUN
    path = results / f"{any_model.MODULE}.json"
    swept = any_model.markdown(read_json(path)) if path.exists() else NOT_RUN
    proven = CERTIFICATES.read_text()
    for module, markdown in CERTIFIED.items():
        path = results / f"{module}.json"
        proven = fill(proven, module, markdown(read_json(path)) if path.exists() else NOT_RUN)
    return {
        README: text,
        FRONT_PAGE: fill(FRONT_PAGE.read_text(), QUICKSTART, table),
        MODELS: fill(MODELS.read_text(), any_model.MODULE, swept),
        CERTIFICATES: proven,
        **wanted,
    }


def grid_page(grid: Grid, out: Path) -> str:
    """The page beside the cells of a grid."""
    declared = f"`benchmarks/grids/{grid.name}.yaml`"
    note = f"Written by `python -m benchmarks.report` from the JSON files here, which {declared} declares."
    parts = [f"# {grid.about}", note, f"![Robust accuracy against cost]({PLOT})", compare_report.summarise(grid, out)]
    return "\n\n".join([*parts, compare_report.cell_table(grid, out)]) + "\n"


def quickstart_table(document: Mapping[str, Any]) -> str:
    """What `robustcompress quickstart` printed, from the JSON it left."""
    networks = document["networks"]
    n = networks["none"]["accuracies"]["autoattack"]["n"]
    lines = [
        f"| | MACs | parameters | clean % | PGD-20 % | AutoAttack % (95 %, n={n}) | onnxruntime ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, network in networks.items():
        found = {key: 100 * value["accuracy"] for key, value in network["accuracies"].items()}
        robust, after = network["accuracies"]["autoattack"], network["after"]
        lines.append(
            f"| {name} | {after['macs'] / 1e6:.2f} M | {after['params'] / 1e3:.1f} k | {found['clean']:.1f} | "
            f"{found['pgd-20']:.1f} | {found['autoattack']:.1f} ({100 * robust['low']:.0f} to "
            f"{100 * robust['high']:.0f}) | {network['onnxruntime']['ms_per_image']:.2f} |"
        )
    hardware, test = document["hardware"], document["data"]["test"]
    lines += [
        "",
        f"{test} test images of scikit-learn's digits, linf {document['threat']['eps']:g}, seed {document['seed']}, "
        f"{document['seconds']:.0f} s in all on {hardware['cores']} cores ({hardware['cpu']}). Small data and one "
        "seed: a difference within the intervals means nothing.",
    ]
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """Put `content` between the two markers of `name`.

    Raises:
        ValueError: The markers are not there exactly once.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda m: m[1] + content + m[2], text)
    if count != 1:
        raise ValueError(f"the page has {count} pairs of markers <!-- {name} --> ... <!-- /{name} -->; needs one")
    return filled


if __name__ == "__main__":
    sys.exit(main())
