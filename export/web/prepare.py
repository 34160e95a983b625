"""Put models and sample pictures beside the page.

Example:
    python export/web/prepare.py runs/quickstart/none runs/quickstart/grape
    python -m http.server -d export/web 8000
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import robustcompress
from robustcompress.commands.arguments import add_data_arguments, data_of
from robustcompress.data import Images
from robustcompress.errors import InputError, RobustCompressError
from robustcompress.export import export_onnx

PAGE = Path(__file__).parent
_EPS = 8 / 255


def main(arguments: list[str] | None = None) -> int:
    """Export every result, write one test image of each class, and the list of both; 1 when it could not be done."""
    parser = argparse.ArgumentParser(
        description="Put models and sample pictures beside the page.",
        epilog="example: python export/web/prepare.py runs/quickstart/none runs/quickstart/grape",
    )
    parser.add_argument("results", type=Path, nargs="+", help="directories that CompressResult.save() wrote")
    parser.add_argument("--out", type=Path, default=PAGE / "demo", help="directory (default: demo/ beside the page)")
    parser.add_argument("--count", type=int, default=10, help="sample pictures (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory")
    add_data_arguments(parser, default="the embedded digits, for results that were trained on them; else no samples")
    chosen = parser.parse_args(arguments)
    try:
        prepare(chosen)
    except RobustCompressError as error:
        print(f"error: {error}")
        return 1
    print(f"{chosen.out}: {len(chosen.results)} models; serve the page: python -m http.server -d {PAGE}")
    return 0


def prepare(chosen: argparse.Namespace) -> None:
    """Write the directory, whole or not at all.

    Raises:
        InputError: It exists, or the results read other images or classes than each other.
        ResultError: There is no such result.
    """
    if chosen.out.exists() and not chosen.overwrite:
        raise InputError(f"{chosen.out} exists; pass --overwrite, or choose another with --out")
    if chosen.out.exists() and not (chosen.out / "demo.json").is_file():
        raise InputError(f"{chosen.out} is not what this script wrote, and is not replaced; choose another with --out")
    if not chosen.out.parent.is_dir():
        raise InputError(f"{chosen.out.parent} is no directory; make it first")
    results = [robustcompress.load(path) for path in chosen.results]
    if len({(result.classes, result.image_shape) for result in results}) > 1:
        raise InputError("these results read other images or other classes than each other; give those of one data set")
    data = data_of(results[0], chosen)
    draft = Path(tempfile.mkdtemp(prefix=".demo-", dir=chosen.out.parent))
    try:
        models: list[dict[str, object]] = []
        for path, result in zip(chosen.results, results, strict=True):
            file = f"{len(models)}-{path.name}.onnx"
            export_onnx(result, draft / file)  # compared with the model before it is put in place
            eps = result.threat.eps if result.threat is not None and result.threat.norm == "linf" else _EPS
            models.append({"name": path.name, "file": file, "classes": result.classes, "eps": eps})
        samples = [] if data is None else write_samples(draft, data.test, data.classes, chosen.count)
        (draft / "demo.json").write_text(json.dumps({"models": models, "samples": samples}, indent=1), encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp lets nobody else in, not even a server
        if chosen.out.exists():
            shutil.rmtree(chosen.out)
        draft.rename(chosen.out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_samples(folder: Path, images: Images, classes: Sequence[str], count: int) -> list[dict[str, str]]:
    """Write the first image of each class, at most `count`; return file and label of each."""
    written = []
    labels = images.labels.tolist()
    for label in images.classes_present[:count]:
        pixels = images.pixels[labels.index(label)].permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{label}.png")
        written.append({"file": f"{label}.png", "label": classes[label]})
    return written


if __name__ == "__main__":
    raise SystemExit(main())
