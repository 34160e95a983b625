"""Which images a smaller file is calibrated and judged on, and what it then says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robustcompress.artefact.changes import Change
from robustcompress.artefact.request import Wanted
from robustcompress.export.metadata import PREFIX
from robustcompress.export.reading import OnnxFile
from robustcompress.robust import AttackSpec

Say = Callable[[str], None]

_CALIBRATION_STEPS = 10  # of PGD, for images that only have to stretch the ranges


def calibration_images(wanted: Wanted, count: int, *, adversarial: bool, seed: int, tell: Say) -> Tensor:
    """The first training images as floats [N, C, H, W]; with `adversarial`, half of them attacked."""
    chosen = wanted.data.train.first(count)  # they lie in an order that mixes the classes
    images = chosen.as_float()
    if not adversarial:
        return images
    half = len(images) // 2
    tell(f"attacking {half} calibration images")
    spec = AttackSpec(kind="pgd", steps=_CALIBRATION_STEPS)
    return torch.cat([_attacked(wanted, spec, images[:half], chosen.labels[:half], seed), images[half:]])


def changes_of(
    wanted: Wanted, smaller: OnnxFile, judged: int | None, seed: int, tell: Say
) -> tuple[Change, Change | None]:
    """Judge both files on test images, and on adversarial ones where there is a network to make them from."""
    test = wanted.data.test if judged is None else wanted.data.test.first(judged)
    images, labels = test.as_float(), test.labels
    tell(f"judging both files on {len(test)} test images")
    before, after = (file.scores(images).argmax(1) == labels for file in (wanted.file, smaller))
    clean = Change(name="clean", before=before, after=after)
    if wanted.twin is None:
        return clean, None
    tell(f"attacking the float network with {wanted.attack.name}")
    attacked = _attacked(wanted, wanted.attack, images, labels, seed)
    flags = [
        right & (file.scores(attacked).argmax(1) == labels) for file, right in ((wanted.file, before), (smaller, after))
    ]
    return clean, Change(name=wanted.attack.name, before=flags[0], after=flags[1])


def _attacked(wanted: Wanted, spec: AttackSpec, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    assert wanted.twin is not None and wanted.threat is not None
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(torch.split(images, 256), torch.split(labels, 256), strict=True)
    return torch.cat([spec.perturb(wanted.twin, x, y, wanted.threat, generator=generator) for x, y in pairs])


def say_of_itself(
    proto: Any, source: OnnxFile, precision: str, account: Mapping[str, Any], changes: Sequence[Change] = ()
) -> dict[str, str]:
    """Write the metadata of a smaller file: those of the float file, with what no longer holds replaced or renamed.

    Args:
        proto: The smaller graph; its metadata are replaced.
        source: The float file.
        precision: Of the smaller one.
        account: How it came about.
        changes: What was measured.

    Returns:
        Every key and value.
    """
    import onnx

    told = dict(source.metadata)
    if "accuracy" in told:
        told["accuracy_float"] = told.pop("accuracy")
    kinds = {onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.FLOAT16: "float16"}
    told["precision"] = precision
    told["input_type"] = kinds.get(proto.graph.input[0].type.tensor_type.elem_type, "float32")
    if changes:
        told["accuracy"] = json.dumps([change.row(change.after) for change in changes])
        measured = [change.to_json() for change in changes]
        told["quantization"] = json.dumps({**account, "changes": measured, "onnxruntime": _version()})
    pairs = {PREFIX + key: told[key] for key in sorted(told)}
    onnx.helper.set_model_props(proto, pairs)
    return pairs


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
