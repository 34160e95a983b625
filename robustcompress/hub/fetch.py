"""Fetch named files of one revision: plain data alone, of bounded size."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from robustcompress.errors import HubError, Problems, ResultError
from robustcompress.hub.address import Address
from robustcompress.hub.client import asking, hub

MB = 1_000_000
LIMITS = {
    ".json": 64 * MB,
    ".jsonl": 256 * MB,
    ".yaml": MB,
    ".safetensors": 8000 * MB,
    ".onnx": 2200 * MB,
    ".md": MB,
}
"""The kinds of files that are fetched, and how many bytes each may have. What could run on being read is no kind."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")


def fetch(
    address: Address | str,
    needed: Sequence[str],
    *,
    optional: Collection[str] = (),
    cache: str | Path | None = None,
) -> Path:
    """Fetch files into the cache that all tools of the hub share, and return the directory where they lie.

    All are of one commit, also when somebody pushes meanwhile. Nothing that is not asked for is fetched, and nothing
    of another kind than `LIMITS` has. That directory may hold other files, which other tools fetched.

    Args:
        address: Where, and of which revision.
        needed: Names of files that must be there.
        optional: Patterns of names, such as "*.onnx", that are fetched where they match.
        cache: The cache; that of huggingface_hub where None.

    Returns:
        The directory. It is not to be written to.

    Raises:
        InputError: There is no such repository or revision, or huggingface_hub is missing.
        ResultError: It holds no such files, or larger ones than a result can have.
        HubError: The server cannot be reached, or failed.
    """
    address = Address.read(address) if isinstance(address, str) else address
    client = hub()
    what = f"{address} cannot be fetched"
    with asking(address, what):
        info = client.model_info(address.repo, revision=address.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    names = _chosen(sizes, needed, optional, what)
    with asking(address, what):
        found = [Path(client.hf_hub_download(address.repo, name, revision=info.sha, cache_dir=cache)) for name in names]
    for path in found:  # the listing may have said less than was sent
        if path.stat().st_size > LIMITS[path.suffix]:
            raise HubError(f"{what}: {path.name} is larger than the server said")
    return found[0].parent


def _chosen(sizes: dict[str, int | None], needed: Sequence[str], optional: Collection[str], what: str) -> list[str]:
    """The names to fetch, needed ones first; ResultError where they are not there, or too large."""
    problems = Problems(what)
    for name in needed:
        if name not in sizes:
            problems.add(f"there is no {name}: was it sent by `robustcompress push`?")
    matching = sorted(
        name
        for name in sizes
        if name not in needed and _NAME.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in optional)
    )
    names = [name for name in (*needed, *matching) if name in sizes]
    for name in names:
        size, limit = sizes[name], LIMITS.get(Path(name).suffix)
        if limit is None:
            problems.add(f"{name} is of a kind that is not fetched")
        elif size is None or not 0 <= size <= limit:
            problems.add(f"{name} has {size} bytes; at most {limit} are fetched")
    problems.raise_if_any(ResultError)
    return names
