"""Files beside a result: ONNX models, looked into and compared with the network; records of other commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustcompress.artefact.describe import text_of
from robustcompress.errors import ParityError, RobustCompressError, first_line
from robustcompress.export import verify_onnx
from robustcompress.export.metadata import PREFIX
from robustcompress.publish.markup import Html, Part, facts, fold, join, note, plain, section, table, tag
from robustcompress.publish.measured import timed, verified
from robustcompress.publish.reading import pathless, short
from robustcompress.result import DAMAGE, CompressResult
from robustcompress.untrusted import read_json

MOST_FILES, LARGEST_ONNX, LARGEST_JSON = 8, 1 << 30, 1 << 20
KINDS = {".verify.json": "Verification", ".bench.json": "Latency"}
"""What records beside a file are called, by how their names end."""
READERS = {".verify.json": verified, ".bench.json": timed}

TEDIOUS = frozenset(("correct", "indices", "metadata"))
"""Keys of records that hold one entry an image, or what is shown elsewhere."""

DEEPEST, MOST_ROWS, MOST_COLUMNS = 4, 60, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFacts:
    """What an ONNX file is, read without running it.

    Attributes:
        name: Of the file.
        bytes: Its size.
        opset: Operator set.
        nodes: How many operations.
        quantised: Whether it computes with integers.
        inputs: Name, type and shape of each input.
        outputs: The same of each output.
        metadata: What it says about itself, under this package's prefix.
    """

    name: str
    bytes: int
    opset: int
    nodes: int
    quantised: bool
    inputs: str
    outputs: str
    metadata: Mapping[str, str]


def onnx_files(directory: Path | None) -> list[Path]:
    """The ONNX files of a result's directory, by name."""
    found = [] if directory is None else sorted(directory.glob("*.onnx"))
    return [path for path in found if path.is_file() and not path.name.startswith(".")][:MOST_FILES]


def record_files(directory: Path | None) -> list[Path]:
    """Records that other commands left beside a result, by name; of other files a page must not say anything."""
    found = [] if directory is None else sorted(path for ending in KINDS for path in directory.glob(f"*{ending}"))
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def onnx_facts(path: Path) -> OnnxFacts:
    """Look into an ONNX file.

    Raises:
        ValueError: It is too large to look into, or no ONNX file.
    """
    import onnx

    size = path.stat().st_size
    if size > LARGEST_ONNX:
        raise ValueError(f"{size / 1e9:.1f} GB: too large to look into")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # what protobuf raises is no class that onnx names
        raise ValueError(f"no ONNX file ({first_line(error)})") from error
    graph = model.graph
    kinds = {text_of(node.op_type) for node in graph.node}
    return OnnxFacts(
        name=path.name,
        bytes=size,
        opset=max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
        nodes=len(graph.node),
        quantised=any("QuantizeLinear" in kind or "Integer" in kind or kind.startswith("QLinear") for kind in kinds),
        inputs="; ".join(_signature(value) for value in graph.input),
        outputs="; ".join(_signature(value) for value in graph.output),
        metadata={
            entry.key.removeprefix(PREFIX): entry.value
            for entry in model.metadata_props
            if isinstance(entry.key, str) and entry.key.startswith(PREFIX)  # bytes where they are no text
        },
    )


def _signature(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    dims = [plain(dim.dim_param or dim.dim_value or "?", 20) for dim in tensor.shape.dim]
    kinds = onnx.TensorProto.DataType
    kind = kinds.Name(tensor.elem_type).lower() if tensor.elem_type in kinds.values() else "unknown"
    return f"{plain(value.name, 60)}: {kind} [{', '.join(dims)}]"


def artefacts(result: CompressResult, directory: Path | None, sample: torch.Tensor | None) -> Html | None:
    """The section about the files beside a result; None where there are none."""
    models, records = onnx_files(directory), record_files(directory)
    if not models and not records:
        return None
    intro = "What lies beside the result. Records of other commands are shown as those wrote them."
    parts = [_model(result, path, sample) for path in models] + [_record(path) for path in records[:MOST_FILES]]
    return section("files", "Files for deployment", tag("p", intro), *parts)


def _model(result: CompressResult, path: Path, sample: torch.Tensor | None) -> Html:
    head = tag("h3", tag("code", path.name))
    try:
        found = onnx_facts(path)
    except ValueError as error:
        return join([head, note(f"{path.name}: {plain(error)}.", warning=True)])
    said = {
        "size": f"{found.bytes / 1e6:.2f} MB" if found.bytes >= 1e6 else f"{found.bytes / 1e3:.1f} kB",
        "opset": str(found.opset),
        "operations": str(found.nodes),
        "input": found.inputs,
        "output": found.outputs,
        "arithmetic": "quantised to integers" if found.quantised else "floating point",
    }
    rows = [(tag("code", plain(key, 60)), plain(value)) for key, value in sorted(found.metadata.items())[:MOST_ROWS]]
    told = fold("What the file says about itself", table(("key", "value"), rows, text=(0, 1))) if rows else None
    return join([head, facts(said), _parity(result, path, found, sample), _strangeness(result, found), told])


def _parity(result: CompressResult, path: Path, found: OnnxFacts, sample: torch.Tensor | None) -> Html:
    """Compare the file with the network, now; an integer file has other logits by nature."""
    if found.quantised:
        return note(
            "Not compared with the network: its logits are rounded. Look for what was measured of this very file."
        )
    images = torch.rand((14, *result.image_shape), generator=torch.Generator().manual_seed(0))
    name = "random" if sample is None else "clean"
    try:
        checks = verify_onnx(path, result.model, images if sample is None else sample[:14], name=name)
    except ParityError as error:
        return note(f"{path.name}: {plain(error)}", warning=True)
    except (RobustCompressError, *DAMAGE) as error:
        return note(f"Not compared with the network: {plain(error)}")
    rows = [
        (c.name, str(c.batch), str(c.images), f"{c.max_abs_diff:.2e}", f"{c.relative_diff:.1e}", "100 %")
        for c in checks
    ]
    columns = ("images", "batch", "compared", "largest difference", "relative", "same class")
    return table(columns, rows, caption="onnxruntime against torch, compared when this page was written")


def _strangeness(result: CompressResult, found: OnnxFacts) -> Part:
    """Said where a file names other classes than the result does: it then belongs to another network."""
    if (told := found.metadata.get("classes")) is None:
        return None
    try:
        same = json.loads(told) == list(result.classes)
    except (ValueError, RecursionError):
        same = False
    return None if same else note(f"{found.name} names other classes than this result.", warning=True)


def _record(path: Path) -> Html:
    """A record of another command: whatever it holds, as tables."""
    ending = next(ending for ending in KINDS if path.name.endswith(ending))
    head = tag("h3", f"{KINDS[ending]} of {path.name.removesuffix(ending)}: ", tag("code", path.name))
    if path.stat().st_size > LARGEST_JSON:
        return join([head, note("Too large to be shown.")])
    try:
        value = read_json(path, LARGEST_JSON)
    except (OSError, ValueError) as error:
        return join([head, note(f"It cannot be read: {first_line(error)}", warning=True)])
    whole = render_record(pathless(value))
    try:
        told = READERS[ending](pathless(value))
    except DAMAGE:  # of another version, or a stranger's: shown as it is
        return join([head, whole])
    return join([head, told, fold("All of the record", whole)])


def render_record(value: object, depth: int = 0) -> Html:
    """Plain JSON as names and values, lists of like records as tables."""
    if isinstance(value, Mapping) and depth < DEEPEST:
        kept = {plain(key, 60): item for key, item in list(value.items())[:MOST_ROWS] if key not in TEDIOUS}
        flat = {key: short(item) for key, item in kept.items() if not _nested(item)}
        deep = [
            [tag("h4", key), render_record(item, depth + 1)] for key, item in kept.items() if _nested(item) and item
        ]
        return join([facts(flat) if flat else None, deep])
    if isinstance(value, list) and _records(value):
        rows = value[:MOST_ROWS]
        columns = list(dict.fromkeys(key for row in rows for key in row if key not in TEDIOUS))[:MOST_COLUMNS]
        if columns:
            cells = [[short(row.get(key, "-")) for key in columns] for row in rows]
            more = f"{MOST_ROWS} of {len(value)}" if len(value) > MOST_ROWS else None
            return table([plain(key, 40) for key in columns], cells, caption=more, text=range(len(columns)))
    return tag("p", short(value))


def _nested(item: object) -> bool:
    return isinstance(item, Mapping) or (isinstance(item, list) and _records(item))


def _records(items: Sequence[object]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) for item in items)
