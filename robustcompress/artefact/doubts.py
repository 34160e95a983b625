"""Reasons to doubt a file, or what attacks said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from robustcompress.artefact.file import OnnxFile
from robustcompress.artefact.report import CurvePoint
from robustcompress.export import ParityCheck
from robustcompress.robust import AttackResult, paired_test

TOLERANCE = 1e-4
"""As a share of the largest score: how far a float32 file may be from its twin, as in `export_onnx`."""

SIGNIFICANCE = 0.01
LEFT = 0.1
"""Accuracy that may be left where every image can be turned into plain grey: an attack may fall short a little."""


def flag_file(file: OnnxFile, images: Tensor) -> list[str]:
    """Whether the file answers twice alike, and with numbers."""
    first, second = file.scores(images), file.scores(images)
    flags = []
    if not bool(first.isfinite().all()):
        flags.append("some scores are not finite: such images count as what argmax makes of them; export again")
    elif float((first - second).abs().max()) > TOLERANCE * (1 + float(first.abs().max())):
        flags.append("the file is random (two passes over the same images differ): attacks cannot judge it")
    return flags


def flag_parity(parity: Sequence[ParityCheck], precision: str) -> list[str]:
    """Whether a float32 file computes what its twin does, so that the twin's gradients say anything about it."""
    if precision != "float32" or not parity:
        return []
    worst = max(parity, key=lambda check: check.relative_diff)
    if worst.relative_diff <= TOLERANCE:
        return []
    return [
        f"the file is not what its twin computes (scores differ by {worst.relative_diff:.1e} of their scale on "
        f"{worst.name} images, {100 * worst.argmax_agreement:.1f} % get the same class): export it again"
    ]


def flag_square(squares: Sequence[AttackResult], replayed: Sequence[AttackResult]) -> list[str]:
    """Whether an attack without gradients finds what all those with gradients missed."""
    if not squares or not replayed:
        return []
    n = min(result.n for result in (*squares, *replayed))
    white = torch.stack([result.correct[:n] for result in replayed]).all(0)
    black = torch.stack([result.correct[:n] for result in squares]).all(0)
    if n == 0:
        return []
    test = paired_test(white, black)
    if test.difference > 0 and test.p_value < SIGNIFICANCE:
        return [
            f"Square, which sees no gradient, leaves {int(black.sum())} of {n} images right, the attacks on the twin "
            f"{int(white.sum())}: the gradients that made those mislead (masked, or another network's), and the true "
            "accuracy may be lower still"
        ]
    return []


def flag_curve(points: Sequence[CurvePoint]) -> list[str]:
    """Whether accuracy falls as the adversary may do more, and to nothing where it may do everything."""
    flags = []
    for near, far in pairwise(points):
        test = paired_test(far.result.correct, near.result.correct)
        if test.difference > 0 and test.p_value < SIGNIFICANCE:
            flags.append(
                f"accuracy rises with the radius (from {100 * near.result.accuracy:.1f} % at eps {near.eps:.4g} to "
                f"{100 * far.result.accuracy:.1f} % at {far.eps:.4g}): the attack is misled"
            )
    last = points[-1] if points else None
    if last is not None and last.unbounded and last.result.low > LEFT:
        flags.append(
            f"at eps {last.eps:.4g}, where every image can be turned into plain grey, {100 * last.result.accuracy:.1f} "
            "% are still right: the attack fails, and all its numbers are too high"
        )
    return flags


def flag_stored(metadata: Mapping[str, str], clean: AttackResult) -> list[str]:
    """Whether the accuracy that the file states of itself was found again."""
    try:
        rows = json.loads(metadata.get("accuracy", "[]"))
        stored = next(row for row in rows if row["attack"] == "clean")
        low, high, accuracy = float(stored["low"]), float(stored["high"]), float(stored["accuracy"])
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
        return []
    if clean.high < low or clean.low > high:
        return [
            f"the file states a clean accuracy of {100 * accuracy:.1f} %, here it has {100 * clean.accuracy:.1f} %: "
            "other images, another preparation of them, or another file"
        ]
    return []
