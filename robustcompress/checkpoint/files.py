"""How a checkpoint lies on the disk: one JSON index, safetensors beside it, whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustcompress.checkpoint.disk import NotWrittenError, reason, save_tensors, sync_directory, write_text
from robustcompress.checkpoint.small import decode, encode, is_dense
from robustcompress.durable import ground
from robustcompress.errors import CheckpointError, InputError
from robustcompress.lock import NAME as LOCK

FORMAT = 2
"""1 had no checksum of the index, and nothing of the time within an epoch; it is read still."""

INDEX, BEFORE = "checkpoint.json", "checkpoint.before.json"
"""The newest checkpoint's index, and that of the one before it."""

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
        note: Why this is not the newest one; empty where it is.
    """

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    small: bool
    note: str = ""


def write(
    directory: str | Path, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, half: bool = False
) -> None:
    """Write a checkpoint; the one before it is kept beside it, for the case that this one is damaged later.

    The tensors' files are written first, under new names; then the old index is kept under another name, and one rename
    of the new index puts it in force. Where there is no room for three, the oldest goes first.

    Args:
        directory: Made if it does not exist, with those above it.
        record: Plain JSON.
        tensors: By name; shared and non-contiguous tensors may be among them.
        half: The small form: weights in float16, averages and moments as int8 with a scale per row, files of at most
            `SMALL_FILE` bytes (see `small.encode`). None is kept beside it.

    Raises:
        NotWrittenError: The disk does not take it; the newest of before stands, and nothing is left half written.
    """
    directory = Path(directory)
    try:
        try:
            _write(directory, record, tensors, half=half)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, None) or not (directory / BEFORE).is_file():
                raise
            (directory / BEFORE).unlink()
            _tidy(directory)
            _write(directory, record, tensors, half=half)
    except OSError as error:
        with contextlib.suppress(OSError):
            _tidy(directory)
        raise NotWrittenError(f"no checkpoint could be written to {directory}: {reason(error)}") from error


def _write(directory: Path, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, half: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
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
    sync_directory(directory)
    index = {"format": FORMAT, "small": half, "record": record, "files": files, "tensors": entries, "forms": forms}
    if half:  # to be carried: one is enough
        (directory / BEFORE).unlink(missing_ok=True)
    elif (directory / INDEX).is_file():
        write_text(directory / BEFORE, (directory / INDEX).read_text())
    write_text(directory / INDEX, _sealed(index))
    sync_directory(directory)
    _tidy(directory)


def read(directory: str | Path) -> Checkpoint | None:
    """Read the newest checkpoint in a directory that is whole.

    Returns:
        The checkpoint, with a note where it is not the newest; None where there is none (no directory, or nothing was
        written to it yet).

    Raises:
        CheckpointError: All there are are truncated or were tampered with; or the newest is of a newer format.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file() and not (directory / BEFORE).is_file():
        return None
    try:
        return _read(directory, INDEX)
    except _Newer:
        raise
    except CheckpointError as damage:
        try:
            found = _read(directory, BEFORE)
        except CheckpointError:
            raise damage from None
        told = str(damage).removesuffix(f"; {_remedy(directory)}")
        return replace(found, note=f"the newest checkpoint cannot be used ({told}): the one before it is taken")


def settle(directory: str | Path) -> None:
    """Have the checkpoint before the newest, which is damaged, take its place: else the next would push it out."""
    directory = Path(directory)
    with contextlib.suppress(OSError):  # a directory that cannot be written to now may be later
        write_text(directory / INDEX, (directory / BEFORE).read_text())


class _Newer(CheckpointError):  # noqa: N818 - never seen by name
    """Of a version to come: no damage, and no reason to take an older one."""


def _remedy(directory: Path) -> str:
    return f"remove {directory} to begin anew"


def _read(directory: Path, name: str) -> Checkpoint:
    path, remedy = directory / name, _remedy(directory)
    try:
        text = path.read_text()
        index = json.loads(text)
        version = index["format"]
        if type(version) is int and version > FORMAT:
            raise _Newer(f"{path} has format {version}; this version reads up to {FORMAT}: upgrade, or {remedy}")
        if version != 1 and not _is_sealed(text, index):
            raise ValueError("the index does not match its checksum: truncated, or changed")
        arrays = _load(directory, index, remedy)
        record, small = dict(index["record"]), index["small"] is True
        return Checkpoint(record=record, tensors=decode(arrays, index["forms"]), small=small)
    except (OSError, *_DAMAGE) as error:
        raise CheckpointError(f"the checkpoint in {directory} is damaged ({error}); {remedy}") from error


_SEAL = '{"sha256": "%s", '


def _sealed(index: Mapping[str, Any]) -> str:
    """An index as JSON that begins with the checksum of the rest."""
    body = json.dumps(index).removeprefix("{")
    return _SEAL % hashlib.sha256(body.encode()).hexdigest() + body


def _is_sealed(text: str, index: Mapping[str, Any]) -> bool:
    """Whether a text is what `_sealed` made, to the byte."""
    start = _SEAL % index["sha256"]
    return text.startswith(start) and hashlib.sha256(text.removeprefix(start).encode()).hexdigest() == index["sha256"]


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
    """Remove what is kept of a run, and its directory unless that holds anything else."""
    directory = Path(directory)
    for name in (BEFORE, INDEX):  # never is the older one the newest
        (directory / name).unlink(missing_ok=True)
    _tidy(directory)
    shutil.rmtree(directory / AUTOATTACK, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def check_directory(directory: Path, *, also: str = "") -> None:
    """Raise one InputError when a checkpoint cannot be kept in `directory`.

    Args:
        directory: May not exist yet.
        also: Regular expression of names that may lie there beside a checkpoint's own.
    """
    if not directory.exists():
        place = ground(directory)
        if not place.is_dir():
            raise InputError(f"checkpoint={directory}: {place} is no directory; choose another place")
    elif not directory.is_dir():
        raise InputError(f"checkpoint={directory} is a file; name a directory")
    else:
        place = directory
        known = {AUTOATTACK, LOCK, *(name + end for name in (INDEX, BEFORE) for end in ("", ".part"))}
        strange = (path for path in directory.iterdir() if path.name not in known and not _is_ours(path))
        others = sorted(path.name for path in strange if not re.fullmatch(also, path.name))
        if others:
            raise InputError(
                f"checkpoint={directory} also holds {', '.join(others[:5])}: choose a directory for checkpoints alone"
            )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"checkpoint={directory}: {place} cannot be written to; choose another directory")


def _ours(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"state-(\d+)-\d+\.safetensors(?:\.part)?", path.name)


def _is_ours(path: Path) -> bool:
    """Whether it holds tensors of a checkpoint, or is what safetensors leaves where it was killed while it wrote."""
    return _ours(path) is not None or re.fullmatch(r"\.tmp\w{6}", path.name) is not None


def _tidy(directory: Path) -> None:
    """Remove the tensors of older checkpoints than the two, and what a kill left half written."""
    keep: set[str] = set()
    for name in (INDEX, BEFORE):
        (directory / f"{name}.part").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError, *_DAMAGE):  # of any other error of the disk nothing is removed
            keep |= {item["name"] for item in json.loads((directory / name).read_text())["files"]}
    if directory.is_dir():
        for path in directory.iterdir():
            if _is_ours(path) and path.name not in keep:
                path.unlink(missing_ok=True)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values in index order, on the CPU, in storage that is not shared with another tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.clone() if flat.untyped_storage().nbytes() != flat.numel() * flat.element_size() else flat


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
