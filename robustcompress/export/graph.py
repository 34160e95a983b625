"""From a torch module to an ONNX graph through torch's dynamo exporter, and what that exporter fails to say.

It splits a file in two unless told otherwise, leaves another opset than asked for, and freezes a dynamic batch
dimension when `forward()` reads it as a number, all without an error; and it writes the source paths of every layer
into the nodes. Each of these is read back here.

It also folds constants and batch norms (onnxscript's optimiser). onnxruntime's own offline optimisation is not run on
top: its portable level removes no further node, and what the levels above write runs on the same kind of CPU alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robustcompress.errors import InputError, Problems, first_line
from robustcompress.export.ends import INPUT, LOGITS, Ends
from robustcompress.export.quiet import quiet

_EXAMPLE_BATCH = 2  # torch.export takes a size of 1 or 0 for a constant


def to_proto(
    model: nn.Module, image_shape: tuple[int, int, int], *, opset: int, batch: Literal["dynamic"] | int
) -> Any:
    """Translate a network.

    Args:
        model: On the CPU, float32, eval mode; its caller owns it.
        image_shape: (C, H, W).
        opset: The operator set to write.
        batch: "dynamic" or a fixed size.

    Returns:
        An `onnx.ModelProto` without traces of the machine.

    Raises:
        InputError: The exporter cannot translate the network, or has written something else than was asked for.
    """
    example = torch.full((_EXAMPLE_BATCH if batch == "dynamic" else batch, *image_shape), 0.5)
    dynamic = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[INPUT],
                output_names=[LOGITS],
                opset_version=opset,
                dynamic_shapes=dynamic,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
    except Exception as error:  # the exporter wraps whatever its many parts raise
        raise InputError(
            f"torch's ONNX exporter cannot translate {type(model).__name__}: {_reason(error)}; rewrite that part of "
            "forward() without control flow that depends on values"
        ) from error
    strip(proto)
    return proto


def check_proto(
    proto: Any,
    image_shape: tuple[int, int, int],
    *,
    opset: int,
    batch: Literal["dynamic"] | int,
    ends: Ends | None = None,
    path: Path | None = None,
) -> None:
    """Check that a graph is what was asked for.

    Args:
        proto: The graph as it was read back.
        image_shape: (C, H, W).
        opset: As asked for.
        batch: As asked for.
        ends: What stands around the network; nothing where None.
        path: Where the file lies whose weights are in another one; None for a file that shall hold its own.

    Raises:
        InputError: Another opset, a frozen or a second dynamic dimension, other names, external data, or a graph that
            ONNX's own checker refuses.
    """
    import onnx

    problems = _differences(proto, image_shape, opset=opset, batch=batch, ends=ends or Ends())
    if path is None and any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
        problems.add("weights in external files, which were not asked for")
    try:
        onnx.checker.check_model(proto if path is None else str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        problems.add(f"ONNX's checker refuses the graph: {first_line(error)}")
    problems.raise_if_any()


def check_network(
    proto: Any, image_shape: tuple[int, int, int], *, opset: int, batch: Literal["dynamic"] | int
) -> None:
    """Check what the exporter gave, before anything is put around it that would hide its shapes; as `check_proto`."""
    _differences(proto, image_shape, opset=opset, batch=batch, ends=Ends()).raise_if_any()


def _differences(
    proto: Any, image_shape: tuple[int, int, int], *, opset: int, batch: Literal["dynamic"] | int, ends: Ends
) -> Problems:
    import onnx

    problems = Problems("the exporter wrote something else than was asked for")
    found = opset_of(proto)
    if found != opset:
        problems.add(f"opset {found} in place of {opset}; ask for opset={found}")
    names = [[value.name for value in values] for values in (proto.graph.input, proto.graph.output)]
    if names != [[INPUT], [ends.output]]:
        wanted_names = f"{INPUT!r} and {ends.output!r}"
        problems.add(f"inputs and outputs {names} in place of {wanted_names}; the model must map one to one")
    else:
        wanted = ends.input_shape("batch" if batch == "dynamic" else batch, image_shape)
        shape, scores = (_shape(values[0]) for values in (proto.graph.input, proto.graph.output))
        if shape[:1] != wanted[:1] or scores[:1] != wanted[:1]:
            problems.add(
                f"batch dimension {shape[0]} at the input and {scores[0]} at the output in place of {wanted[0]}; "
                "forward() must not read the batch size as a number (no int(x.shape[0]), no reshape(2, -1)); "
                "use torch.flatten(x, 1), or export with a fixed batch=..."
            )
        if shape[1:] != wanted[1:]:
            problems.add(f"images of shape {shape[1:]} in place of {wanted[1:]}")
        kind = proto.graph.input[0].type.tensor_type.elem_type
        if kind != (onnx.TensorProto.UINT8 if ends.input == "uint8" else onnx.TensorProto.FLOAT):
            problems.add(f"images of ONNX's type {kind} in place of {ends.input}")
    return problems


def count_zeros(proto: Any) -> tuple[int, int]:
    """Entries of the graph's matrices and kernels, floats and int8, and how many of them are zero."""
    import numpy
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8)
    kernels = [t for t in proto.graph.initializer if len(t.dims) > 1 and t.data_type in kinds]
    arrays = [numpy_helper.to_array(tensor) for tensor in kernels]
    return sum(a.size for a in arrays), sum(a.size - int(numpy.count_nonzero(a)) for a in arrays)


def opset_of(proto: Any) -> int:
    """The version of ONNX's own operator set that a graph uses; 0 where it names none."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def strip(proto: Any) -> None:
    """Remove the exporter's notes from every part of a graph: they hold source paths, and a third of a small file."""
    parts = [proto, *proto.functions]
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        parts += [graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node]
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
    for function in proto.functions:
        parts += [*function.node, *function.value_info]
    for part in parts:
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _shape(value: Any) -> tuple[str | int, ...]:
    return tuple(d.dim_param or int(d.dim_value) for d in value.type.tensor_type.shape.dim)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 200).rstrip(". ")
