"""What a stopped queue goes on from, small enough to carry: a directory to copy to the next machine.

Of a run that is training: its checkpoint in the small form (rounded), and how long it has trained. Of a run that was
trained and not yet judged: its network, bit for bit, and what AutoAttack has found so far. No file is larger than
15 MiB; larger ones are cut into pieces.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from robustcompress import checkpoint
from robustcompress.errors import InputError

MARK = "carry.json"
PIECE = 15 * 2**20
SUFFIX = ".piece"


def leave(state: Path, carry: Path, begun: Iterable[str]) -> int:
    """Write what has to be carried, in place of what was there.

    Args:
        state: What runs go on from.
        carry: The directory; must not exist, or hold what an earlier call left.
        begun: Runs that are not finished, as paths below `state`.

    Returns:
        Bytes written.

    Raises:
        InputError: The directory holds something else.
    """
    check(carry)
    draft = carry.with_name(f".{carry.name}-new")
    shutil.rmtree(draft, ignore_errors=True)
    for name in begun:
        source, target = state / name, draft / name
        target.mkdir(parents=True)
        for path in source.glob("*-so-far"):
            shutil.copy(path, target)
        if (source / "result").is_dir():
            for part in ("result", "attacks"):
                for path in sorted((source / part).glob("*")):
                    _cut(path, target / part)
        elif (source / "checkpoint").is_dir():
            checkpoint.shrink(source / "checkpoint", target / "checkpoint")
    draft.mkdir(parents=True, exist_ok=True)
    (draft / MARK).write_text(json.dumps({"format": 1}) + "\n")
    shutil.rmtree(carry, ignore_errors=True)
    draft.rename(carry)
    return sum(path.stat().st_size for path in carry.rglob("*") if path.is_file())


def take_up(carry: Path, state: Path) -> list[str]:
    """Put what was carried where runs look for it; a run that was begun there already is left alone.

    Returns:
        The runs that were taken up, as paths below `state`.

    Raises:
        InputError: The directory holds something else.
    """
    check(carry)
    taken = []
    for source in sorted(carry.glob("*/*")):
        target = state / source.relative_to(carry)
        if target.exists():
            continue
        draft = target.with_name(f".{target.name}-new")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        for first in draft.rglob(f"*{SUFFIX}0"):
            whole = first.with_name(first.name.removesuffix(f"{SUFFIX}0"))
            pieces = sorted(
                first.parent.glob(f"{whole.name}{SUFFIX}*"), key=lambda p: int(p.name.rpartition(SUFFIX)[2])
            )
            whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
            for piece in pieces:
                piece.unlink()
        draft.rename(target)
        taken.append(str(target.relative_to(state)))
    return taken


def check(carry: Path) -> None:
    """Refuse a directory that holds anything but what `leave` leaves: it is replaced."""
    if carry.exists() and not (carry / MARK).is_file() and any(carry.iterdir() if carry.is_dir() else [carry]):
        raise InputError(f"--carry {carry} holds other things and would be replaced: name a new or empty directory")


def _cut(path: Path, into: Path) -> None:
    """Copy a file, in pieces where it is large."""
    into.mkdir(parents=True, exist_ok=True)
    if path.stat().st_size <= PIECE:
        shutil.copy(path, into)
        return
    with path.open("rb") as file:
        for number, piece in enumerate(iter(lambda: file.read(PIECE), b"")):
            (into / f"{path.name}{SUFFIX}{number}").write_bytes(piece)
