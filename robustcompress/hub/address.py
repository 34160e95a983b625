"""Where a result lies on a hub: `hf://owner/name`, perhaps `@revision`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self, TypeGuard

from robustcompress.errors import InputError

SCHEME = "hf://"

_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?!.*(?:\.\.|//))[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True, slots=True)
class Address:
    """A model repository.

    Attributes:
        repo: "owner/name".
        revision: A branch, a tag or a commit; None for the main branch as it is now.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Read `hf://owner/name`, `hf://owner/name@revision`, or either without the scheme.

        Raises:
            InputError: It is none of these.
        """
        repo, at, revision = text.removeprefix(SCHEME).partition("@")
        owner, slash, name = repo.partition("/")
        good = slash and _PART.fullmatch(owner) and _PART.fullmatch(name) and not name.endswith(".git")
        if not good or (at and not _REVISION.fullmatch(revision)):
            raise InputError(f"{text!r} names no repository; write hf://owner/name, or hf://owner/name@revision")
        return cls(repo, revision if at else None)

    def __str__(self) -> str:
        return SCHEME + self.repo + (f"@{self.revision}" if self.revision else "")


def is_address(place: object) -> TypeGuard[str]:
    """Whether a place is on a hub rather than a directory here."""
    return isinstance(place, str) and place.startswith(SCHEME)
