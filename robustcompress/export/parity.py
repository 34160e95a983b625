"""The exported file against the model it came from, both read as their users read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from robustcompress.errors import ParityError, Problems
from robustcompress.export.ends import INPUT, LOGITS, PROBABILITIES, preprocessing_of, reference_resize
from robustcompress.export.reading import SMALLEST, OnnxFile, open_onnx
from robustcompress.export.report import ParityCheck
from robustcompress.export.session import open_session

ODD_BATCH = 7
"""Beside batch 1: a size that no example had, so that a frozen batch dimension shows."""

_TIE = 1e-5  # share of the logit scale within which float32 cannot tell two classes apart
_SMALLEST_SCALE = 1e-6  # keeps a network whose logits are all zero from dividing by zero
_FLIPPED = 0.02  # share of resized pixels that may be one of 255 off: they lie halfway, up to float32's rounding


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    images: Tensor,
    *,
    tolerance: float = 1e-4,
    batches: Sequence[int] | None = None,
    name: str = "clean",
) -> tuple[ParityCheck, ...]:
    """Compare what onnxruntime computes from a file with what the torch model computes.

    Args:
        path: A file that `export_onnx` wrote.
        model: The model it came from; not touched (a copy runs on the CPU, in eval mode and float32).
        images: Float `[N, C, H, W]` in [0, 1]. All are run, in calls of each batch size; the last call of a size is
            filled up with images from the beginning.
        tolerance: Largest difference between two logits, as a share of the largest absolute torch logit.
        batches: Batch sizes; 1 and 7 where None (for a file of fixed batch: that size).
        name: What the images are called in the checks.

    Returns:
        One check for each batch size, all of them passed.

    Raises:
        InputError: The file is missing, torn, or has other inputs or outputs; or the images do not fit it.
        ParityError: A difference above the tolerance, another class, or logits that are not finite.
    """
    file = open_onnx(path)
    _check_interface(file, images, tolerance, batches)
    if batches is None:
        batches = (1, ODD_BATCH) if file.batch is None else (file.batch,)
    images = images.detach().to("cpu", torch.float32).contiguous()
    expected = torch_logits(model, _seen(file, images))
    if file.output_kind == "probabilities":
        expected = expected.log_softmax(1).clamp_min(math.log(SMALLEST))
    checks = tuple(_compare(file, images, expected, batch, name) for batch in batches)
    _judge(checks, tolerance)
    return checks


@torch.no_grad()
def torch_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Run a copy of `model` on the CPU in eval mode and float32: `[N, K]`. The model itself is not touched."""
    twin = copy.deepcopy(model).to("cpu", torch.float32).eval()
    return torch.cat([twin(chunk) for chunk in torch.split(images, 64)])


def _seen(file: OnnxFile, images: Tensor) -> Tensor:
    """What the network within the file should get to see of these images."""
    if file.input_type == "uint8":
        images = images.mul(255).round().clamp(0, 255).div(255)
    if images.shape[1:] == file.image_shape or not file.resizes:
        return images
    return _resized(file, images)


def _resized(file: OnnxFile, images: Tensor) -> Tensor:
    """The pixels that the file's own resize makes, once they are seen to be those of torch.

    A pixel that lies halfway between two of 256 values may be rounded up here and down there, which moves the logits
    by more than the arithmetic does. So the resize is compared on its own, and the network on what came out of it.
    """
    import onnx

    alone = preprocessing_of(onnx.load(str(file.path), load_external_data=False))
    if alone is None:
        raise ParityError(f"{file.path} takes images of any size, and not by the resize that export_onnx() writes")
    session = open_session(alone.SerializeToString())
    found = torch.cat([torch.from_numpy(session.run(None, {INPUT: file.feed(one)})[0]) for one in _calls(file, images)])
    found = found[: len(images)]
    apart = (found * 255 - reference_resize(images * 255, *file.image_shape[1:])).abs()
    flipped = float((apart > 0.5).double().mean())
    if not float(apart.max()) < 1.5 or flipped > _FLIPPED:
        raise ParityError(
            f"{file.path} resizes {images.shape[2]}x{images.shape[3]} unlike torch: {100 * flipped:.2g} % of the "
            f"pixels differ, by up to {float(apart.max()):.3g} of 255"
        )
    return found


def _calls(file: OnnxFile, images: Tensor) -> Sequence[Tensor]:
    size = file.batch or len(images)
    index = torch.arange(math.ceil(len(images) / size) * size) % len(images)
    return [images[chunk] for chunk in torch.split(index, size)]


def _compare(file: OnnxFile, images: Tensor, expected: Tensor, batch: int, name: str) -> ParityCheck:
    count = len(images)
    index = torch.arange(math.ceil(count / batch) * batch) % count
    found = torch.cat([file.scores(images[chunk]) for chunk in torch.split(index, batch)])
    wanted = expected[index]
    if found.shape != wanted.shape:
        raise ParityError(f"the file returns {tuple(found.shape)} where torch returns {tuple(wanted.shape)}")
    scale = max(float(wanted.abs().max()), _SMALLEST_SCALE)
    # What torch says of the class that the file chose: a tie when it is as good as torch's own choice.
    chosen = wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    agreed = wanted.max(1).values - chosen <= _TIE * scale
    return ParityCheck(
        name=name,
        batch=batch,
        images=count,
        max_abs_diff=float((found - wanted).abs().max()),
        scale=scale,
        argmax_agreement=float(agreed.double().mean()),
    )


def _judge(checks: Sequence[ParityCheck], tolerance: float) -> None:
    problems = Problems("the file does not compute what the model computes")
    for check in checks:
        where = f"{check.name} images at batch {check.batch}"
        if not math.isfinite(check.max_abs_diff) or not math.isfinite(check.scale):
            problems.add(f"{where}: logits that are not finite; look at the model's own output first")
        elif check.relative_diff > tolerance:
            problems.add(
                f"{where}: logits differ by {check.max_abs_diff:.3g}, {check.relative_diff:.2g} of their scale "
                f"(allowed: {tolerance:g})"
            )
        elif check.argmax_agreement < 1:
            problems.add(f"{where}: only {100 * check.argmax_agreement:.4g} % get the same class")
    problems.raise_if_any(ParityError)


def _check_interface(file: OnnxFile, images: Tensor, tolerance: float, batches: Sequence[int] | None) -> None:
    """Raise when file and images do not belong together."""
    problems = Problems(f"{file.path} cannot be verified")
    if not tolerance > 0:
        problems.add(f"tolerance={tolerance!r}: must be positive")
    if file.input != INPUT or file.output not in (LOGITS, PROBABILITIES):
        problems.add(
            f"it maps {file.input} to {file.output}; files of export_onnx() map {INPUT} to {LOGITS} or {PROBABILITIES}"
        )
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4 or not len(images):
        problems.add("images: give a float tensor [N, C, H, W] in [0, 1] with at least one image")
    elif images.shape[1] != file.image_shape[0] or (not file.resizes and images.shape[1:] != file.image_shape):
        problems.add(f"it reads images of shape {file.image_shape}; these have shape {tuple(images.shape[1:])}")
    for batch in batches or ():
        if batch < 1 or (file.batch is not None and batch != file.batch):
            accepted = "any from 1" if file.batch is None else f"only {file.batch}"
            problems.add(f"batch {batch}: the file accepts {accepted}")
    problems.raise_if_any()
