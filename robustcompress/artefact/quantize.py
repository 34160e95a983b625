"""quantize_onnx: int8 or float16, judged on held-out images, clean and attacked, before it is put in place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from robustcompress.artefact.changes import QuantizeReport
from robustcompress.artefact.float16 import check_range, to_float16
from robustcompress.artefact.int8 import Calibrated, Method
from robustcompress.artefact.judging import Say, calibration_images, changes_of, say_of_itself
from robustcompress.artefact.request import Wanted, check_arguments, prepare
from robustcompress.artefact.targets import TARGETS, Precision
from robustcompress.data import DataSplits
from robustcompress.errors import AccuracyError, InputError, Problems, first_line
from robustcompress.export import export_onnx
from robustcompress.export.files import data_files, drafting, put_in_place, write_proto
from robustcompress.export.graph import strip
from robustcompress.export.reading import open_onnx
from robustcompress.robust import ThreatModel

MAX_LOSS = 2.0
"""Percentage points that a smaller file may lose where nothing is said: on some hundred images one is chance."""

_SENSITIVITY_IMAGES = 64


def quantize_onnx(
    source: Any,
    path: str | Path,
    *,
    data: DataSplits,
    to: Precision = "int8",
    target: str | None = None,
    model: Any = None,
    calibrate: Literal["clean", "adversarial"] = "clean",
    method: Method = "percentile",
    images: int = 256,
    keep_first_last: bool = False,
    keep_sensitive: int = 0,
    float16_io: bool = False,
    threat: ThreatModel | None = None,
    attack: str = "pgd-20",
    judged: int | None = 1000,
    max_loss: float = MAX_LOSS,
    allow_loss: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Say | None = None,
) -> QuantizeReport:
    """Write a float32 file in int8 or float16, and say what that costs in accuracy, clean and under attack.

    int8 is static: weights with one scale a channel, activations with ranges measured on training images, as
    QuantizeLinear and DequantizeLinear around each operator (QDQ). Preprocessing, softmax and the logits stay float.

    Args:
        source: An ONNX file in float32; or a `CompressResult`, which is exported first.
        path: The new file, ending in .onnx.
        data: What the network was trained on. Ranges come from `train`, `keep_sensitive` is chosen on `val`, and the
            file is judged on `test`.
        to: "int8" or "float16".
        target: "x86", "x86-vnni", "arm" or "gpu" (see `TARGETS`); "x86" where None, and "gpu" for float16.
        model: The network of the file in torch, or its `CompressResult`: what adversarial images are made from.
            That of `source` where it is a result. Without it accuracy under attack is not measured.
        calibrate: "adversarial" attacks half of the calibration images (PGD-10).
        method: How a range follows from what was seen: "percentile" (99.99), "entropy" or "minmax".
        images: Calibration images, at least 32; all training images where there are fewer.
        keep_first_last: Leave the first and the last layer in float.
        keep_sensitive: Leave this many layers in float: those that alone change the scores most.
        float16_io: With float16: take and give float16 as well.
        threat: What the adversarial images are made within; that of the file where None.
        attack: "fgsm" or a PGD such as "pgd-20": makes the images that both files are then judged on. They were not
            made against the smaller file: robust accuracy found so is an upper bound, as a check that nothing broke.
        judged: How many test images are judged; all where None.
        max_loss: Percentage points that either accuracy may lose.
        allow_loss: Write a file that loses more as well.
        seed: Of the attacks.
        overwrite: Whether `path` may exist.
        progress: Is told what is being done, line by line.

    Returns:
        What was written, and what it lost.

    Raises:
        InputError: Arguments that cannot work, all problems at once, before any long work.
        AccuracyError: The file would lose more than `max_loss`; nothing has been written.
    """
    tell = progress or (lambda line: None)
    model = source if model is None and hasattr(source, "model") else model
    problems = check_arguments(
        source,
        path,
        data=data,
        to=to,
        target=target,
        attack=attack,
        calibrate=calibrate,
        method=method,
        images=images,
        judged=judged,
        keep_sensitive=keep_sensitive,
        max_loss=max_loss,
        has_twin=model is not None,
        overwrite=overwrite,
    )
    with _float_file(source, data, problems, tell) as file:
        wanted = prepare(
            problems,
            file,
            Path(path),
            data=data,
            to=to,
            target=target,
            twin=model if isinstance(model, nn.Module) or model is None else model.model,
            threat=threat if threat is not None else getattr(model, "threat", None),
            attack=attack,
        )
        seen = calibration_images(wanted, images, adversarial=calibrate == "adversarial", seed=seed, tell=tell)
        calibration = {"images": len(seen), "data": data.name, "kind": calibrate}
        with tempfile.TemporaryDirectory() as scratch, drafting(wanted.path) as draft:
            with _in_words(source):
                if to == "int8":
                    calibration["method"] = method
                    proto, kept = _int8(wanted, Path(scratch), seen, method, keep_first_last, keep_sensitive, tell)
                else:
                    tell(f"looking for numbers that float16 does not hold, on {len(seen)} images")
                    calibration["largest_activation"] = check_range(wanted.proto, wanted.file, seen, Path(scratch))
                    proto, kept = to_float16(wanted.proto, float16_io=float16_io), ()
            strip(proto)
            say_of_itself(proto, wanted.file, to, {})
            write_proto(proto, draft, external_data=False)
            clean, robust = changes_of(wanted, open_onnx(draft), judged, seed, tell)
            account: dict[str, Any] = {
                "to": to,
                "target": wanted.target,
                "calibration": calibration,
                "kept_float": list(kept),
                "float_sha256": wanted.file.sha256(),
            }
            changes = (clean,) if robust is None else (clean, robust)
            pairs = say_of_itself(proto, wanted.file, to, account, changes)
            write_proto(proto, draft, external_data=False)
            report = QuantizeReport(
                path=wanted.path,
                to=to,
                target=wanted.target,
                bytes=draft.stat().st_size,
                float_bytes=sum(part.stat().st_size for part in (file, *data_files(file))),
                kept=kept,
                clean=clean,
                robust=robust,
                max_loss=max_loss,
                calibration=calibration,
                metadata=pairs,
            )
            if not report.within and not allow_loss:
                raise AccuracyError(_refusal(report))
            open_onnx(draft)  # with all that it says of itself now
            put_in_place(draft, wanted.path)
    return report


@contextmanager
def _float_file(source: Any, data: DataSplits, problems: Problems, tell: Say) -> Iterator[Path]:
    """Give the file to quantize; that of a result is exported, and removed at the end."""
    if isinstance(source, str | Path):
        yield Path(source)
        return
    problems.raise_if_any()
    with tempfile.TemporaryDirectory() as folder:
        tell("exporting the float network")
        sample = data.test.first(14).as_float() if data.image_shape == tuple(source.image_shape) else None
        yield export_onnx(source, Path(folder) / "float.onnx", sample=sample).path


@contextmanager
def _in_words(source: Any) -> Iterator[None]:
    """Turn whatever the quantizer's many parts raise into one error that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        what = source if isinstance(source, str | Path) else "this result"
        raise InputError(
            f"onnxruntime cannot quantize {what} ({type(error).__name__}: {first_line(error)}); export it again with "
            "this version, or keep it in float32"
        ) from error


def _int8(
    wanted: Wanted, scratch: Path, seen: Tensor, method: Method, ends: bool, sensitive: int, tell: Say
) -> tuple[Any, tuple[str, ...]]:
    """The quantized graph, and the layers that stay float."""
    graph = Calibrated(wanted.proto, scratch, TARGETS[wanted.target])
    if sensitive + 2 * ends >= len(graph.layers):
        raise InputError(
            f"{sensitive + 2 * ends} of {len(graph.layers)} layers would stay float: keep fewer, or keep the float file"
        )
    tell(f"measuring the ranges of activations on {len(seen)} images")
    graph.calibrate(wanted.file, seen, method)
    kept = {graph.layers[0], graph.layers[-1]} if ends else set()
    if sensitive:
        tell(f"measuring how sensitive each of {len(graph.layers)} layers is")
        kept |= set(_sensitive(wanted, graph, scratch, kept)[:sensitive])
    names = tuple(name for name in graph.layers if name in kept)
    return graph.quantized(keep=names), names


def _sensitive(wanted: Wanted, graph: Calibrated, scratch: Path, kept: Iterable[str]) -> list[str]:
    """The layers not kept yet, from the one that alone changes the scores of validation images most."""
    source = wanted.data.val if len(wanted.data.val) else wanted.data.train
    images = source.first(_SENSITIVITY_IMAGES).as_float()
    wanted_scores = wanted.file.scores(images)
    moved: dict[str, float] = {}
    for name in set(graph.layers) - set(kept):
        alone = scratch / "alone.onnx"
        write_proto(graph.quantized(only=(name,)), alone, external_data=False)
        moved[name] = float((open_onnx(alone).scores(images) - wanted_scores).pow(2).mean())
    return sorted(moved, key=lambda name: (-moved[name], name))


def _refusal(report: QuantizeReport) -> str:
    lost = "\n".join(f"  {change}" for change in report.changes)
    remedies = ["use int8"]
    if report.to == "int8":
        remedies = ["keep layers in float (--keep-first-last, --keep-sensitive 2)", "calibrate on more images"]
        if report.calibration["kind"] == "clean":
            remedies.append("calibrate on attacked images as well (--calibrate adversarial)")
        if TARGETS[report.target].reduce_range:
            remedies.append("write for a processor with VNNI (--target x86-vnni), if it has it")
    remedies.append(f"allow more than {report.max_loss:g} points (--max-loss), or take it as it is (--allow-loss)")
    return (
        f"in {report.to} the file loses more than {report.max_loss:g} points:\n{lost}\n"
        f"nothing was written: {'; '.join(remedies)}"
    )
