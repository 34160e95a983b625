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


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """Read one image as float32 `[3, height, width]` in [0, 1]: short side resized, centre cropped."""
    with Image.open(path) as image:
        # Grey images become three equal channels, as in training; the graph itself normalises.
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
    pixels: np.ndarray = np.asarray(fitted, dtype=np.float32).transpose(2, 0, 1)
    return pixels / np.float32(255)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def main() -> int:
    """Print, for each image, the most probable classes."""
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
    session = onnxruntime.InferenceSession(str(chosen.model), providers=["CPUExecutionProvider"])
    batch, _, height, width = session.get_inputs()[0].shape
    metadata = session.get_modelmeta().custom_metadata_map
    classes = json.loads(metadata.get("robustcompress.classes", "null"))
    try:
        images = np.stack([read_image(path, height, width) for path in chosen.images])
    except OSError as error:  # pillow's own errors are OSErrors that name the file
        print(f"error: an image cannot be read ({error})", file=sys.stderr)
        return 1
    if isinstance(batch, int):  # a file of fixed batch: fill each call up with the first image
        images = np.concatenate([images, np.repeat(images[:1], -len(images) % batch, axis=0)])
    step = batch if isinstance(batch, int) else 64
    calls = [session.run(["logits"], {"images": images[i : i + step]})[0] for i in range(0, len(images), step)]
    for path, shares in zip(chosen.images, probabilities(np.concatenate(calls)), strict=False):
        best = np.argsort(-shares, kind="stable")[: chosen.top]
        print(path.name, *(f"{classes[k] if classes else k} {shares[k]:.3f}" for k in best), sep="  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
