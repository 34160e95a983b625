"""bench_onnx(): how long files take, in turns, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustcompress import machine
from robustcompress.artefact import bench_child
from robustcompress.artefact.file import OnnxFile, open_onnx
from robustcompress.errors import InputError, Problems, RobustCompressError, nearest

ROUNDS = 10
"""Turns of each file: the ratio is judged turn by turn, so that what else the machine does meets all."""

SPARSE = 0.5
"""Share of zeros from which it is said that they save no time."""

CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One file under one setting.

    Attributes:
        file: Its name.
        threads: Threads within one operator.
        batch: Images a call.
        p50_ms: Median milliseconds of a call.
        p95_ms: What 95 % of the calls do not exceed.
        images_per_s: Images over the whole time spent.
        ratio: Time over that of the first file: median over the turns.
        ratio_low: First quartile of the turns.
        ratio_high: Third quartile.
        calls: How many calls were timed.
        loading_s: Seconds to open the file.
        peak_bytes: Memory of the process at most, onnxruntime and Python included; None where the system does not say.
        added_bytes: What of it came after the imports.
    """

    file: str
    threads: int
    batch: int
    p50_ms: float
    p95_ms: float
    images_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    calls: int
    loading_s: float
    peak_bytes: int | None
    added_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What `bench_onnx` measured.

    Attributes:
        rows: One for each file and setting; the first file is what the others are compared with.
        files: By name: bytes, precision, share of zeros, SHA-256.
        provider: What ran the files.
        seconds: Asked for, for each file and setting.
        made_with: Versions and hardware.
    """

    rows: tuple[BenchRow, ...]
    files: Mapping[str, Mapping[str, Any]]
    provider: str
    seconds: float
    made_with: Mapping[str, Any]

    def cells(self) -> list[tuple[str, ...]]:
        """The cells of the table: see `COLUMNS`."""
        return [
            (
                row.file,
                str(row.threads),
                str(row.batch),
                f"{row.p50_ms:.3f}",
                f"{row.p95_ms:.3f}",
                f"{row.images_per_s:.0f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
                f"{self.files[row.file]['bytes'] / 1e6:.2f}",
            )
            for row in self.rows
        ]

    def notes(self) -> list[str]:
        """What has to be read with the numbers."""
        notes = [
            f"{self.provider}; ratio: time over that of the first file, median and quartiles of {ROUNDS} turns; peak: "
            "the whole process with onnxruntime in it"
        ]
        if any(row.peak_bytes is None for row in self.rows):
            notes.append("this system does not tell a process its peak memory")
        for name, file in self.files.items():
            if file["zeros"] > SPARSE:
                notes.append(
                    f"{name}: {100 * file['zeros']:.0f} % of its weights are zeros, which save no time: onnxruntime "
                    "computes with them as with any number"
                )
        return notes

    def __str__(self) -> str:
        rows = [COLUMNS, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines + self.notes())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            "format": 1,
            "provider": self.provider,
            "seconds": self.seconds,
            "rounds": ROUNDS,
            "files": {name: dict(file) for name, file in self.files.items()},
            "rows": [asdict(row) for row in self.rows],
            "made_with": dict(self.made_with),
        }


COLUMNS = ("file", "threads", "batch", "p50 ms", "p95 ms", "images/s", "ratio", "quartiles", "peak MB", "file MB")


def bench_onnx(
    paths: Sequence[str | Path] | str | Path,
    *,
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    seconds: float = 2.0,
    provider: str = CPU,
) -> BenchReport:
    """Time ONNX files in onnxruntime, in turns, each in a process of its own.

    Args:
        paths: The files; the first is what the others are compared with.
        threads: Threads within one operator; each number is a setting of its own.
        batches: Images a call; likewise.
        seconds: How long each file is timed in each setting, about.
        provider: Of onnxruntime: "CPUExecutionProvider", or its beginning, such as "cuda".

    Returns:
        A row for each file and setting.

    Raises:
        InputError: A file, a number or the provider cannot be used, which is said before any timing; or a file cannot
            be run.
        RobustCompressError: onnxruntime takes another provider than it was asked for.
    """
    problems = Problems("bench cannot start")
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    opened = {_name(path, given): problems.attempt(lambda path=path: open_onnx(path)) for path in given}  # type: ignore[misc]
    if not given:
        problems.add("no file is named: give one at least")
    for key, values in (("threads", threads), ("batches", batches)):
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            problems.add(f"{key}={values!r}: give whole numbers, each at least 1")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 3600:
        problems.add(f"seconds={seconds!r}: give a positive number, below 3600")
    for name, file in opened.items():
        other = [b for b in batches if file is not None and file.batch is not None and b != file.batch]
        if other:
            problems.add(f"{name} takes {file.batch} images a call, not {other[0]}: ask for that, or export it anew")
    chosen = problems.attempt(lambda: resolve_provider(provider))
    problems.raise_if_any()
    rows = [
        row
        for count in threads
        for batch in batches
        for row in _setting(opened, threads=count, batch=batch, seconds=seconds, provider=chosen)
    ]
    return BenchReport(
        rows=tuple(rows),
        files={name: _about(file) for name, file in opened.items()},
        provider=chosen,
        seconds=float(seconds),
        made_with=machine.versions() | machine.hardware(),
    )


def resolve_provider(name: str) -> str:
    """The provider of onnxruntime that a name, or the beginning of one, means.

    Raises:
        InputError: This onnxruntime has none such; those that it has are named.
    """
    import onnxruntime

    available: list[str] = onnxruntime.get_available_providers()
    found = [each for each in available if name and each.lower().startswith(name.lower())]
    if len(found) != 1:
        raise InputError(f"provider {name!r} is not in this onnxruntime{nearest(name, available)}")
    return found[0]


def _setting(
    files: Mapping[str, OnnxFile], *, threads: int, batch: int, seconds: float, provider: str
) -> list[BenchRow]:
    names = list(files)
    blocks: dict[str, list[list[float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(_child(name, file, threads=threads, batch=batch, provider=provider))
            for name, file in files.items()
        }
        for turn in range(ROUNDS):
            for offset in range(len(names)):
                name = names[(turn + offset) % len(names)]  # each turn begins with another one
                blocks[name].append(children[name].ask(seconds / ROUNDS)["calls"])
        ends = {name: child.end() for name, child in children.items()}
    first = [statistics.median(block) for block in blocks[names[0]]]
    rows = []
    for name in names:
        calls = sorted(call for block in blocks[name] for call in block)
        ratios = [statistics.median(block) / base for block, base in zip(blocks[name], first, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        peak, before = ends[name]["peak"], ends[name]["before"]
        rows.append(
            BenchRow(
                file=name,
                threads=threads,
                batch=batch,
                p50_ms=1e3 * statistics.median(calls),
                p95_ms=1e3 * calls[min(len(calls) - 1, int(0.95 * len(calls)))],
                images_per_s=batch * len(calls) / sum(calls),
                ratio=statistics.median(ratios),
                ratio_low=low,
                ratio_high=high,
                calls=len(calls),
                loading_s=children[name].loading_s,
                peak_bytes=peak,
                added_bytes=None if peak is None or before is None else peak - before,
            )
        )
    return rows


class _Child:
    """A process that times one file."""

    def __init__(self, name: str, process: subprocess.Popen[str], provider: str) -> None:
        self._name, self._process = name, process
        ready = self._read()
        self.loading_s = float(ready["loading_s"])
        if ready["provider"] != provider:
            raise RobustCompressError(f"{name}: onnxruntime fell back from {provider} to {ready['provider']}")

    def ask(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines() or ["it ended without a word"]
            raise InputError(f"{self._name} cannot be timed: {said[-1][:300]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def _child(name: str, file: OnnxFile, *, threads: int, batch: int, provider: str) -> Iterator[_Child]:
    channels, height, width = file.image_shape
    shape = [batch, channels, height, width] if file.layout == "NCHW" else [batch, height, width, channels]
    asked = {"file": str(file.path), "threads": threads, "shape": shape, "type": file.input_type, "provider": provider}
    with subprocess.Popen(
        # -P: the modules beside the script are no top-level modules.
        [sys.executable, "-P", str(Path(bench_child.__file__)), json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield _Child(name, process, provider)
        finally:
            process.kill()


def _about(file: OnnxFile) -> dict[str, Any]:
    import onnx

    from robustcompress.export.graph import count_zeros

    entries, zeros = count_zeros(onnx.load(str(file.path)))
    graph = onnx.load(str(file.path), load_external_data=False).graph
    entry = [item for tensor in graph.initializer for item in tensor.external_data]
    beside = {file.path.parent / item.value for item in entry if item.key == "location"}
    return {
        "bytes": sum(path.stat().st_size for path in {file.path, *beside}),
        "precision": file.precision,
        "zeros": zeros / max(1, entries),
        "sha256": file.sha256(),
        "input_type": file.input_type,
        "image_shape": list(file.image_shape),
    }


def _name(path: Path, given: Sequence[Path]) -> str:
    """A file's name, with its directory where several are called so."""
    alike = sum(other.name == path.name for other in given)
    return path.name if alike == 1 else "/".join(path.parts[-2:])
