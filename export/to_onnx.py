"""Write the ONNX file of a saved result, and beside it what the file is expected to say.

Example:
    python export/to_onnx.py runs/quickstart/grape -o grape.onnx --expect expected.npz
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

import robustcompress
from robustcompress.commands.arguments import add_data_arguments, data_of
from robustcompress.data import Images
from robustcompress.errors import InputError, RobustCompressError
from robustcompress.export import export_onnx


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, export, print what was checked; 1 when it could not be done."""
    parser = argparse.ArgumentParser(
        description="Write the ONNX file of a saved result, verified against the model.",
        epilog="example: python export/to_onnx.py runs/quickstart/grape -o grape.onnx --expect expected.npz",
    )
    parser.add_argument("result", type=Path, help="directory that CompressResult.save() or the command line wrote")
    parser.add_argument("-o", "--output", type=Path, help="the ONNX file (default: RESULT/model.onnx)")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--expect",
        type=Path,
        metavar="NPZ",
        help="also write test images, labels and torch's logits: for verify_onnx.py",
    )
    parser.add_argument("--count", type=int, default=100, help="images in that file (default: %(default)s)")
    add_data_arguments(parser, default="the embedded digits, for a result that was trained on them; else random images")
    chosen = parser.parse_args(arguments)
    output = chosen.output or chosen.result / "model.onnx"
    try:
        result = robustcompress.load(chosen.result)
        images = None
        if chosen.expect is not None:
            check_target(chosen.expect, overwrite=chosen.overwrite)
            data = data_of(result, chosen)
            images = random_images(result, chosen.count) if data is None else data.test.first(chosen.count)
        print(export_onnx(result, output, opset=chosen.opset, overwrite=chosen.overwrite))
        if images is not None:
            write_expected(chosen.expect, result.model, images, labelled=data is not None)
            print(f"{chosen.expect}  {len(images)} {'random' if data is None else 'test'} images and torch's logits")
    except RobustCompressError as error:
        print(f"error: {error}")
        return 1
    return 0


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that could not be written in the end.

    Raises:
        InputError: It exists, or its directory does not.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another file, or pass --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no directory; make it first")


def random_images(result: robustcompress.CompressResult, count: int) -> Images:
    """Images of noise: they tell whether two files agree, and nothing about accuracy."""
    pixels = torch.randint(256, (count, *result.image_shape), generator=torch.Generator().manual_seed(0))
    return Images(pixels.to(torch.uint8), torch.zeros(count, dtype=torch.int64))


@torch.no_grad()
def write_expected(path: Path, model: torch.nn.Module, images: Images, *, labelled: bool) -> None:
    """Write `images` (uint8 `[N, 3, H, W]`), torch's `logits` `[N, K]` and, where known, `labels` `[N]`."""
    logits = torch.cat([model(part) for part in images.as_float().split(64)])
    arrays = {"images": images.pixels.numpy(), "logits": logits.numpy()}
    if labelled:
        arrays["labels"] = images.labels.numpy()
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(draft, path)  # noqa: PTH105
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
