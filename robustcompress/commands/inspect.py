"""`robustcompress inspect`: the channel groups of a model and what each costs; searches, compared; an ONNX file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustcompress.budget import human
from robustcompress.commands.arguments import assignment
from robustcompress.commands.onnx_table import inspect_onnx
from robustcompress.errors import Problems
from robustcompress.models import build_model, check_image_size
from robustcompress.plots import check_picture
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.search_plot import candidate_records, plot_search, search_records
from robustcompress.stability import stability
from robustcompress.structure import Bypass, Factorise, Insert
from robustcompress.terminal import Output, table
from robustcompress.width_plot import draw_widths
from robustcompress.widths import GroupWidth, Widths, widths_of

NAME = "inspect"
SUMMARY = "show the channel groups of a model, what an ONNX file is, or what searches kept"
DESCRIPTION = """\
Show which channels of a model can only change together, how wide each group is, what one channel of it costs, and
whether it can be edited, which is to say pruned and grown. --plot draws the widths, and where the multiply-adds go.

MODEL is what `robustcompress compress` takes, or the directory of a saved result, whose widths are shown beside those
of its reference.

For several results: how far their masks are apart, as normalised Hamming distances. Between results that were not cut
out of one pretrained network, expect the distance of chance. --plot then draws the searches of those that learnt
scores; more is recorded for it where the strategy was given the option diagnose=True.

For an ONNX file, of this package or any other: what goes in and out, its operators, size and precision, and what it
says of itself: classes, threat, accuracies with their intervals, strategy, costs."""
EXAMPLES = """\
examples:
  robustcompress inspect resnet20
  robustcompress inspect torchvision:resnet50 --plot resnet50.png
  robustcompress inspect timm:resnet26 --image-size 64
  robustcompress inspect resnet8 --model-arg width=0.5 --json
  robustcompress inspect runs/digits --plot widths.svg
  robustcompress inspect digits.int8.onnx
  robustcompress inspect runs/hydra runs/s2ap --plot search.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL|DIR|FILE", help="a model's name, directories of saved results, or a file"
    )
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels a side (default: those of the saved result, or what the model was made for)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the widths of one model, or the searches of several results: .png, .pdf, .svg",
    )


def run(arguments: argparse.Namespace) -> Output:
    """Trace the model and list its groups; or compare results."""
    if any(name.lower().endswith(".onnx") for name in arguments.models):
        return inspect_onnx(_onnx_file(arguments))
    results = _results(arguments)
    if arguments.plot is not None:
        check_picture(arguments.plot)
    if len(arguments.models) == 1:
        return _one(arguments, arguments.models[0], next(iter(results.values()), None))
    output = _compared(results)
    if arguments.plot is None:
        return output
    names = _short(results)
    path = plot_search({names[name]: result for name, result in results.items()}, arguments.plot)
    return _with_plot(output, path, f"the searches are drawn in {path}")


def _onnx_file(arguments: argparse.Namespace) -> Path:
    problems = Problems("inspect cannot start")
    if len(arguments.models) > 1:
        problems.add("several names: an ONNX file is inspected on its own")
    if arguments.model_arg or arguments.image_size is not None or arguments.plot is not None:
        problems.add("--model-arg, --image-size and --plot are for models: leave them out for an ONNX file")
    problems.raise_if_any()
    return Path(arguments.models[0])


def _with_plot(output: Output, path: Path, said: str) -> Output:
    return Output(document={**output.document, "plot": str(path)}, parts=(*output.parts, said))


def _results(arguments: argparse.Namespace) -> dict[str, CompressResult]:
    """By directory, the results that are named; all that are named must be some where several are."""
    several = len(arguments.models) > 1
    problems = Problems("inspect cannot start")
    if several and (arguments.model_arg or arguments.image_size is not None):
        problems.add("--model-arg and --image-size say what one model looks like: leave them out for several results")
    elif arguments.model_arg and (Path(arguments.models[0]) / RESULT).is_file():
        problems.add("--model-arg is for a model: a result knows its own")
    if arguments.image_size is not None and arguments.image_size < 1:
        problems.add(f"--image-size {arguments.image_size}: must be positive")
    for name in arguments.models:
        if several and not (Path(name) / RESULT).is_file():
            problems.add(f"{name} holds no {RESULT}: name the directories of saved results")
        if sum(Path(other).resolve() == Path(name).resolve() for other in arguments.models) > 1:
            problems.add(f"{name} is named twice: name each result once")
    problems.raise_if_any()
    return {name: load(name) for name in arguments.models if (Path(name) / RESULT).is_file()}


def _compared(results: Mapping[str, CompressResult]) -> Output:
    found = stability(results)
    names = _short(results)
    rows = [
        (
            names[name],
            *("-" if name == other else f"{value:.4f}" for other, value in zip(found.names, row, strict=True)),
        )
        for name, row in zip(found.names, found.matrix, strict=True)
    ]
    title = "Normalised Hamming distances between masks"
    summary = f"mean {found.mean:.4f}; masks of these sizes drawn at random would be {found.chance:.4f} apart"
    parts = [table(title, ("result", *names.values()), rows, left=("result",)), summary]
    searches = {name: records for name, result in results.items() if (records := search_records(result))}
    if searches:
        parts.append(_searches({names[name]: records for name, records in searches.items()}))
    return Output(document={"hamming": found.to_json(), "searches": searches}, parts=tuple(parts))


def _short(results: Mapping[str, CompressResult]) -> dict[str, str]:
    """The last part of each directory where that tells them apart."""
    short = {name: Path(name).resolve().name for name in results}
    return short if len(set(short.values())) == len(short) else {name: name for name in results}


BEST = 5
"""Candidates that are shown."""

MEASURES = {
    "hamming": ("bits changed", ".4f"),
    "top_eigenvalue": ("top eigenvalue", ".4g"),
    "sharpness": ("sharpness", ".4f"),
    "mask_clean": ("mask clean", ".3f"),
    "mask_robust": ("mask PGD-10", ".3f"),
}
"""What is shown of the last epoch of a search, and how."""


def _searches(searches: Mapping[str, list[Mapping[str, Any]]]) -> Any:
    """The last epoch of each search: a table of what was recorded of any."""
    last = {name: records[-1] for name, records in searches.items()}
    shown = {key: look for key, look in MEASURES.items() if any(key in record for record in last.values())}
    rows = [
        (name, *(format(record[key], digits) if key in record else "-" for key, (_, digits) in shown.items()))
        for name, record in last.items()
    ]
    return table("Last epoch of the search", ("result", *(head for head, _ in shown.values())), rows, left=("result",))


def _candidates(name: str, records: list[Mapping[str, Any]]) -> Any:
    """The best networks of a search over architectures."""
    chosen, rows = any("inserted" in record for record in records), []
    for number, record in sorted(enumerate(records, 1), key=lambda numbered: -numbered[1]["reward"])[:BEST]:
        gone = ", ".join(record["bypassed"]) or "-"
        accuracies = (f"{100 * record[key]:.1f}" for key in ("val_clean", "val_robust"))
        typed = [_types(record["inserted"])] if "inserted" in record else ["plain"] if chosen else []
        rows.append((str(number), *accuracies, f"{record['reward']:.3f}", human(record["macs"]), gone, *typed))
    title = f"The best {len(rows)} of {len(records)} networks that {name} looked at, on validation images"
    left = ("blocks that left", *(["block types"] if chosen else []))
    return table(title, ("number", "clean %", "PGD-10 %", "reward", "MACs", *left), rows, left=left)


def _types(inserted: Iterable[Sequence[str]]) -> str:
    """Which blocks have which part, by kind: "se: layers.0.0, layers.0.1"."""
    blocks: dict[str, list[str]] = {}
    for block, kind in inserted:
        blocks.setdefault(kind, []).append(block)
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in sorted(blocks.items()))


def _one(arguments: argparse.Namespace, name: str, result: CompressResult | None) -> Output:
    model = result.model if result is not None else build_model(name, **dict(arguments.model_arg))[0]
    size = arguments.image_size
    if size is not None:
        check_image_size(model, size, size)
    example = torch.zeros(2, 3, size, size) if size is not None else None
    widths = widths_of(model if result is None else result, example, depth=True)
    output = _groups(widths, name)
    if result is not None and (gone := [edit.module for edit in result.edits if isinstance(edit, Bypass)]):
        parts = (*output.parts, f"blocks that have left: {', '.join(gone)}")
        output = Output(document={**output.document, "bypassed": gone}, parts=parts)
    if result is not None and (put := [[e.module, e.kind] for e in result.edits if isinstance(e, Insert)]):
        parts = (*output.parts, f"parts that were inserted: {_types(put)}")
        output = Output(document={**output.document, "inserted": put}, parts=parts)
    if result is not None and (apart := [e.to_json() for e in result.edits if isinstance(e, Factorise)]):
        said = ", ".join(f"{e['factorise']} ({e['kind']} {'x'.join(map(str, e['ranks']))})" for e in apart)
        parts = (*output.parts, f"layers that were factorised: {said}")
        output = Output(document={**output.document, "factorised": apart}, parts=parts)
    if result is not None and (records := search_records(result)):
        document = {**output.document, "search": records}
        output = Output(document=document, parts=(*output.parts, _searches({name: records})))
    if result is not None and (records := candidate_records(result)):
        document = {**output.document, "candidates": records}
        output = Output(document=document, parts=(*output.parts, _candidates(name, records)))
    if arguments.plot is None:
        return output
    title = name
    if result is not None:
        called, strategy = Path(name).resolve().name, str(result.strategy["name"])
        title = called if strategy in called else f"{called} ({strategy})"
    path = draw_widths(widths, arguments.plot, title=title)
    return _with_plot(output, path, f"the widths are drawn in {path}")


def _groups(widths: Widths, name: str) -> Output:
    """The table of groups; with a column for the reference where it is a result's."""
    columns: dict[str, Callable[[GroupWidth], str]] = {
        "group": lambda group: group.name,
        "kind": lambda group: group.kind,
        "before": lambda group: "-" if group.before is None else str(group.before),
        "width": lambda group: str(group.width),
        "% of MACs": lambda group: f"{100 * group.share:.1f}",
        "MACs/channel": lambda group: human(group.macs_per_channel),
        "params/channel": lambda group: human(group.params_per_channel),
        "editable": lambda group: "yes" if group.editable else f"no: {group.reason}",
    }
    if widths.before is None:
        del columns["before"]
    rows = [[cell(group) for cell in columns.values()] for group in widths.groups]
    _, height, width = widths.image_shape
    shown = table(f"{name}, images 3x{height}x{width}", tuple(columns), rows, left=("group", "kind", "editable"))
    cost, before = widths.cost, widths.before
    editable = sum(group.editable for group in widths.groups)
    totals = (
        f"{human(cost.macs)} MACs, {human(cost.params)} parameters, {human(cost.size)}B; "
        f"{editable} of {len(widths.groups)} groups can be edited"
    )
    if before is not None:
        totals += f"; the reference has {human(before.macs)} MACs, {human(before.params)} parameters"
    document = {
        "model": name,
        "image_shape": list(widths.image_shape),
        "cost": cost.to_json(),
        "before": before.to_json() if before is not None else None,
        "groups": [group.to_json() for group in widths.groups],
        "bypassable": list(widths.bypassable),
        "insertable": list(widths.insertable),
    }
    blocks = (
        f"blocks that can be bypassed: {', '.join(widths.bypassable) or 'none'}\n"
        f"blocks that can have parts inserted: {', '.join(widths.insertable) or 'none'}"
    )
    return Output(document=document, parts=(shown, totals, blocks, *filter(None, [cost.note])))
