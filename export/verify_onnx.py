"""Check a deployed file where it runs: accuracy, latency, and the classes it gave when it was made. No torch.

Needs onnxruntime and numpy alone. `to_onnx.py --expect expected.npz` writes images, labels and torch's logits into one
file; this script says whether onnxruntime on this machine gives the same classes.

Example:
    python verify_onnx.py model.onnx --expect expected.npz
    python verify_onnx.py model.onnx --images test.npz --min-accuracy 0.9 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PREFIX = "robustcompress."
_TIE = 1e-5  # share of the largest score within which float32 cannot tell two classes apart
_RANDOM = 64  # images, where none are given


class InputError(Exception):
    """The file or the images cannot be used; the message says why."""


class Deployed:
    """An exported file, opened with a stated number of threads.

    Args:
        path: The file.
        threads: Threads within one operator.

    Raises:
        InputError: It cannot be opened, or is no image classifier that `export_onnx()` wrote.
    """

    def __init__(self, path: Path, threads: int) -> None:
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise InputError(f"{path} cannot be opened ({str(error).splitlines()[0]})") from error
        stored = self._session.get_modelmeta().custom_metadata_map
        self.facts = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
        self.node = self._session.get_inputs()[0]
        if len(self.node.shape) != 4 or self.node.type not in ("tensor(float)", "tensor(uint8)"):
            raise InputError(f"{path} reads {self.node.type} {self.node.shape}: no batch of images")
        self.batch = self.node.shape[0] if isinstance(self.node.shape[0], int) else None
        self.gives_probabilities = self.facts.get("output") == "probabilities"
        self._nhwc = self.facts.get("layout") == "NHWC"
        self._bytes = self.node.type == "tensor(uint8)"

    def image_size(self) -> tuple[int, int]:
        """(height, width): what the file reads, or was made for where it reads any size."""
        height, width = self.node.shape[1:3] if self._nhwc else self.node.shape[2:]
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        _, height, width = json.loads(self.facts.get("image_shape", "[3, 32, 32]"))
        return height, width

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Bring images, `[N, 3, H, W]` or `[N, H, W, 3]`, to the type and the order of axes that the file reads.

        Raises:
            InputError: They are neither bytes nor floats in [0, 1], of another size, or finer than the file can read.
        """
        if images.ndim != 4 or not len(images) or 3 not in (images.shape[1], images.shape[3]):
            raise InputError(
                f"images of shape {list(images.shape)}: must be [N, 3, H, W] or [N, H, W, 3], N at least 1"
            )
        if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
            raise InputError(f"images of type {images.dtype}: must be uint8, or floats in [0, 1]")
        if (images.shape[3] == 3) != self._nhwc:
            images = images.transpose((0, 2, 3, 1) if self._nhwc else (0, 3, 1, 2))
        for found, wanted in zip(images.shape[1:], self.node.shape[1:], strict=True):
            if isinstance(wanted, int) and found != wanted:
                raise InputError(f"images of shape {list(images.shape)}; the file reads {self.node.shape}")
        if self._bytes and images.dtype != np.uint8:
            levels = np.rint(images * 255)
            if np.abs(levels - images * 255).max() > 1e-3:
                raise InputError(
                    "the file reads bytes, and these images are not multiples of 1/255: give them as uint8"
                )
            images = levels.astype(np.uint8)
        elif not self._bytes:
            images = images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
        return np.ascontiguousarray(images)

    def run(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Scores `[N, classes]` of prepared images, in calls of one batch size (the file's own where it is fixed)."""
        batch = self.batch or batch
        index = np.arange(-(-len(images) // batch) * batch) % len(images)
        calls = [
            self._session.run(None, {self.node.name: images[at]})[0] for at in np.split(index, len(index) // batch)
        ]
        scores: np.ndarray = np.concatenate(calls)[: len(images)]
        return scores

    def milliseconds(self, images: np.ndarray, calls: int) -> np.ndarray:
        """Time of each of so many calls: single images, or one batch where that is fixed."""
        size = self.batch or 1
        seconds = []
        for call in range(calls + 10):
            one = np.take(images, range(call * size, (call + 1) * size), axis=0, mode="wrap")
            began = time.perf_counter()
            self._session.run(None, {self.node.name: one})
            seconds.append(time.perf_counter() - began)
        return 1000 * np.array(seconds[10:])  # the first calls lay out the memory


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz file; arrays of Python objects, which could run code, are refused.

    Raises:
        InputError: There is none, or it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:  # a single array has no .files
        raise InputError(f"{path} cannot be read as an .npz file ({str(error).splitlines()[0]})") from error


def agreement(scores: np.ndarray, expected: np.ndarray, *, softmax: bool) -> dict[str, Any]:
    """Compare with the logits that were expected.

    Returns:
        `same_class`, a share: classes whose expected logits lie within rounding of each other count as the same; and
        `max_difference`, of logits, or of probabilities where the file gives those; None where one is not finite.

    Raises:
        InputError: They are not of the same shape.
    """
    if scores.shape != expected.shape:
        raise InputError(f"logits of shape {list(expected.shape)} are expected, the file gives {list(scores.shape)}")
    chosen = np.take_along_axis(expected, scores.argmax(1)[:, None], 1)[:, 0]
    same = expected.max(1) - chosen <= _TIE * max(np.abs(expected).max(), 1e-6)
    if softmax:
        powers = np.exp(expected - expected.max(1, keepdims=True))
        expected = powers / powers.sum(1, keepdims=True)
    furthest = float(np.abs(scores - expected).max())
    return {"same_class": float(same.mean()), "max_difference": furthest if np.isfinite(furthest) else None}


def check(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run everything that was asked for; `passed` says whether all of it was as it should be.

    Raises:
        InputError: The file, the images or what is expected of them do not fit together.
    """
    deployed = Deployed(chosen.model, chosen.threads)
    arrays = read_arrays(chosen.expect) if chosen.expect else {}
    if chosen.expect and "logits" not in arrays:
        raise InputError(f"{chosen.expect} holds {', '.join(arrays) or 'nothing'}, and no logits")
    if chosen.images:
        arrays.pop("labels", None)  # they belong to other images
        arrays |= read_arrays(chosen.images)
    if "images" not in arrays:
        if chosen.images or chosen.expect:
            raise InputError(f"{chosen.images or chosen.expect} holds no images; give them with --images")
        size = deployed.image_size()
        arrays["images"] = np.random.default_rng(0).integers(0, 256, (_RANDOM, *size, 3), dtype=np.uint8)
    images = deployed.prepare(arrays["images"])
    labels = arrays.get("labels")
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{len(images)} images and labels of shape {list(labels.shape)}: one for each is needed")
    if labels is None and chosen.min_accuracy is not None:
        raise InputError("--min-accuracy needs labels beside the images")
    scores = deployed.run(images, chosen.batch)
    times = deployed.milliseconds(images, chosen.calls)
    said: dict[str, Any] = {
        "model": chosen.model.name,
        "metadata": deployed.facts,
        "images": len(images),
        "finite": bool(np.isfinite(scores).all()),
        "accuracy": None if labels is None else float((scores.argmax(1) == labels).mean()),
        "latency": {
            "batch": deployed.batch or 1,
            "threads": chosen.threads,
            "p50_ms": float(np.percentile(times, 50)),
            "p95_ms": float(np.percentile(times, 95)),
        },
        "agreement": None,
    }
    if chosen.expect:
        said["agreement"] = agreement(scores, arrays["logits"], softmax=deployed.gives_probabilities)
    said["passed"] = (
        said["finite"]
        and (said["agreement"] is None or said["agreement"]["same_class"] == 1)
        and (chosen.min_accuracy is None or said["accuracy"] >= chosen.min_accuracy)
    )
    return said


def main() -> int:
    """Check and report; 0 where all is well, 1 where the file fails, 2 where it could not be checked."""
    parser = argparse.ArgumentParser(
        description="Check a deployed ONNX file with onnxruntime and numpy alone.",
        epilog="example: python verify_onnx.py model.onnx --expect expected.npz; "
        "exit status: 0 all is well, 1 the file fails, 2 it could not be checked",
    )
    parser.add_argument("model", type=Path, help="ONNX file that export_onnx() wrote")
    parser.add_argument("--images", type=Path, metavar="NPZ", help="images, and labels if known (default: random ones)")
    parser.add_argument("--expect", type=Path, metavar="NPZ", help="logits to agree with; may hold the images as well")
    parser.add_argument("--min-accuracy", type=float, metavar="SHARE", help="fail below this, such as 0.9")
    parser.add_argument("--batch", type=int, default=64, help="images in a call (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="calls that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    chosen = parser.parse_args()
    for name in ("batch", "calls", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        said = check(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(said, indent=1) if chosen.json else as_text(said))
    return 0 if said["passed"] else 1


def as_text(said: dict[str, Any]) -> str:
    """The report as lines."""
    time_, agreed, accuracy = said["latency"], said["agreement"], said["accuracy"]
    lines = [f"{said['model']}  {said['images']} images"]
    lines += [
        f"  {key:<20} {value if len(value) < 90 else value[:87] + '...'}"
        for key, value in sorted(said["metadata"].items())
    ]
    if not said["finite"]:
        lines.append("scores     some are not finite")
    lines.append("accuracy   " + ("no labels" if accuracy is None else f"{100 * accuracy:.2f} %"))
    lines.append(
        f"latency    p50 {time_['p50_ms']:.3f} ms, p95 {time_['p95_ms']:.3f} ms "
        f"(batch {time_['batch']}, threads {time_['threads']})"
    )
    if agreed is not None:
        furthest = agreed["max_difference"]
        lines.append(
            f"agreement  {100 * agreed['same_class']:.2f} % get the expected class; "
            f"largest difference {'not finite' if furthest is None else f'{furthest:.2e}'}"
        )
    return "\n".join([*lines, "passed" if said["passed"] else "FAILED"])


if __name__ == "__main__":
    raise SystemExit(main())
