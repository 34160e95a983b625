"""Images that stay on the disk: how fast they are decoded, by threads and by processes, and what memory they take.

Photographs-to-be (smooth noise, 500x375, JPEG of about 80 KB) are written as files and as tar shards, and iterated over
as training does: random crops at 224x224, batches of 64, nothing else at work.
  threads      `Batches` over what `load_data(stream=True)` returned, 1, 2 and 4 threads, from files and from shards
  processes    torch's DataLoader with 1, 2 and 4 worker processes that call the same decoder; "first batch" is the time
               until it is there, which each pass, each look at a few batches and each resumed run pays
  memory       peak of a fresh process beyond what it began with, after two passes over the images, a quarter of them
               and all; and with the images resident
Times are medians of --rounds passes that take turns. The files are in the system's cache: no disk is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import (
    add_out,
    in_fresh_process,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    threads,
    write_json,
)
from benchmarks.trace_memory import begin_peak, status
from robustcompress import load_data
from robustcompress.data import Batches
from robustcompress.data.crops import draw_crops
from robustcompress.data.decoding import cropped
from robustcompress.data.folder import folder_source
from robustcompress.data.shards import shard_source
from robustcompress.data.streaming import streams
from robustcompress.errors import Problems

MODULE = "streaming"
SIZE, BATCH, CLASSES = 224, 64, 4
WORKERS = (1, 2, 4)
WAYS = ("on the disk, a quarter", "on the disk, all", "in memory, all")
Pass = Callable[[], Iterator[Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.child is not None:
        print(json.dumps(peak(Path(options.child[0]), options.child[1])))
        return 0
    path = out_path(options, MODULE)
    count, rounds = (48, 1) if options.quick else (options.images, options.rounds)
    workers = (1, 2) if options.quick else WORKERS
    with threads(options.threads), tempfile.TemporaryDirectory() as place:
        folder, shards = write_images(Path(place), count, options.seed)
        listed = {}
        for name, source in (("files", folder), ("shards", shards)):
            begun = time.perf_counter()
            read = folder_source if name == "files" else shard_source
            streams(read(source, Problems("cannot list"), image_size=SIZE), True, 2)
            listed[name] = (time.perf_counter() - begun) / count
        ways = {
            f"threads, {name}, {n}": threaded(source, n) for name, source in _places(folder, shards) for n in workers
        }
        ways |= {f"processes, files, {n}": forked(folder, n) for n in workers}
        rows = speeds(ways, rounds)
        memory = {way: child(folder, way) for way in WAYS}
    results = {
        "images": count,
        "speed": rows,
        "listing_s_per_image": listed,
        "memory": memory,
        "batch_bytes": BATCH * 3 * SIZE * SIZE,
    }
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def _places(folder: Path, shards: Path) -> tuple[tuple[str, Path], ...]:
    return ("files", folder), ("shards", shards)


def write_images(place: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Write the images as files and as shards; a few of each class are for tests."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    folder, shards = place / "files", place / "shards"
    shards.mkdir(parents=True)
    for split, images in (("train", count), ("test", 2 * CLASSES)):
        with tarfile.open(shards / f"{split}-000000.tar", "w") as archive:
            for number in range(images):
                coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
                noisy = smooth + draw.normal(0, 12, smooth.shape)
                encoded = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
                file = folder / split / str(number % CLASSES) / f"{number:06d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded.getvalue())
                for name, content in ((".jpg", encoded.getvalue()), (".cls", str(number % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{number:06d}{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder, shards


def batches(source: Path, workers: int, *, stream: bool = True, limit: int | None = None) -> Batches:
    """What training would iterate over."""
    data = load_data(
        source,
        image_size=SIZE,
        stream=stream,
        workers=workers,
        test_limit=CLASSES,
        train_limit=limit,
        val_fraction=0.05,
    )
    generator = torch.Generator().manual_seed(0)
    size = min(BATCH, len(data.train))
    return Batches(data.train, size, augment="resized-crop", generator=generator, drop_last=True, channels_last=False)


def threaded(source: Path, workers: int) -> Pass:
    """Passes over images that threads decode."""
    loader = batches(source, workers)
    return lambda: (x for x, _ in loader)


class Decoding(Dataset[Tensor]):
    """The same files through the same decoder, one at a time, for torch's own loader."""

    def __init__(self, source: Path) -> None:
        self.paths = sorted(source.glob("train/*/*.jpg"))
        self.drawn = draw_crops(len(self.paths), torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        content = self.paths[index].read_bytes()
        pixels = cropped(content, "image", size=(SIZE, SIZE), drawn=self.drawn[index])
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def forked(source: Path, workers: int) -> Pass:
    """Passes over images that worker processes decode."""
    dataset = Decoding(source)
    size = min(BATCH, len(dataset))

    def one() -> Iterator[Tensor]:
        loader = DataLoader(dataset, size, shuffle=True, num_workers=workers, drop_last=True, prefetch_factor=2)
        for pixels in loader:
            yield pixels.to(torch.float32).div_(255)

    return one


def speeds(ways: Mapping[str, Pass], rounds: int) -> list[dict[str, Any]]:
    """Images a second of whole passes, and seconds until the first batch; the ways take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, one in ways.items():
            begun, first, seen = time.perf_counter(), 0.0, 0
            for x in one():
                first = first or time.perf_counter() - begun
                seen += len(x)
            found[name].append((seen / (time.perf_counter() - begun), first))
    return [
        {
            "way": name,
            "images_per_s": statistics.median(rate for rate, _ in pairs),
            "first_batch_s": statistics.median(first for _, first in pairs),
        }
        for name, pairs in found.items()
    ]


def child(folder: Path, way: str) -> int:
    """Measure the memory of one way in a fresh process, in bytes."""
    return int(in_fresh_process(MODULE, ["--child", str(folder), way], what=way))


def peak(folder: Path, way: str) -> int:
    """Bytes that loading and two passes take at their peak, in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    count = len(list(folder.glob("train/*/*.jpg")))
    list(batches(folder, 2, limit=2 * CLASSES))  # what is imported and kept by the first use is not counted
    before = begin_peak()
    quarter = count // 4 if way.endswith("quarter") else None
    loader = batches(folder, 2, stream=way.startswith("on the disk"), limit=quarter)
    for _ in range(2):
        for _ in loader:
            pass
    return status("VmHWM") - before


def markdown(value: Mapping[str, Any]) -> str:
    """The tables, and where they come from."""
    results = value["results"]
    rows = [(row["way"], f"{row['images_per_s']:.0f}", f"{row['first_batch_s']:.2f}") for row in results["speed"]]
    memory = [(way, f"{size / 1e6:.0f}") for way, size in results["memory"].items()]
    listed = "; ".join(
        f"{1e6 * seconds:.0f} us an image to list {name} and read their headers"
        for name, seconds in results["listing_s_per_image"].items()
    )
    said = f"{results['images']:,} images; a batch of {BATCH} is {results['batch_bytes'] / 1e6:.1f} MB. {listed}."
    parts = (
        table(("decoded by", "images/s", "first batch s"), rows),
        table(("images", "peak MB"), memory),
        said,
        provenance(value),
    )
    return "\n\n".join(parts)


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Speed and memory, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = value["results"]["speed"]
    for kind in dict.fromkeys(row["way"].rpartition(",")[0] for row in rows):
        own = [row for row in rows if row["way"].rpartition(",")[0] == kind]
        left.plot([int(row["way"].split()[-1]) for row in own], [row["images_per_s"] for row in own], "o-", label=kind)
    left.set(xlabel="threads or processes", ylabel="images/s", title="decoding of random crops at 224x224")
    left.set_ylim(bottom=0)
    left.set_xticks(sorted({int(row["way"].split()[-1]) for row in rows}))
    left.legend(fontsize=8)
    memory = value["results"]["memory"]
    right.bar(list(memory), [size / 1e6 for size in memory.values()])
    right.set(ylabel="peak (MB)", title=f"memory over {value['results']['images']:,} images")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.streaming --images 500")
    add_out(parser, MODULE)
    parser.add_argument("--images", type=positive, default=2000, help="training images (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="passes timed of each way (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
