"""Writing so that a file is there whole or not at all, also after the power has failed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from robustcompress.durable import sync_file
from robustcompress.errors import RobustCompressError


class NotWrittenError(RobustCompressError):
    """The disk did not take a file: it is full, read-only, or gone. What was there before stands."""


def sync_directory(directory: Path) -> None:
    """Have the disk hold the names in a directory, where the system lets one ask for that."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems sync nothing but files
        pass
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; a name with ".part" may be left where the process was killed."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        sync_file(file)
    part.replace(path)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all.

    Returns:
        Its SHA-256.

    Raises:
        OSError: The disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata=metadata)
    except SafetensorError as error:  # as which errors of the disk come
        raise OSError(f"{error} ({part.name})") from error
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    part.replace(path)
    return digest


def reason(error: OSError) -> str:
    """What the system says of it, in a few words."""
    return error.strerror or " ".join(str(error).split())[:150] or type(error).__name__
