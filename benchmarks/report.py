"""Write the tables of benchmarks/README.md anew from the JSON files under benchmarks/results/. Makes no figure.

`--check` changes nothing and fails where a table differs from its JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cifar10_summary, latency, structure, training_step
from benchmarks.common import RESULTS, ROOT, read_json, write_text

README = ROOT / "benchmarks" / "README.md"
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    structure.MODULE: structure.markdown,
    training_step.MODULE: training_step.markdown,
    latency.MODULE: latency.markdown,
}
CELLS = "cifar10_cpu"
QUICKSTART = "quickstart"
FRONT_PAGE = ROOT / "README.md"
NOT_RUN = "*Not run yet.*"


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
    return 0


def pages(results: Path) -> dict[Path, str]:
    """What every page that holds tables should say, given the results in a directory."""
    text = README.read_text()
    cells = cifar10_summary.read_cells(results / CELLS)
    found = {CELLS: cifar10_summary.summarise(cells) if cells else NOT_RUN}
    for module, markdown in TABLES.items():
        path = results / f"{module}.json"
        found[module] = markdown(read_json(path)) if path.exists() else NOT_RUN
    for module, content in found.items():
        text = fill(text, module, content)
    path = results / f"{QUICKSTART}.json"
    table = quickstart_table(read_json(path)) if path.exists() else NOT_RUN
    wanted = {README: text, FRONT_PAGE: fill(FRONT_PAGE.read_text(), QUICKSTART, table)}
    if cells:
        wanted[results / CELLS / "README.md"] = cifar10_summary.readme(cells)
    return wanted


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
        raise ValueError(f"README.md has {count} pairs of markers <!-- {name} --> ... <!-- /{name} -->; needs one")
    return filled


if __name__ == "__main__":
    sys.exit(main())
