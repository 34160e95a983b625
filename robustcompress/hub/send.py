"""Send files to a repository, as one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from robustcompress.errors import InputError
from robustcompress.hub.address import Address
from robustcompress.hub.client import addition, asking, has_token, hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent.

    Attributes:
        address: Where it lies now, with the commit as its revision.
        url: The page of the repository.
        private: Whether the repository is private.
        files: Names of the files.
    """

    address: Address
    url: str
    private: bool
    files: tuple[str, ...]


def send(address: Address, files: Mapping[str, Path | bytes], *, message: str, private: bool = True) -> Sent:
    """Make the repository where there is none, and put the files there in one commit.

    Args:
        address: Where. Its revision, a branch that exists, is what the commit is added to.
        files: By their names there: files here, or contents.
        message: Of the commit.
        private: Whether nobody else may see it: a repository that is made now is private, and one that exists must be.
            Else it is made public, and one that exists stays as it is.

    Raises:
        InputError: There is no token, or it does not allow this, or huggingface_hub is missing; or the repository is
            public, and that was not asked for.
        HubError: The server cannot be reached, or failed.
    """
    client, what = hub(), f"{address} cannot be sent to"
    if not has_token():
        raise InputError(f"{what}: there is no token; log in with `hf auth login`, or set HF_TOKEN")
    with asking(address, what):
        made = client.create_repo(address.repo, private=private, exist_ok=True)
        seen = client.model_info(address.repo)
    if private and not seen.private:
        raise InputError(
            f"{what}: it exists and is public, and what was public once cannot be taken back: pass private=False, or "
            "--public, if you mean it"
        )
    with asking(address, what):
        commit = client.create_commit(
            address.repo,
            [addition(name, content) for name, content in files.items()],
            commit_message=message,
            revision=address.revision,
        )
    return Sent(
        address=Address(address.repo, commit.oid),
        url=str(made),
        private=bool(seen.private),
        files=tuple(files),
    )
