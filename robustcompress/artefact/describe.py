"""What an ONNX file is and says of itself, foreign files too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError, Problems, first_line
from robustcompress.export.files import data_files
from robustcompress.export.graph import count_zeros, opset_of
from robustcompress.export.metadata import PREFIX
from robustcompress.untrusted import parse_json, shown

LONGEST = 1 << 20
"""Characters of what a file says of itself under one key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxDescription:
    """An ONNX file, looked at and not run.

    Attributes:
        path: The file.
        bytes: Its size, with its weights.
        data: Files beside it that hold its weights.
        inputs: Name, type and shape of each, such as "images: uint8 [batch, 32, 32, 3]".
        outputs: The same.
        opset: Version of ONNX's own operators; 0 where it names none.
        domains: Other sets of operators that its nodes come from.
        producer: What wrote it, as it says.
        nodes: How many there are of each type, the most frequent first.
        weights: How many numbers of each type it holds, in matrices, kernels and vectors.
        precision: As its metadata say, else as its weights do.
        zeros: Share of zeros among the entries of its matrices and kernels.
        metadata: What it says under `robustcompress.`, without that prefix; values that are JSON are read.
        foreign: What else it says.
    """

    path: Path
    bytes: int
    data: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    domains: tuple[str, ...]
    producer: str
    nodes: Mapping[str, int]
    weights: Mapping[str, int]
    precision: str
    zeros: float
    metadata: Mapping[str, Any]
    foreign: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Numbers that it holds, whatever their type."""
        return sum(self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """The description as plain JSON."""
        return {**asdict(self), "path": str(self.path), "data": list(self.data), "parameters": self.parameters}


def describe_onnx(path: str | Path) -> OnnxDescription:
    """Read an ONNX file of any origin.

    Raises:
        InputError: It is missing, torn, no ONNX file, or its weights are not beside it.
    """
    import onnx

    path = Path(path)
    problems = Problems("this ONNX file cannot be read")
    if not path.is_file():
        problems.add(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; name an ONNX file")
        problems.raise_if_any()
    try:
        proto = onnx.load(str(path), load_external_data=False)
        whole = bool(proto.graph.output) and bool(proto.opset_import)
    except Exception as error:  # protobuf's own, which has no public home
        raise InputError(f"{path} is torn, or no ONNX file ({first_line(error)}): export it again") from error
    if not whole:  # an empty file, and many a text, is a valid protobuf message
        raise InputError(f"{path} is torn, or no ONNX file (it holds no graph): export it again")
    beside = data_files(path)
    if missing := [file.name for file in beside if not file.is_file()]:
        raise InputError(f"{path} has its weights in {', '.join(missing)}, which is not beside it: copy both files")
    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
        _, zeros = count = count_zeros(proto)
        weights = _weights(proto)
    except Exception as error:  # onnx checks where such files lie, and raises errors of several kinds
        raise InputError(f"the weights of {path} cannot be read ({first_line(error)}): export it again") from error
    said = {shown(text_of(entry.key), 200): shown(text_of(entry.value), LONGEST) for entry in proto.metadata_props}
    metadata = {key.removeprefix(PREFIX): _value(value) for key, value in said.items() if key.startswith(PREFIX)}
    return OnnxDescription(
        path=path,
        bytes=sum(file.stat().st_size for file in (path, *beside)),
        data=tuple(file.name for file in beside),
        inputs=tuple(_signature(value) for value in proto.graph.input if value.name not in _names(proto)),
        outputs=tuple(_signature(value) for value in proto.graph.output),
        opset=opset_of(proto),
        domains=tuple(sorted({shown(text_of(node.domain), 200) for node in proto.graph.node} - {"", "ai.onnx"})),
        producer=shown(f"{text_of(proto.producer_name)} {text_of(proto.producer_version)}".strip(), 200),
        nodes=dict(Counter(shown(text_of(node.op_type), 200) for node in proto.graph.node).most_common()),
        weights=weights,
        precision=str(metadata.get("precision") or _precision(weights)),
        zeros=zeros / max(1, count[0]),
        metadata=metadata,
        foreign={key: value for key, value in said.items() if not key.startswith(PREFIX)},
    )


def text_of(found: str | bytes) -> str:
    """A text of a protobuf message, which gives bytes where it is none."""
    return found if isinstance(found, str) else found.decode("utf-8", "replace")


def _names(proto: Any) -> set[str]:
    """Old files list their weights among the inputs."""
    return {tensor.name for tensor in proto.graph.initializer}


def _weights(proto: Any) -> dict[str, int]:

    import onnx

    counts: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        counts[_type(tensor.data_type)] += math.prod(tensor.dims)
    for node in proto.graph.node:
        if node.op_type == "Constant":
            counts.update(
                {
                    _type(a.t.data_type): math.prod(a.t.dims)
                    for a in node.attribute
                    if a.type == onnx.AttributeProto.TENSOR
                }
            )
    return dict(counts.most_common())


def _precision(weights: Mapping[str, int]) -> str:
    shared = [
        kind for kind in weights if kind in ("float32", "float16", "bfloat16", "float64", "int8", "uint8", "int4")
    ]
    return shared[0] if shared else "unknown"


def _type(number: int) -> str:
    import onnx

    kinds = onnx.TensorProto.DataType
    name = kinds.Name(number).lower() if number in kinds.values() else "unknown"
    return {"float": "float32", "double": "float64"}.get(str(name), str(name))


def _signature(value: Any) -> str:
    tensor = value.type.tensor_type
    dims = (text_of(d.dim_param) or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    return shown(f"{text_of(value.name)}: {_type(tensor.elem_type)} [{', '.join(dims)}]", 200)


def _value(text: str) -> Any:
    """JSON where it is an object or a list; other texts, such as a version or a hash, stay text."""
    if text[:1] not in ("{", "["):
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text
