"""Write the ONNX file of a saved result.

Example:
    python export/to_onnx.py runs/quickstart/grape -o grape.onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path

import robustcompress
from robustcompress.errors import RobustCompressError
from robustcompress.export import export_onnx


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, export, print what was checked; 1 when it could not be done."""
    parser = argparse.ArgumentParser(
        description="Write the ONNX file of a saved result, verified against the model.",
        epilog="example: python export/to_onnx.py runs/quickstart/grape -o grape.onnx",
    )
    parser.add_argument("result", type=Path, help="directory that CompressResult.save() or the command line wrote")
    parser.add_argument("-o", "--output", type=Path, help="the ONNX file (default: RESULT/model.onnx)")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    chosen = parser.parse_args(arguments)
    output = chosen.output or chosen.result / "model.onnx"
    try:
        result = robustcompress.load(chosen.result)
        print(export_onnx(result, output, opset=chosen.opset, overwrite=chosen.overwrite))
    except RobustCompressError as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
