"""One ONNX file, or a pair, on disk: written aside, and put in place so that whoever reads finds it whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError
from robustcompress.export.request import temporary

_INLINE = 1024  # bytes: smaller tensors stay in the .onnx file, where whoever reads the graph can see them


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Give a path to write a file of the same name to; what is there at the end of the block is removed.

    Args:
        path: Where the file shall be put in the end, by `put_in_place`.

    Raises:
        InputError: The directory cannot be written to, or is full.
    """
    folder = temporary(path)
    try:
        folder.mkdir(exist_ok=True)  # one may be left of a process of the same number that was killed
        yield folder / path.name
    except OSError as error:
        if error.strerror is None:
            raise
        raise InputError(f"{path} cannot be written ({error.strerror}); free some space, or choose another") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_proto(proto: Any, draft: Path, *, external_data: bool) -> None:
    """Write a graph, with its weights in the same file or in a second one beside it.

    The second file is named after its content, so that it never takes the place of one that another graph reads.

    Args:
        proto: An `onnx.ModelProto`; with `external_data`, its weights are moved out of it.
        draft: The file.
        external_data: Whether to write a second file.
    """
    import onnx

    if not external_data:
        draft.write_bytes(proto.SerializeToString())
        return
    digest = hashlib.sha256()
    for tensor in proto.graph.initializer:
        digest.update(tensor.name.encode() + tensor.raw_data)
    location = f"{draft.name}.{digest.hexdigest()[:12]}.data"
    onnx.save_model(
        proto,
        str(draft),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=location,
        size_threshold=_INLINE,
    )


def data_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of an ONNX file, as far as they lie beside it; none for a file on its own.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no ONNX file.
    """
    import onnx

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's own, which has no public home
        raise ValueError(f"{path} is no ONNX file") from error
    outside = (t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    names = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    return tuple(path.parent / name for name in sorted(names) if Path(name).name == name)


def put_in_place(draft: Path, path: Path) -> tuple[Path, ...]:
    """Rename a draft, and before it what it reads, so that `path` is always the old file or the new one, and whole.

    Args:
        draft: What was written and checked.
        path: Where it goes. Weights that only the file in its place read are removed.

    Returns:
        The files with weights beside `path`.
    """
    try:
        before = data_files(path) if path.exists() else ()
    except (OSError, ValueError):  # whatever is there is replaced, and nothing is known of it
        before = ()
    data = [path.parent / file.name for file in data_files(draft)]
    fresh = [file for file in data if not file.exists()]
    try:
        for file in data:
            os.replace(draft.parent / file.name, file)  # noqa: PTH105
        os.replace(draft, path)  # noqa: PTH105
    except BaseException:
        for file in fresh:
            file.unlink(missing_ok=True)
        raise
    for file in before:
        if (
            file not in data and file.name.startswith(f"{path.name}.") and file.suffix == ".data"
        ):  # named by write_proto
            file.unlink(missing_ok=True)
    return tuple(data)
