"""The exported file against the model it came from. The only file that imports onnxruntime."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError, ParityError, Problems, first_line
from robustcompress.export.report import ParityCheck

INPUT, OUTPUT = "images", "logits"
"""The names that every exported file gives its input and output."""

ODD_BATCH = 7
"""Beside batch 1: a size that no example had, so that a frozen batch dimension shows."""

_TIE = 1e-5  # share of the logit scale within which float32 cannot tell two classes apart
_SMALLEST_SCALE = 1e-6  # keeps a network whose logits are all zero from dividing by zero


def load_session(path: str | Path, threads: int | None = None) -> Any:
    """Open an ONNX file with onnxruntime on the CPU.

    Args:
        path: The file.
        threads: Threads within one operator; onnxruntime's own choice where None.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        InputError: There is no such file, it is torn or no ONNX file, or `threads` is not positive.
    """
    import onnxruntime

    path = Path(path)
    problems = Problems("this ONNX file cannot be opened")
    if threads is not None and threads < 1:
        problems.add(f"threads={threads}: must be at least 1, or None for onnxruntime's choice")
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        problems.add(f"{path} {kind}; give a file that export_onnx() wrote")
    problems.raise_if_any()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimiser, and go past Python to the terminal
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise InputError(
            f"{path} cannot be opened ({first_line(error)}); it is torn, no ONNX file, or needs a newer onnxruntime "
            f"than {onnxruntime.__version__}: export it again"
        ) from error


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
    session = load_session(path)
    fixed = _check_interface(session, Path(path), images, tolerance, batches)
    if batches is None:
        batches = (1, ODD_BATCH) if fixed is None else (fixed,)
    images = images.detach().to("cpu", torch.float32).contiguous()
    expected = torch_logits(model, images)
    checks = tuple(_compare(session, images, expected, batch, name) for batch in batches)
    _judge(checks, tolerance)
    return checks


@torch.no_grad()
def torch_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Run a copy of `model` on the CPU in eval mode and float32: `[N, K]`. The model itself is not touched."""
    twin = copy.deepcopy(model).to("cpu", torch.float32).eval()
    return torch.cat([twin(chunk) for chunk in torch.split(images, 64)])


def _compare(session: Any, images: Tensor, expected: Tensor, batch: int, name: str) -> ParityCheck:
    count = len(images)
    index = torch.arange(math.ceil(count / batch) * batch) % count
    calls = [session.run([OUTPUT], {INPUT: images[chunk].numpy()})[0] for chunk in torch.split(index, batch)]
    found = torch.cat([torch.from_numpy(logits) for logits in calls])
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


def _check_interface(
    session: Any, path: Path, images: Tensor, tolerance: float, batches: Sequence[int] | None
) -> int | None:
    """Return the batch size that the file is fixed to, or None; raise when file and images do not belong together."""
    problems = Problems(f"{path} cannot be verified")
    if not tolerance > 0:
        problems.add(f"tolerance={tolerance!r}: must be positive")
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    if inputs != [INPUT] or outputs != [OUTPUT]:
        problems.add(
            f"it maps {', '.join(inputs)} to {', '.join(outputs)}; files of export_onnx() map {INPUT} to {OUTPUT}"
        )
    shape = tuple(session.get_inputs()[0].shape)
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4 or not len(images):
        problems.add("images: give a float tensor [N, C, H, W] in [0, 1] with at least one image")
    elif len(shape) != 4 or shape[1:] != tuple(images.shape[1:]):
        problems.add(f"it reads images of shape {shape[1:]}; these have shape {tuple(images.shape[1:])}")
    fixed = shape[0] if shape and isinstance(shape[0], int) else None
    for batch in batches or ():
        if batch < 1 or (fixed is not None and batch != fixed):
            problems.add(f"batch {batch}: the file accepts {'any from 1' if fixed is None else f'only {fixed}'}")
    problems.raise_if_any()
    return fixed
