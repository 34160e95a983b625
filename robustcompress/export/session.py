"""An ONNX file, opened by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustcompress.errors import InputError, Problems, first_line


def load_session(path: str | Path, threads: int | None = None) -> Any:
    """Open an ONNX file with onnxruntime on the CPU.

    Args:
        path: The file.
        threads: Threads within one operator; onnxruntime's own choice where None.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        InputError: There is no such file, it is torn or no ONNX file, or `threads` is not positive.
    """
    import onnxruntime

    path = Path(path)
    problems = Problems("this ONNX file cannot be opened")
    if threads is not None and threads < 1:
        problems.add(f"threads={threads}: must be at least 1, or None for onnxruntime's choice")
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        problems.add(f"{path} {kind}; give a file that export_onnx() wrote")
    problems.raise_if_any()
    try:
        return open_session(str(path), threads)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise InputError(
            f"{path} cannot be opened ({first_line(error)}); it is torn, no ONNX file, or needs a newer onnxruntime "
            f"than {onnxruntime.__version__}: export it again"
        ) from error


def open_session(model: str | bytes, threads: int | None = None) -> Any:
    """Open a file by its path, or a model by its bytes, on the CPU and without a word; onnxruntime's own errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimiser, and go past Python to the terminal
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
