"""verify_artefact(): attack a deployed file itself, and say what withstood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress import machine
from robustcompress.artefact import doubts
from robustcompress.artefact.corruptions import CORRUPTIONS, MISSING, SEVERITIES, SIMPLIFIED, corrupt
from robustcompress.artefact.curve import security_curve
from robustcompress.artefact.file import OnnxFile
from robustcompress.artefact.jury import Jury, crafted, suite_of
from robustcompress.artefact.prepare import Plan, Twin, prepare
from robustcompress.artefact.report import ArtefactReport, CurvePoint
from robustcompress.artefact.square import QUERIES, square
from robustcompress.artefact.twin import parity_of
from robustcompress.data import DataSplits, Images
from robustcompress.interrupt import stop_if_asked
from robustcompress.robust import AttackResult, EvaluationProgress, RobustReport, ThreatModel, attack_by_name, sanity
from robustcompress.robust.chunks import model_sha256
from robustcompress.robust.judge import hash_of

ATTACK_IMAGES = 200
"""Images that Square and AutoAttack judge by default: they are the costly ones."""

CURVE_IMAGES = 100
TRANSFER = "pgd-20"
"""The attack on another model whose images are tried on the file."""

_PROBED = 64
_MANY = 10  # steps
_ON_TWIN = "{} on the twin"
_CURVE = "curve, eps {:.3g}"


def verify_artefact(
    path: str | Path,
    data: DataSplits | Images | tuple[Tensor, Tensor],
    threat: ThreatModel | None = None,
    *,
    twin: Twin | None = None,
    attacks: Sequence[str] | None = None,
    transfer_from: Mapping[str, Twin | OnnxFile] | None = None,
    curve: bool = False,
    corruptions: bool = False,
    max_images: int | None = None,
    attack_images: int | None = ATTACK_IMAGES,
    seed: int = 0,
    threads: int | None = None,
    keep: str | Path | None = None,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> ArtefactReport:
    """Attack a deployed ONNX file, in onnxruntime on the CPU, and judge it by its own answers.

    Gradient attacks are run on the torch twin and their images replayed on the file; Square attacks the scores of the
    file directly, so that gradients broken by quantisation or export hide nothing. Each adversarial image is brought
    back into the ball, as the file sees it: of a file that reads bytes it is rounded before it is measured and judged.

    Args:
        path: The file, one of `export_onnx` or a foreign one.
        data: Images and labels: the test images of a `DataSplits`, `Images`, or a pair as `evaluate` takes.
        threat: What the adversary may do; what the file says of itself where None.
        twin: The torch network that the file came from, or its `CompressResult`: images in [0, 1] to logits.
        attacks: "pgd-20" and the like, "autoattack" (both need the twin), "square" (1,000 queries), "square-5000". By
            default PGD-20 and Square with a twin, Square alone without. "clean" is always measured first.
        transfer_from: Other models by name, whose adversarial images are tried too: PGD-20 of networks, Square of
            files (from `open_onnx`).
        curve: Also measure the accuracy over radii, by PGD-20 of the twin, or by Square without one.
        corruptions: Also measure it under common corruptions (see `corruptions.py` for how they differ from the
            published ones).
        max_images: Judge so many images only, the same ones that `evaluate` takes; None means all.
        attack_images: Judge so many of those with Square and AutoAttack.
        seed: Of all randomness.
        threads: Threads within one operator of onnxruntime; its own choice where None.
        keep: Directory for finished chunks, made if missing: a run that was stopped goes on from there.
        progress: Called after every chunk.

    Returns:
        What was found; `worst_case` is the headline.

    Raises:
        InputError: The file, the images, the twin or the attacks cannot work; all of it is listed, before any attack.
    """
    troubles: list[str] = []
    plan = prepare(
        path,
        data,
        threat,
        twin=twin,
        attacks=attacks,
        transfer_from=transfer_from or {},
        max_images=max_images,
        attack_images=attack_images,
        threads=threads,
        keep=keep,
        warn=troubles.append,
    )
    file, threat = plan.file, plan.threat
    identity = {"file": file.sha256(), "onnxruntime": machine.versions().get("onnxruntime")}
    jury = Jury(
        file=file,
        images=plan.images,
        labels=plan.labels,
        indices=plan.indices,
        threat=threat,
        seed=seed,
        progress=progress,
        keep=plan.kept,
        identity=identity,
    )
    clean = jury.clean()
    found, queries = _attack(jury, plan, clean)
    probed = plan.images[:_PROBED]
    parity = _parity(plan, seed)
    warnings = doubts.flag_file(file, probed) + doubts.flag_parity(parity, file.precision)
    if plan.twin is not None:
        warnings += [f"twin: {flag}" for flag in sanity.flag_model(plan.twin, probed, plan.labels[: len(probed)])]
    squares = [result for result in found if result.name in queries]
    warnings += doubts.flag_square(squares, [result for result in found if result.name in _strong(plan)])
    warnings += doubts.flag_stored(file.metadata, clean)
    points: tuple[CurvePoint, ...] = ()
    if curve:
        points = security_curve(jury, clean.correct[:CURVE_IMAGES], _curve_attack(plan))
        warnings += doubts.flag_curve(points)
    rows = _corrupted(plan, seed) if corruptions else {}
    return ArtefactReport(
        path=Path(path),
        file={"sha256": identity["file"], "bytes": Path(path).stat().st_size} | _interface(file),
        data=plan.data,
        robust=RobustReport(
            threat=threat,
            n=len(plan.labels),
            seed=seed,
            attacks=(clean, *found),
            images_sha256=hash_of(plan.images, plan.labels),
            indices=plan.indices,
            warnings=(*warnings, *troubles),
        ),
        parity=parity,
        queries={name: tuple(spent) for name, spent in queries.items()},
        curve=points,
        corruptions=rows,
        corruption_images=len(plan.labels) if rows else 0,
        notes=tuple(_notes(plan, found, bool(rows))),
        made_with=machine.versions() | machine.hardware(),
    )


def _attack(jury: Jury, plan: Plan, clean: AttackResult) -> tuple[list[AttackResult], dict[str, list[int]]]:
    found: list[AttackResult] = []
    queries: dict[str, list[int]] = {}
    few = clean.correct[: plan.attack_images]
    for spec in plan.replayed:
        assert plan.twin is not None
        craft = crafted(plan.twin, spec, jury.threat, seed=jury.seed, num_classes=plan.num_classes)
        flags = few if spec.kind == "autoattack" else clean.correct
        depends, suite = model_sha256(plan.twin), suite_of(spec, plan.num_classes)
        found.append(jury.replay(_ON_TWIN.format(spec.name), craft, flags, depends_on=depends, suite=suite))
    for name, source in plan.sources.items():
        found.append(_transferred(jury, plan, name, source, clean.correct))
    for budget in plan.budgets:
        name = f"square-{budget}"
        result, queries[name] = jury.square(name, few, budget)
        found.append(result)
    return found, queries


def _strong(plan: Plan) -> set[str]:
    """Attacks that Square should not beat: those of many steps on the twin, and none on other models."""
    return {_ON_TWIN.format(spec.name) for spec in plan.replayed if spec.kind == "autoattack" or spec.steps >= _MANY}


def _transferred(jury: Jury, plan: Plan, name: str, source: nn.Module | OnnxFile, clean: Tensor) -> AttackResult:
    if isinstance(source, nn.Module):
        spec = attack_by_name(TRANSFER)
        craft = crafted(source, spec, jury.threat, seed=jury.seed, num_classes=plan.num_classes)
        return jury.replay(f"{TRANSFER} on {name}", craft, clean, depends_on=model_sha256(source))
    other = source

    def by_scores(x: Tensor, y: Tensor, first: int) -> Tensor:
        return square(other.scores, x, y, jury.threat, queries=QUERIES, seed=jury.seed).x_adv

    few = clean[: plan.attack_images]
    return jury.replay(f"square-{QUERIES} on {name}", by_scores, few, depends_on=other.sha256())


def _curve_attack(plan: Plan) -> Callable[[Jury, Tensor], AttackResult]:
    twin = plan.twin
    if twin is None:
        return lambda at, flags: at.square(_CURVE.format(at.threat.eps), flags, QUERIES // 5)[0]
    key, spec = model_sha256(twin), attack_by_name(TRANSFER)

    def replayed(at: Jury, flags: Tensor) -> AttackResult:
        craft = crafted(twin, spec, at.threat, seed=at.seed, num_classes=plan.num_classes)
        return at.replay(_CURVE.format(at.threat.eps), craft, flags, depends_on=key)

    return replayed


def _parity(plan: Plan, seed: int) -> tuple[Any, ...]:
    if plan.twin is None:
        return ()
    images, labels = plan.images[:_PROBED], plan.labels[:_PROBED]
    spec = attack_by_name(TRANSFER)
    attacked = spec.perturb(plan.twin, images, labels, plan.threat, generator=torch.Generator().manual_seed(seed))
    checks = parity_of(plan.file, plan.twin, images, "clean")
    return checks + parity_of(plan.file, plan.twin, attacked, "adversarial")


def _corrupted(plan: Plan, seed: int) -> dict[str, tuple[float, ...]]:
    pixels = plan.images.mul(255).round().to(torch.uint8)
    rows: dict[str, tuple[float, ...]] = {}
    for name in CORRUPTIONS:
        stop_if_asked(f"stopped before corruption {name!r}; those before it are made anew")
        shares = []
        for severity in SEVERITIES:
            answers = plan.file.scores(corrupt(pixels, name, severity, seed=seed).float() / 255).argmax(1)
            shares.append(float((answers == plan.labels).double().mean()))
        rows[name] = tuple(shares)
    return rows


def _interface(file: OnnxFile) -> dict[str, Any]:
    return {
        "precision": file.precision,
        "input_type": file.input_type,
        "layout": file.layout,
        "output": file.output_kind,
        "image_shape": list(file.image_shape),
    }


def _notes(plan: Plan, found: Sequence[AttackResult], corrupted: bool) -> list[str]:
    notes = []
    if plan.twin is None:
        notes.append("no torch twin: no attack with gradients was replayed; give one for a stricter report")
    if not plan.budgets:
        notes.append("Square was not run: an attack with gradients alone cannot see that they are broken")
    for result in found:
        if result.suite:
            notes.append(f"{result.name}: {result.suite}, run on the twin, each image judged again by the file")
    if any(result.n < len(plan.labels) for result in found):
        fewest = min(result.n for result in found)
        notes.append(f"the costly attacks judged {fewest} of {len(plan.labels)} images; the worst case is over those")
    if corrupted:
        notes.append(
            f"corruptions made here, at the strengths of CIFAR-10-C; simplified: {', '.join(SIMPLIFIED)}; without "
            f"{', '.join(MISSING)}: the mean is no published mCE"
        )
    return notes
