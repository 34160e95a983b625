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
    wanted = {README: text}
    if cells:
        wanted[results / CELLS / "README.md"] = cifar10_summary.readme(cells)
    return wanted


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
