"""`robustcompress evaluate`: how robust a saved model or a deployed file is, and whether another model differs."""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustcompress.commands import evaluate_file
from robustcompress.commands.arguments import (
    add_data_arguments,
    add_result_argument,
    count_or_all,
    data_of,
    fraction,
    names,
    result_from,
)
from robustcompress.commands.keeping import if_unwritable, kept_in
from robustcompress.data import DataSplits
from robustcompress.distributed import start
from robustcompress.durable import write_json
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.lock import held
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.robust import (
    Hierarchy,
    PairedTest,
    RobustReport,
    ThreatModel,
    attack_by_name,
    compare,
    evaluate,
    hierarchy_from,
)
from robustcompress.terminal import Output, evaluation_bar

NAME = "evaluate"
SUMMARY = "attack a saved model or an ONNX file, or compare two models"
DESCRIPTION = """\
Measure the accuracy of a saved model without and with an adversary, on the test images.

AutoAttack is costly: it judges --autoattack-images of them, in chunks that are kept in DIR/.autoattack, so that a
stopped evaluation goes on where it was when the same command is given again.

Of an ONNX file the artefact itself is judged, in onnxruntime: Square attacks its scores, and adversarial images of its
torch twin (--twin, or the result whose directory it lies in) are replayed on it."""
EXAMPLES = """\
examples:
  robustcompress evaluate runs/digits
  robustcompress evaluate runs/digits --attacks clean,pgd-20 --images 100
  robustcompress evaluate runs/hydra --data cifar10 --root data --autoattack-images all --save
  robustcompress evaluate runs/digits --attacks clean,pgd-20 --hierarchy digits
  robustcompress evaluate runs/grape --compare runs/none --time-limit 300 --json
  robustcompress evaluate runs/digits/model.onnx --curve --plot curve.png
  robustcompress evaluate model.int8.onnx --twin runs/hydra --data cifar10 --attacks pgd-20,square-5000 --save
  robustcompress evaluate foreign.onnx --data photos --image-size 224 --eps 4/255"""

ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")
AUTOATTACK_IMAGES = evaluate_file.AUTOATTACK_IMAGES
CACHE = ".autoattack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser, or_file=True)
    parser.add_argument(
        "--attacks",
        type=names,
        metavar="A,B",
        help="`robustcompress list attacks`, and for files square-N: Square with N queries (default: "
        "clean,fgsm,pgd-20,autoattack; for files pgd-20,square-1000)",
    )
    parser.add_argument(
        "--images", type=count_or_all, default=None, metavar="N", help="judge N test images, or all (default: all)"
    )
    parser.add_argument(
        "--autoattack-images",
        type=count_or_all,
        default=AUTOATTACK_IMAGES,
        metavar="N",
        help="of DIR: judge N of those with AutoAttack, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="of DIR: start no chunk of AutoAttack that would not end in S seconds (an image then takes longer, as "
        "chunks are small and do not join)",
    )
    parser.add_argument("--eps", type=fraction, help="another radius than the model was trained for, such as 4/255")
    parser.add_argument("--norm", help="another norm: linf or l2")
    parser.add_argument(
        "--hierarchy",
        metavar="NAME|FILE.json",
        help="of DIR: say how far from the truth mistakes are in this tree of classes: cifar10, digits, or a file",
    )
    parser.add_argument("--compare", type=Path, metavar="DIR", help="evaluate this result too, and test the difference")
    parser.add_argument(
        "--save", action="store_true", help="replace the report in DIR by this one; of a file, write FILE.verify.json"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the attacks (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add_data_arguments(parser, default="the embedded digits, for what was trained on them")
    evaluate_file.add_arguments(parser)


def if_stopped(arguments: argparse.Namespace) -> str:
    """What is lost when the command is stopped."""
    if evaluate_file.is_file(arguments.directory):
        return evaluate_file.if_stopped(arguments)
    if "autoattack" not in (arguments.attacks or ATTACKS):
        return "nothing is kept of it: these attacks are made anew"
    return if_unwritable(arguments.directory)


def run(arguments: argparse.Namespace) -> Output:
    """Evaluate one result, or two on the same images; or a file."""
    if evaluate_file.is_file(arguments.directory):
        if start().size > 1:
            raise InputError("a file is judged by one process: leave torchrun out")
        return evaluate_file.run(arguments)
    evaluate_file.refuse(arguments)
    if arguments.attacks is None:
        arguments.attacks = ATTACKS
    with held(arguments.directory if arguments.save else None, world=start()):
        return _judged(arguments)


def _judged(arguments: argparse.Namespace) -> Output:
    result = result_from(arguments)
    other = None if arguments.compare is None else load(arguments.compare, model=arguments.model)
    threat, tree = _checked(arguments, result)
    data = data_of(result, arguments)
    if data is None:
        name = result.data["name"]
        raise InputError(
            f"{arguments.directory} was trained on {name!r}: pass --data {name} (and --root), or a directory"
        )
    if tree is not None:
        tree = tree.ordered(data.classes)
    report = _evaluate(arguments, result, arguments.directory, data, threat, tree)
    document: dict[str, Any] = {"result": str(arguments.directory), "report": report.to_json(), "saved": False}
    parts = [f"{arguments.directory}: {report}"]
    if arguments.save and start().first:
        replace_report(arguments.directory, report)
        document["saved"] = True
        parts += ["", f"saved in {arguments.directory / RESULT}"]
    if other is not None:
        data_of(other, arguments)
        second = _evaluate(arguments, other, arguments.compare, data, threat, tree)
        tests = differences(report, second)
        document["compared_with"] = {"result": str(arguments.compare), "report": second.to_json()}
        document["differences"] = {name: asdict(test) for name, test in tests.items()}
        parts += ["", f"{arguments.compare}: {second}", "", f"{arguments.directory} minus {arguments.compare}:"]
        parts += [f"  {name:<12} {test}" for name, test in tests.items()]
    return Output(document=document, parts=tuple(parts))


def differences(a: RobustReport, b: RobustReport) -> dict[str, PairedTest]:
    """Test, for every attack that both reports ran, whether the two models differ on the same images."""
    shared = [result.name for result in a.attacks if result.name in {other.name for other in b.attacks}]
    return {name: compare(a, b, attack=name) for name in shared}


def replace_report(directory: Path, report: RobustReport) -> None:
    """Put another report into a saved result, which is whole at every moment."""
    path = directory / RESULT
    record = json.loads(path.read_text()) | {"report": report.to_json()}
    write_json(path, record)


def _checked(arguments: argparse.Namespace, result: CompressResult) -> tuple[ThreatModel, Hierarchy | None]:
    problems = Problems("evaluate cannot start")
    threat = result.threat
    try:
        threat = ThreatModel(arguments.norm or threat.norm, threat.eps if arguments.eps is None else arguments.eps)
    except InputError as error:
        problems.add(str(error))
    if arguments.norm is not None and arguments.norm != result.threat.norm and arguments.eps is None:
        problems.add(f"--norm {arguments.norm}: an eps of {result.threat.norm} means nothing there; give --eps as well")
    if arguments.save and threat != result.threat:
        problems.add(
            f"--save: the result is about {result.threat.label()}, this report would be about {threat.label()}; "
            "leave --save out"
        )
    for attack in arguments.attacks:
        try:
            attack_by_name(attack)
        except InputError as error:
            problems.add(str(error))
    if not arguments.attacks:
        problems.add(f"--attacks is empty{nearest('', ('clean', 'fgsm', 'pgd-20', 'autoattack'))}")
    tree = None if arguments.hierarchy is None else problems.attempt(lambda: hierarchy_from(arguments.hierarchy))
    problems.raise_if_any()
    return threat, tree


def _evaluate(
    arguments: argparse.Namespace,
    result: CompressResult,
    directory: Path,
    data: DataSplits,
    threat: ThreatModel,
    tree: Hierarchy | None,
) -> RobustReport:
    autoattack, world = "autoattack" in arguments.attacks, start()
    with evaluation_bar(directory.name) if world.first else contextlib.nullcontext() as progress:
        return evaluate(
            result.model,
            data.test,
            threat,
            attacks=arguments.attacks,
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            max_images=arguments.images,
            autoattack_images=arguments.autoattack_images if autoattack else None,
            time_limit_s=arguments.time_limit,
            progress=progress,
            resume_dir=kept_in(directory, CACHE, "chunks") if autoattack else None,
            hierarchy=tree,
            world=world,
        )
