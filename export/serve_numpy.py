"""Classify image files with an exported model. Needs onnxruntime, numpy and pillow; no torch.

Example:
    python serve_numpy.py model.onnx cat.jpg dog.png --top 3
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Classifier:
    """One exported file: floats in NCHW or bytes in NHWC to logits or probabilities, as it says of itself.

    Args:
        path: ONNX file that `export_onnx()` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        stored = self._session.get_modelmeta().custom_metadata_map
        self._facts = {key.removeprefix("robustcompress."): value for key, value in stored.items()}
        self.classes: list[str] | None = json.loads(self._facts.get("classes", "null"))

    def __call__(self, path: Path) -> np.ndarray:
        """Return the probabilities of one image file, `[classes]`."""
        node = self._session.get_inputs()[0]
        nhwc = self._facts.get("layout") == "NHWC"
        batch, height, width = node.shape[:3] if nhwc else (node.shape[0], *node.shape[2:])
        with Image.open(path) as file:
            # Grey images become three equal channels, as in training; the graph itself normalises.
            image = ImageOps.exif_transpose(file).convert("RGB")
        if isinstance(height, int):  # else the graph resizes
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)[None]
        if not nhwc:
            pixels = pixels.transpose(0, 3, 1, 2)
        if node.type != "tensor(uint8)":
            kind = np.float16 if node.type == "tensor(float16)" else np.float32
            pixels = (pixels / np.float32(255)).astype(kind)
        if isinstance(batch, int):  # a file of fixed batch
            pixels = pixels.repeat(batch, 0)
        scores: np.ndarray = self._session.run(None, {node.name: pixels})[0][0].astype(np.float32)
        return scores if self._facts.get("output") == "probabilities" else softmax(scores)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits `[classes]` into probabilities."""
    powers: np.ndarray = np.exp(logits - logits.max())
    return powers / powers.sum()


def main() -> int:
    """Print, for each image, the most probable classes; 1 where a file is missing or cannot be read."""
    parser = argparse.ArgumentParser(
        description="Classify image files with an exported model.",
        epilog="example: python serve_numpy.py model.onnx cat.jpg dog.png --top 3",
    )
    parser.add_argument("model", type=Path, help="ONNX file that export_onnx() wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=1, help="classes to print for each image (default: %(default)s)")
    chosen = parser.parse_args()
    for path in (chosen.model, *chosen.images):
        if not path.is_file():
            print(f"error: {path} does not exist", file=sys.stderr)
            return 1
    try:
        classify = Classifier(chosen.model)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        print(f"error: {chosen.model} cannot be opened ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    for path in chosen.images:
        try:
            shares = classify(path)
        except OSError as error:  # pillow's own errors are OSErrors
            print(f"error: {path} cannot be read ({error})", file=sys.stderr)
            return 1
        best = np.argsort(-shares, kind="stable")[: chosen.top]
        names = classify.classes
        print(path.name, *(f"{names[k] if names else k} {shares[k]:.3f}" for k in best), sep="  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
