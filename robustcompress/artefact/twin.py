"""The torch network that a file came from: whether the two agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustcompress.artefact.file import OnnxFile
from robustcompress.artefact.rounding import seen
from robustcompress.export import ParityCheck

BATCHES = (1, 7, 64)
"""Images a call that are compared; of a file of one batch size, that one."""

_TIE = 1e-5  # share of the scale within which float32 cannot tell two classes apart


@torch.no_grad()
def parity_of(file: OnnxFile, twin: nn.Module, images: Tensor, name: str) -> tuple[ParityCheck, ...]:
    """Compare the scores of a file with those of its twin on what the file sees of some images.

    Args:
        file: Its scores; where it gives probabilities, the twin's logits are normalised alike.
        twin: On the CPU, in eval mode.
        images: Float [N, C, H, W] in [0, 1].
        name: What the images are called in the checks.

    Returns:
        One check for each number of images a call.
    """
    images = seen(images, file.input_type)
    wanted = twin(images).float()
    if file.output_kind == "probabilities":
        wanted = wanted.log_softmax(1)
    scale = max(float(wanted.abs().max()), 1e-6)
    checks = []
    for batch in BATCHES if file.batch is None else (file.batch,):
        found = torch.cat([file.scores(chunk) for chunk in torch.split(images, batch)])
        chosen = wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
        difference = float((found - wanted).abs().max())
        checks.append(
            ParityCheck(
                name=name,
                batch=batch,
                images=len(images),
                max_abs_diff=difference if math.isfinite(difference) else math.inf,
                scale=scale,
                argmax_agreement=float((wanted.amax(1) - chosen <= _TIE * scale).double().mean()),
            )
        )
    return tuple(checks)


def agreement(file: OnnxFile, twin: nn.Module, images: Tensor) -> float:
    """Share of images that get the same class of both, in [0, 1]."""
    images = seen(images, file.input_type)
    with torch.no_grad():
        return float((file.scores(images).argmax(1) == twin(images).argmax(1)).double().mean())
