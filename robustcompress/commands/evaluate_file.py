"""`robustcompress evaluate FILE.onnx`: the deployed file itself is attacked."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from robustcompress.artefact import ArtefactReport, OnnxFile, open_onnx, plot_curve, verify_artefact
from robustcompress.artefact.formats import apbench, check_apbench, check_robustbench, robustbench
from robustcompress.artefact.prepare import Twin
from robustcompress.artefact.twin import agreement
from robustcompress.artefact.verify import ATTACK_IMAGES
from robustcompress.commands.arguments import check_output, count_or_all, data_from
from robustcompress.commands.keeping import if_unwritable
from robustcompress.data import DataSplits
from robustcompress.durable import write_json
from robustcompress.errors import InputError, Problems, RobustCompressError
from robustcompress.plots import check_picture
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.robust import ThreatModel
from robustcompress.terminal import Output, evaluation_bar, say, table

AUTOATTACK_IMAGES = 100
SUFFIX = ".verify.json"
FORMATS = ("table", "robustbench", "apbench")

_PROBED = 64
_TWIN = 0.5  # share of images on which a result that merely lies beside a file must agree with it to be its twin
_OURS: dict[str, Any] = {"twin": None, "transfer_from": [], "curve": False, "corruptions": False, "plot": None}
_OURS |= {"format": "table", "output": None, "attack_images": ATTACK_IMAGES, "ort_threads": None}
_THEIRS: dict[str, Any] = {
    "compare": None,
    "time_limit": None,
    "hierarchy": None,
    "autoattack_images": AUTOATTACK_IMAGES,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is for files alone."""
    group = parser.add_argument_group("ONNX files")
    group.add_argument(
        "--twin", type=Path, metavar="DIR", help="the result that the file came from (default: the one it lies in)"
    )
    group.add_argument(
        "--transfer-from",
        type=Path,
        action="append",
        default=[],
        metavar="DIR|FILE.onnx",
        help="try another model's adversarial images too; may be given several times",
    )
    group.add_argument(
        "--attack-images",
        type=count_or_all,
        default=ATTACK_IMAGES,
        metavar="N",
        help="judge N images with Square and AutoAttack, or all (default: %(default)s)",
    )
    group.add_argument("--curve", action="store_true", help="also measure the accuracy over the radius")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw that curve, such as curve.png")
    group.add_argument("--corruptions", action="store_true", help="also measure it under common corruptions")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="robustbench, apbench: JSON with the keys of that leaderboard (default: %(default)s)",
    )
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON there")
    group.add_argument("--ort-threads", type=int, metavar="N", help="threads of onnxruntime (default: its own choice)")


def is_file(path: Path) -> bool:
    """Whether the command is about a file: one that ends in .onnx, whether it exists or not."""
    return path.suffix.lower() == ".onnx" and not path.is_dir()


def refuse(arguments: argparse.Namespace) -> None:
    """Raise one InputError where arguments for files were given about a directory."""
    _refuse(arguments, _OURS, "is for ONNX files; export the result first, and evaluate that file")


def if_stopped(arguments: argparse.Namespace) -> str:
    """What is lost when the command is stopped."""
    return if_unwritable(arguments.directory.parent)


def run(arguments: argparse.Namespace) -> Output:
    """Check everything, attack the file, say what withstood."""
    _refuse(arguments, _THEIRS, "is for saved results, not for files")
    file = open_onnx(arguments.directory, threads=arguments.ort_threads)
    problems = Problems("evaluate cannot start")
    threat = problems.attempt(lambda: _threat(arguments, file))
    data = problems.attempt(lambda: _data(arguments, file))
    sources = {}
    for path in arguments.transfer_from:
        alike = [other for other in arguments.transfer_from if other.name == path.name]
        name = path.name if len(alike) == 1 else "/".join(path.parts[-2:])
        sources[name] = problems.attempt(lambda path=path: _source(path, arguments))  # type: ignore[misc]
    twin = problems.attempt(lambda: _twin(arguments, file, data))
    target = _target(arguments, problems)
    if arguments.device not in ("auto", "cpu"):
        problems.add(f"--device {arguments.device}: files and their twins run on the CPU here; leave it out")
    if arguments.plot is not None:
        problems.attempt(lambda: check_picture(arguments.plot))
    if data is not None and arguments.format != "table":
        _check_format(arguments, data, twin, problems)
    problems.raise_if_any()
    with evaluation_bar(arguments.directory.name) as progress:
        report = verify_artefact(
            arguments.directory,
            data,
            threat,
            twin=twin,
            attacks=arguments.attacks,
            transfer_from={name: source for name, source in sources.items() if source is not None},
            curve=arguments.curve or arguments.plot is not None,
            corruptions=arguments.corruptions,
            max_images=arguments.images,
            attack_images=arguments.attack_images,
            seed=arguments.seed,
            threads=arguments.ort_threads,
            keep=_cache(arguments.directory),
            progress=progress,
        )
    document = _formatted(report, twin, arguments.format)
    parts: list[Any] = [json.dumps(document, indent=1)] if arguments.format != "table" else _parts(report)
    if arguments.plot is not None:
        parts += ["", f"drawn: {plot_curve(report, arguments.plot)}"]
    if target is not None:
        write_json(target, document)
        parts += ["", f"saved in {target}"]
    return Output(document=document, parts=tuple(parts))


def _parts(report: ArtefactReport) -> list[Any]:
    columns = ("attack", "accuracy %", "95 % interval", "n", "seconds")
    parts: list[Any] = [f"{report.path}: {report.headline()}", ""]
    parts.append(table("attacks, judged by the file", columns, report.robust.rows(), left=("attack",)))
    if report.curve:
        head: tuple[str, ...] = ("eps", "accuracy %", "95 % interval", "n")
        rows = [
            (f"{p.eps:.4g}", f"{100 * r.accuracy:.2f}", f"{100 * r.low:.1f} to {100 * r.high:.1f}", str(r.n))
            for p, r in ((point, point.result) for point in report.curve)
        ]
        parts.append(table("accuracy over the radius", head, rows))
    if report.corruptions:
        mean = report.corruption_accuracy or 0.0
        title = f"accuracy % under corruptions, n={report.corruption_images}; mean {100 * mean:.1f} %"
        head = ("corruption", "1", "2", "3", "4", "5", "mean")
        parts.append(table(title, head, report.corruption_rows(), left=("corruption",)))
    return [*parts, "\n".join([*report.parity_lines(), *report.remarks()])]


def _formatted(report: ArtefactReport, twin: Twin | None, form: str) -> dict[str, Any]:
    result = twin if isinstance(twin, CompressResult) else None
    if form == "apbench":
        return apbench(report, result)
    if form == "robustbench":
        known = result is not None and result.spec is not None
        return robustbench(report, architecture=result.spec.name if known and result and result.spec else None)
    return report.to_json()


def _check_format(
    arguments: argparse.Namespace, data: DataSplits, twin: CompressResult | None, problems: Problems
) -> None:
    """Collect what a leaderboard asks for and this report will not have: before hours of attacks."""
    name = Path(data.name).name
    if arguments.format == "robustbench":
        check_robustbench(name, problems)
        return
    check_apbench(name, twin, problems)
    if "autoattack" not in (arguments.attacks or ()) or arguments.attack_images is not None:
        problems.add(
            "--format apbench asks for the standard AutoAttack on all images: name it among --attacks, and pass "
            "--attack-images all"
        )


def _threat(arguments: argparse.Namespace, file: OnnxFile) -> ThreatModel:
    said = file.threat
    if arguments.eps is None and said is None:
        raise InputError(f"{file.path} does not say what it should withstand: pass --eps, such as --eps 8/255")
    if arguments.eps is None and arguments.norm is not None and said is not None and arguments.norm != said.norm:
        raise InputError(f"--norm {arguments.norm}: an eps of {said.norm} means nothing there; give --eps as well")
    norm = arguments.norm or (said.norm if said is not None else "linf")
    return ThreatModel(norm, arguments.eps if arguments.eps is not None or said is None else said.eps)


def _data(arguments: argparse.Namespace, file: OnnxFile) -> DataSplits:
    try:
        said = json.loads(file.metadata.get("data", "{}"))
        trained_on = said.get("name") if isinstance(said, dict) else None
        seed = int(file.metadata.get("seed", 0))
    except (ValueError, RecursionError):
        trained_on, seed = None, 0
    name = arguments.data or ("digits" if trained_on == "digits" else None)
    if name is None:
        about = f"was trained on {trained_on!r}" if trained_on else "does not say what it was trained on"
        raise InputError(f"{file.path} {about}: pass --data (and --root), a data set's name or a directory of images")
    return data_from(arguments, name=name, seed=seed)  # the same limits then choose the same images


def _source(path: Path, arguments: argparse.Namespace) -> Twin | OnnxFile:
    if is_file(path):
        return open_onnx(path, threads=arguments.ort_threads)
    return load(path, model=arguments.model)


def _twin(arguments: argparse.Namespace, file: OnnxFile, data: DataSplits | None) -> CompressResult | None:
    if arguments.twin is not None:
        return load(arguments.twin, model=arguments.model)
    directory = file.path.parent
    if not (directory / RESULT).is_file() or data is None or data.image_shape != file.image_shape:
        return None
    try:
        result = load(directory, model=arguments.model)
        agreed = agreement(file, result.model, data.test.first(_PROBED).as_float())
    except (RobustCompressError, RuntimeError) as error:
        say(f"the result in {directory} is not used as the file's twin: {error}")
        return None
    if agreed < _TWIN:
        say(
            f"the result in {directory} is not used as the file's twin: they agree on {100 * agreed:.0f} % of the "
            f"images; pass --twin {directory} if it is"
        )
        return None
    return result


def _target(arguments: argparse.Namespace, problems: Problems) -> Path | None:
    path: Path | None = arguments.output
    if path is None and arguments.save:
        path = arguments.directory.with_suffix(SUFFIX)
    if path is not None:
        problems.attempt(lambda: check_output(path))
    return path


def _cache(path: Path) -> Path | None:
    """Where finished chunks are kept; nowhere for a file in a directory that may be read and not written."""
    if not os.access(path.parent, os.W_OK):
        say(f"finished chunks are not kept: {path.parent} may not be written to")
        return None
    return path.with_name(f".{path.name}.verify")


def _refuse(arguments: argparse.Namespace, defaults: dict[str, Any], why: str) -> None:
    given = [name for name, default in defaults.items() if getattr(arguments, name) != default]
    options = ["-o" if name == "output" else f"--{name.replace('_', '-')}" for name in given]
    if options:
        raise InputError(f"evaluate cannot start: {', '.join(options)} {why}")
