"""How a checkpoint lies on the disk: one JSON index, safetensors beside it, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustcompress.checkpoint.small import decode, encode, is_dense
from robustcompress.errors import CheckpointError, InputError

FORMAT = 1
INDEX = "checkpoint.json"
AUTOATTACK = "autoattack"
"""Directory, beside the checkpoint's files, in which finished chunks of AutoAttack are kept."""

SMALL_FILE = 15 * 2**20
"""The largest file of a small checkpoint, in bytes (safetensors' own header included)."""

_HEADER = 2**18
"""Room that is left in every split file for safetensors' header."""

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        record: Everything but the tensors, as plain JSON.
        tensors: By name, on the CPU, laid out as they were.
        small: Whether the tensors were rounded when they were written.
    """

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    small: bool


def write(
    directory: str | Path, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, half: bool = False
) -> None:
    """Write a checkpoint; the one before it stands until the new one does.

    The tensors' files are written first, under new names; then one rename of the index puts them in force.

    Args:
        directory: Made if it does not exist; its parent must.
        record: Plain JSON.
        tensors: By name; shared and non-contiguous tensors may be among them.
        half: The small form: weights in float16, averages and moments as int8 with a scale per row, files of at most
            `SMALL_FILE` bytes (see `small.encode`).
    """
    directory = Path(directory)
    directory.mkdir(exist_ok=True)
    arrays, forms = encode(tensors) if half else ({name: tensor.detach() for name, tensor in tensors.items()}, {})
    number = 1 + max((int(found[1]) for path in directory.iterdir() if (found := _ours(path))), default=0)
    files: list[dict[str, Any]] = []
    entries: dict[str, dict[str, Any]] = {}
    parcel: dict[str, torch.Tensor] = {}
    room = limit = SMALL_FILE - _HEADER if half else None

    def send() -> None:
        nonlocal parcel, room
        name = f"state-{number}-{len(files)}.safetensors"
        files.append({"name": name, "sha256": save_tensors(directory / name, parcel)})
        parcel, room = {}, limit

    for name, tensor in arrays.items():
        flat = _flat(tensor)
        pieces: list[tuple[int, str]] = []
        entries[name] = entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "pieces": pieces}
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride() and is_dense(tensor):
            entry["stride"] = list(tensor.stride())
        start = 0
        while start < len(flat) or not pieces:
            stop = len(flat) if room is None else min(len(flat), start + room // flat.element_size())
            if stop == start and len(flat) > 0:
                send()
                continue
            key = f"{name}@{start}"
            parcel[key] = flat[start:stop].clone() if stop - start < len(flat) else flat
            pieces.append((len(files), key))
            room = None if room is None else room - (stop - start) * flat.element_size()
            start = stop
            if len(flat) == 0:
                break
    send()
    index = {"format": FORMAT, "small": half, "record": record, "files": files, "tensors": entries, "forms": forms}
    part = directory / f"{INDEX}.part"
    with part.open("w") as file:
        json.dump(index, file)
        _sync(file.fileno())
    part.replace(directory / INDEX)
    _forget(directory, {item["name"] for item in files})


def read(directory: str | Path) -> Checkpoint | None:
    """Read the checkpoint in a directory.

    Returns:
        The checkpoint; None where there is none (no directory, or nothing was written to it yet).

    Raises:
        CheckpointError: It is truncated, was tampered with, or is of a newer format.
    """
    directory = Path(directory)
    path = directory / INDEX
    if not path.is_file():
        return None
    remedy = f"remove {directory} to begin anew"
    try:
        index = json.loads(path.read_text())
        version = index["format"]
        if type(version) is int and version > FORMAT:
            raise CheckpointError(
                f"{path} has format {version}; this version reads up to {FORMAT}: upgrade, or {remedy}"
            )
        arrays = _load(directory, index, remedy)
        record, small = dict(index["record"]), index["small"] is True
        return Checkpoint(record=record, tensors=decode(arrays, index["forms"]), small=small)
    except (OSError, *_DAMAGE) as error:
        raise CheckpointError(f"the checkpoint in {directory} is damaged ({error}); {remedy}") from error


def shrink(directory: str | Path, target: str | Path) -> Path:
    """Copy a checkpoint in the small form, to carry it between machines.

    A run that resumes from the copy goes on approximately: weights were rounded to float16, averages and moments to
    int8. SGD's momentum is left out where a selected epoch has to be carried in its place; it comes back within tens of
    steps. Averaged ResNet-18 takes 45 MB.

    Args:
        directory: Holds a checkpoint.
        target: The copy's directory; made if it does not exist. A checkpoint that is there is replaced.

    Returns:
        The target.

    Raises:
        InputError: There is no checkpoint, or the target cannot hold one.
        CheckpointError: The checkpoint is damaged.
    """
    found = read(directory)
    if found is None:
        raise InputError(f"{directory} holds no checkpoint")
    check_directory(Path(target))
    write(target, found.record, found.tensors, half=True)
    return Path(target)


def remove(directory: str | Path) -> None:
    """Remove a checkpoint, and its directory unless that holds anything else."""
    directory = Path(directory)
    (directory / INDEX).unlink(missing_ok=True)
    (directory / f"{INDEX}.part").unlink(missing_ok=True)
    _forget(directory, set())
    shutil.rmtree(directory / AUTOATTACK, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def check_directory(directory: Path, *, also: str = "") -> None:
    """Raise one InputError when a checkpoint cannot be kept in `directory`.

    Args:
        directory: May not exist yet; its parent must.
        also: Regular expression of names that may lie there beside a checkpoint's own.
    """
    if not directory.parent.is_dir():
        raise InputError(f"checkpoint={directory}: there is no directory {directory.parent}; create it first")
    if not directory.exists():
        place = directory.parent
    elif not directory.is_dir():
        raise InputError(f"checkpoint={directory} is a file; name a directory")
    else:
        place = directory
        known = {INDEX, f"{INDEX}.part", AUTOATTACK}
        strange = (path for path in directory.iterdir() if path.name not in known and _ours(path) is None)
        others = sorted(path.name for path in strange if not re.fullmatch(also, path.name))
        if others:
            raise InputError(
                f"checkpoint={directory} also holds {', '.join(others[:5])}: choose a directory for checkpoints alone"
            )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"checkpoint={directory}: {place} cannot be written to; choose another directory")


def _ours(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"state-(\d+)-\d+\.safetensors(?:\.part)?", path.name)


def _forget(directory: Path, keep: set[str]) -> None:
    """Remove the tensors of older checkpoints, and what a kill left half written."""
    if directory.is_dir():
        for path in directory.iterdir():
            if _ours(path) and path.name not in keep:
                path.unlink(missing_ok=True)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values in index order, on the CPU, in storage that is not shared with another tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.clone() if flat.untyped_storage().nbytes() != flat.numel() * flat.element_size() else flat


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all.

    Returns:
        Its SHA-256.
    """
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _sync(file.fileno())
    part.replace(path)
    return digest


def _sync(descriptor: int) -> None:
    """Have the disk hold what was written before a rename relies on it."""
    os.fsync(descriptor)


def _load(directory: Path, index: dict[str, Any], remedy: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    held: list[dict[str, torch.Tensor]] = []
    for item in index["files"]:
        path = directory / Path(item["name"]).name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, which {INDEX} names; {remedy}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != item["sha256"]:
                raise CheckpointError(f"{path} does not match {INDEX}: truncated, or changed; {remedy}")
        try:
            held.append(load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    arrays: dict[str, torch.Tensor] = {}
    for name, entry in index["tensors"].items():
        values = torch.cat([held[number][key] for number, key in entry["pieces"]]).view(entry["shape"])
        if str(values.dtype) != entry["dtype"]:
            raise ValueError(f"{name} holds {values.dtype}, the index says {entry['dtype']}")
        if "stride" in entry:
            values = torch.empty_strided(entry["shape"], entry["stride"], dtype=values.dtype).copy_(values)
        arrays[name] = values
    return arrays
