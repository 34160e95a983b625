"""export_onnx: checked, translated, compared, and only then in place."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from robustcompress.errors import InputError
from robustcompress.export.graph import check_proto, count_zeros, opset_of, to_proto
from robustcompress.export.metadata import file_metadata
from robustcompress.export.parity import torch_logits, verify_onnx
from robustcompress.export.report import ExportReport, ParityCheck
from robustcompress.export.request import Request, prepare, temporary
from robustcompress.robust import ThreatModel, pgd

_COMPARED = 14  # images: enough for two calls of the odd batch, and quick at batch 1
_PGD_STEPS = 5


def export_onnx(
    model_or_result: Any,
    path: str | Path,
    *,
    image_shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = 20,
    batch: Literal["dynamic"] | int = "dynamic",
    verify: bool = True,
    sample: torch.Tensor | None = None,
    threat: ThreatModel | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model as one ONNX file that maps `images` [batch, C, H, W] in [0, 1] to `logits` [batch, K].

    The model is not touched: a copy is exported, in eval mode, float32, on the CPU. The file is written under another
    name, read back, compared with the model, and only then renamed: a failure leaves nothing behind, and an existing
    file as it was.

    Args:
        model_or_result: A network, or a result with `.model`, whose `.image_shape`, `.classes`, `.threat` and
            `.export_metadata()` stand in for the arguments not given here.
        path: The file, ending in .onnx, in a directory that exists.
        image_shape: (C, H, W); that of the result, else of `sample`, else (3, 32, 32), where not given.
        classes: Class names in the order of the logits, stored in the file.
        metadata: Further pairs of strings for the file; keys get the prefix `robustcompress.`, and absolute paths are
            cut down to their last part.
        opset: ONNX operator set, 18 or later.
        batch: "dynamic", or the one batch size that the file shall accept.
        verify: Compare the file with the model in onnxruntime, at batch 1 and 7 (or the fixed batch).
        sample: Clean images for that comparison, float `[N, C, H, W]` in [0, 1]; the first 14 are used. Random ones
            where None.
        threat: Also compare on adversarial images within this threat (PGD-5 against the model's own predictions).
        tolerance: Largest difference between two logits, as a share of the largest absolute logit.
        overwrite: Whether `path` may exist.

    Returns:
        What was written, and how closely it agrees.

    Raises:
        InputError: Arguments or a model that cannot work, all problems at once, before any work; or a network that the
            exporter cannot translate faithfully.
        ParityError: The file computes something else than the model.
    """
    request = prepare(
        model_or_result,
        path,
        image_shape=image_shape,
        classes=classes,
        metadata=metadata,
        opset=opset,
        batch=batch,
        sample=sample,
        threat=threat,
        tolerance=tolerance,
        overwrite=overwrite,
    )
    pairs = file_metadata(
        image_shape=request.image_shape, classes=request.classes, threat=request.threat, told=request.metadata
    )
    draft = temporary(request.path)
    try:
        opset, zeros = _write(request, draft, pairs)
        parity = _compare(request, draft, tolerance) if verify else ()
        size, compressed = draft.stat().st_size, len(zlib.compress(draft.read_bytes()))
        os.replace(draft, request.path)  # noqa: PTH105
    finally:
        draft.unlink(missing_ok=True)
    return ExportReport(
        path=request.path,
        bytes=size,
        compressed_bytes=compressed,
        zeros=zeros,
        opset=opset,
        batch=str(request.batch),
        parity=parity,
        metadata=pairs,
    )


def _write(request: Request, draft: Path, pairs: Mapping[str, str]) -> tuple[int, float]:
    """Write the draft, read it back, and return the opset and the share of zeros found in it."""
    import onnx

    proto = to_proto(request.model, request.image_shape, opset=request.opset, batch=request.batch)
    onnx.helper.set_model_props(proto, dict(pairs))
    try:
        draft.write_bytes(proto.SerializeToString())
    except OSError as error:
        raise InputError(f"{request.path} cannot be written ({error.strerror}); free some space") from error
    written = onnx.load(str(draft))
    check_proto(written, request.image_shape, opset=request.opset, batch=request.batch)
    entries, zeros = count_zeros(written)
    return opset_of(written), zeros / max(1, entries)


def _compare(request: Request, draft: Path, tolerance: float) -> tuple[ParityCheck, ...]:
    generator = torch.Generator().manual_seed(0)
    if request.sample is None:
        name, images = "random", torch.rand((_COMPARED, *request.image_shape), generator=generator)
    else:
        name, images = "clean", request.sample[:_COMPARED]
    checks = verify_onnx(draft, request.model, images, tolerance=tolerance, name=name)
    if request.threat is None:
        return checks
    labels = torch_logits(request.model, images).argmax(1)
    attacked = pgd(request.model, images, labels, request.threat, steps=_PGD_STEPS, generator=generator)
    return checks + verify_onnx(draft, request.model, attacked, tolerance=tolerance, name="adversarial")
