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


def read_image(path: Path, shape: list[int | str], layout: str, kind: str) -> np.ndarray:
    """Read one image as the file wants it: `[3, H, W]` floats in [0, 1], or `[H, W, 3]` bytes.

    Short side resized and centre cropped, unless the file leaves height and width free and does so itself.
    """
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    with Image.open(path) as image:
        # Grey images become three equal channels, as in training; the graph itself normalises.
        picture = image.convert("RGB")
    if isinstance(height, int) and isinstance(width, int):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    if kind != "tensor(uint8)":
        pixels = (pixels / np.float32(255)).astype(np.float16 if kind == "tensor(float16)" else np.float32)
    return pixels.transpose(2, 0, 1) if layout == "NCHW" else pixels


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
    first, metadata = session.get_inputs()[0], session.get_modelmeta().custom_metadata_map
    layout = metadata.get("robustcompress.layout", "NCHW")
    classes = json.loads(metadata.get("robustcompress.classes", "null"))
    try:
        images = [read_image(path, first.shape, layout, first.type) for path in chosen.images]
    except OSError as error:  # pillow's own errors are OSErrors that name the file
        print(f"error: an image cannot be read ({error})", file=sys.stderr)
        return 1
    # One call an image: they may differ in size. A file of fixed batch gets the image that many times.
    repeat = first.shape[0] if isinstance(first.shape[0], int) else 1
    scores = [session.run(None, {first.name: np.stack([image] * repeat)})[0][:1] for image in images]
    answers = np.concatenate(scores).astype(np.float32)
    if metadata.get("robustcompress.output") != "probabilities":
        answers = probabilities(answers)
    for path, shares in zip(chosen.images, answers, strict=True):
        best = np.argsort(-shares, kind="stable")[: chosen.top]
        print(path.name, *(f"{classes[k] if classes else k} {shares[k]:.3f}" for k in best), sep="  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
