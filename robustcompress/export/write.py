"""export_onnx: checked, translated, compared, and only then in place."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.export.ends import Ends
from robustcompress.export.files import data_files, drafting, put_in_place, write_proto
from robustcompress.export.graph import check_network, check_proto, count_zeros, opset_of, to_proto
from robustcompress.export.metadata import file_metadata
from robustcompress.export.parity import torch_logits, verify_onnx
from robustcompress.export.report import ExportReport, ParityCheck
from robustcompress.export.request import Request, prepare
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
    input: Literal["float32", "uint8"] = "float32",
    resize: bool = False,
    softmax: bool = False,
    external_data: bool = False,
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
        input: "uint8" makes a file that takes images as they are decoded: bytes [batch, H, W, C], 0 to 255.
        resize: With bytes: leave H and W free, and resize inside the graph as the training data are: bilinear with
            antialiasing, the short side to the model's, the centre cropped, rounded to whole bytes.
        softmax: Give `probabilities` [batch, K] in place of `logits`.
        external_data: Write the weights to a second file beside `path`, which its name ties to it. A model too large
            for one file always gets two.
        verify: Compare the file with the model in onnxruntime, at batch 1 and 7 (or the fixed batch); a file that
            resizes also on larger and smaller images of odd sizes.
        sample: Clean images for that comparison, float `[N, C, H, W]` in [0, 1]; the first 14 are used. Random ones
            where None.
        threat: Also compare on adversarial images within this threat (PGD-5 against the model's own predictions).
        tolerance: Largest difference between two logits, as a share of the largest absolute logit. Of files that give
            probabilities their logarithms are compared.
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
        ends=Ends(input=input, resize=resize, softmax=softmax),
        external_data=external_data,
    )
    pairs = file_metadata(
        image_shape=request.image_shape,
        classes=request.classes,
        threat=request.threat,
        told=request.metadata,
        ends=request.ends,
    )
    with drafting(request.path) as draft:
        opset, zeros = _write(request, draft, pairs)
        parity = _compare(request, draft, tolerance) if verify else ()
        size, compressed = _sizes([draft, *data_files(draft)])
        data = put_in_place(draft, request.path)
    return ExportReport(
        path=request.path,
        data=data,
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
    check_network(proto, request.image_shape, opset=request.opset, batch=request.batch)
    request.ends.put_around(proto, "batch" if request.batch == "dynamic" else request.batch, request.image_shape)
    onnx.helper.set_model_props(proto, dict(pairs))
    write_proto(proto, draft, external_data=request.external_data)
    written = onnx.load(str(draft))
    check_proto(
        written,
        request.image_shape,
        opset=request.opset,
        batch=request.batch,
        ends=request.ends,
        path=draft if request.external_data else None,
    )
    entries, zeros = count_zeros(written)
    return opset_of(written), zeros / max(1, entries)


def _compare(request: Request, draft: Path, tolerance: float) -> tuple[ParityCheck, ...]:
    generator = torch.Generator().manual_seed(0)
    if request.sample is None:
        name, images = "random", torch.rand((_COMPARED, *request.image_shape), generator=generator)
    else:
        name, images = "clean", request.sample[:_COMPARED]
    checks = verify_onnx(draft, request.model, images, tolerance=tolerance, name=name)
    if request.ends.resize:
        for odd in _odd_sizes(images):
            called = f"{name}, {odd.shape[2]}x{odd.shape[3]}"
            checks += verify_onnx(draft, request.model, odd, tolerance=tolerance, name=called)
    if request.threat is None:
        return checks
    labels = torch_logits(request.model, images).argmax(1)
    attacked = pgd(request.model, images, labels, request.threat, steps=_PGD_STEPS, generator=generator)
    return checks + verify_onnx(draft, request.model, attacked, tolerance=tolerance, name="adversarial")


def _odd_sizes(images: Tensor) -> list[Tensor]:
    """The same images stretched: larger and upright, smaller and lying; no side a multiple of another."""
    height, width = images.shape[2:]
    sizes = ((3 * height + 5, 2 * width + 1), (max(2, height * 2 // 3), width + 3))
    return [F.interpolate(images, size=size, mode="bilinear", align_corners=False) for size in sizes]


def _sizes(files: Sequence[Path]) -> tuple[int, int]:
    """Bytes of all files, and after zlib."""
    size = compressed = 0
    for file in files:
        packer = zlib.compressobj()
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                size += len(chunk)
                compressed += len(packer.compress(chunk))
        compressed += len(packer.flush())
    return size, compressed
