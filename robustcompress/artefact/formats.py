"""A report in the words of public leaderboards, where it has what they ask for.

Their robust accuracy is AutoAttack's standard version with all gradients. A file can have that only through a twin
that computes the very same: our cheaper attacks never stand under their keys.
"""

from __future__ import annotations

from typing import Any

import torch

from robustcompress.artefact.doubts import TOLERANCE
from robustcompress.artefact.report import ArtefactReport
from robustcompress.errors import Problems
from robustcompress.models import ModelSpec
from robustcompress.result import CompressResult
from robustcompress.robust import AttackResult

AUTOATTACK = "autoattack on the twin"
ROBUSTBENCH_DATA = ("cifar10", "cifar100", "imagenet")
"""Data sets that RobustBench has a leaderboard of."""

AP_DATA = {"cifar10": "CIFAR10", "svhn": "SVHN", "imagenet": "ImageNet"}
"""Data sets of the adversarial-pruning benchmark, in its spelling."""


def robustbench(report: ArtefactReport, *, architecture: str | None = None) -> dict[str, Any]:
    """The report with the keys of RobustBench's model cards (Croce et al. 2021; `model_info/*.json`).

    `autoattack_acc` is there only where the standard AutoAttack ran on a float32 twin whose scores the file repeats
    within 1e-4. What other attacks found stands under `robustcompress`, a key of ours.

    Args:
        report: About data that RobustBench knows.
        architecture: Of the network; the file's name where None.

    Raises:
        InputError: The data are of none of its leaderboards, or not known.
    """
    problems = Problems("this report does not fit RobustBench")
    check_robustbench(report.data, problems)
    problems.raise_if_any()
    threat, worst = report.robust.threat, report.worst_case
    card: dict[str, Any] = {
        "name": report.path.stem,
        "dataset": str(report.data).lower(),
        "architecture": architecture or report.path.stem,
        "number_forward_passes": 1,
        "additional_data": None,
        "eps": threat.label().removeprefix(f"{threat.norm} "),
        "clean_acc": _percent(report.clean_accuracy),
        "footnote": f"ONNX file, {report.file['precision']}; {report.robust.n} images; {threat.norm}",
        "unreliable": bool(report.warnings),
    }
    whole = standard_autoattack(report)
    if whole is not None:
        card["autoattack_acc"] = _percent(whole.accuracy)
    card["robustcompress"] = {
        "worst_case_acc": _percent(worst.accuracy),
        "worst_case_images": worst.n,
        "attacks": [result.name for result in report.robust.attacks],
        "file_sha256": report.file["sha256"],
    }
    return card


def apbench(report: ArtefactReport, result: CompressResult | None) -> dict[str, Any]:
    """The report with the keys of the adversarial-pruning benchmark (Piras et al. 2024; its `model_key_maker`).

    Its second attack, HO-FMN, is not among ours: that key is null.

    Args:
        report: With the standard AutoAttack, on all its images.
        result: The twin's, which says how it was pruned.

    Raises:
        InputError: The report or the result lacks what the benchmark asks for; all of it is said.
    """
    problems = Problems("this report does not fit the adversarial-pruning benchmark")
    check_apbench(report.data, result, problems)
    whole = standard_autoattack(report)
    if whole is None:
        problems.add(
            "the standard AutoAttack was not run on all its images, or the file is not what its float32 twin computes: "
            "name --attacks autoattack --attack-images all"
        )
    problems.raise_if_any()
    assert whole is not None and result is not None and result.spec is not None
    structure, sparsity = _sparsity(result, result.spec)
    return {
        "ap_method": result.strategy["name"],
        "architecture": result.spec.name.rpartition(":")[2],
        "dataset": AP_DATA[str(report.data).lower()],
        "structure": structure,
        "sparsity_rate": f"{100 * sparsity:.0f}",
        "eps": report.robust.threat.eps,
        "norm": report.robust.threat.norm,
        "Clean Accuracy": _percent(report.clean_accuracy),
        "Robust Accuracy (AA)": _percent(whole.accuracy),
        "Robust Accuracy (HO-FMN)": None,
        "images": report.robust.n,
    }


def check_robustbench(data: str | None, problems: Problems) -> None:
    """Collect why a report about these data fits no leaderboard of RobustBench."""
    if (data or "").lower() not in ROBUSTBENCH_DATA:
        problems.add(f"RobustBench has {', '.join(ROBUSTBENCH_DATA)}: this is about {data or 'images without a name'}")


def check_apbench(data: str | None, result: CompressResult | None, problems: Problems) -> None:
    """Collect why a report about these data and this twin does not fit the adversarial-pruning benchmark."""
    if (data or "").lower() not in AP_DATA:
        problems.add(f"the benchmark has {', '.join(AP_DATA)}: this is about {data or 'images without a name'}")
    if result is None or result.spec is None:
        problems.add("there is no twin that says how it was pruned, and from which network: give --twin DIR")
    elif result.strategy["name"] == "none":
        problems.add("the network was not pruned: the benchmark is about pruned ones")


def standard_autoattack(report: ArtefactReport) -> AttackResult | None:
    """AutoAttack's result, where it may be called so: standard, on all images, on a twin that the file repeats."""
    found = next((result for result in report.robust.attacks if result.name == AUTOATTACK), None)
    repeats = bool(report.parity) and all(check.relative_diff <= TOLERANCE for check in report.parity)
    if found is None or found.suite != "standard" or found.n < report.robust.n:
        return None
    return found if repeats and report.file["precision"] == "float32" else None


def _sparsity(result: CompressResult, spec: ModelSpec) -> tuple[str, float]:
    """What was taken away, "weights" or "filters", and which share of it."""
    after = result.after
    if after.density < 0.999:  # a weight may be zero by chance
        return "weights", 1 - after.density
    with torch.random.fork_rng(devices=[]):
        reference = spec.build()
    kept, all_filters = (
        sum(m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        for model in (result.model, reference)
    )
    return "filters", 1 - kept / max(1, all_filters)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
