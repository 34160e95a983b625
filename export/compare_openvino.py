"""Whether OpenVINO computes from an exported file what onnxruntime computes. It reads the ONNX file itself.

Needs openvino, onnxruntime and numpy.

Example:
    python compare_openvino.py model.onnx --images expected.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino

_TIE = 1e-5  # share of the largest score within which float32 cannot tell two classes apart


def main() -> int:
    """Compare on one batch and on single images; 1 where a class differs, 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(
        description="Compare OpenVINO with onnxruntime on one exported file.",
        epilog="example: python compare_openvino.py model.onnx --images expected.npz; "
        "exit status: 0 the classes are the same, 1 they differ, 2 a file cannot be read",
    )
    parser.add_argument("model", type=Path, help="ONNX file that export_onnx() wrote")
    parser.add_argument(
        "--images", type=Path, metavar="NPZ", help="`images` in the shape the file reads (default: noise)"
    )
    chosen = parser.parse_args()
    try:
        count, same, difference = compare(chosen.model, chosen.images)
    except Exception as error:  # neither library has a base of its own for what it raises
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    versions = f"openvino {openvino.__version__.split('-')[0]} against onnxruntime {onnxruntime.__version__}"
    print(
        f"{versions}, {count} images: {100 * same:.2f} % same class, largest difference {difference:.1e} of the scale"
    )
    return 0 if same == 1 else 1


def compare(model: Path, images: Path | None) -> tuple[int, float, float]:
    """Run both, on all images at once and, where the batch is free, one by one.

    Returns:
        The number of images, the share of them that get the same class both ways, and the largest difference of two
        scores as a share of the largest score.
    """
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    core = openvino.Core()
    # On some processors OpenVINO would otherwise compute in bfloat16, which is not what was verified.
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    node = session.get_inputs()[0]
    batch = read_images(images, node)
    wanted = session.run(None, {node.name: batch})[0]
    ways = [compiled(batch)[0]]
    if not isinstance(node.shape[0], int):
        ways.append(np.concatenate([compiled(one)[0] for one in np.split(batch, len(batch))]))
    scale = float(np.abs(wanted).max())
    same = np.ones(len(batch), bool)
    for found in ways:
        chosen = np.take_along_axis(wanted, found.argmax(1)[:, None], 1)[:, 0]
        same &= wanted.max(1) - chosen <= _TIE * scale
    return len(batch), float(same.mean()), max(float(np.abs(found - wanted).max()) for found in ways) / scale


def read_images(path: Path | None, node: onnxruntime.NodeArg) -> np.ndarray:
    """Images as the file reads them: those of an .npz file, bytes brought to [0, 1] for a file of floats, or noise."""
    floats = node.type == "tensor(float)"
    if path is None:
        shape = [side if isinstance(side, int) else (32 if axis else 16) for axis, side in enumerate(node.shape)]
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    else:
        with np.load(path, allow_pickle=False) as stored:
            images = stored["images"]
    return images.astype(np.float32) / 255 if floats and images.dtype == np.uint8 else images


if __name__ == "__main__":
    raise SystemExit(main())
