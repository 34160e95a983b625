"""The only file that imports huggingface_hub; what it raises becomes one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from robustcompress.errors import HubError, InputError, first_line
from robustcompress.hub.address import Address

DEFAULT = "https://huggingface.co"


def endpoint() -> str:
    """The server: HF_ENDPOINT where it is set, else the Hugging Face Hub."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT).rstrip("/")


def hub() -> Any:
    """A client of the server.

    Raises:
        InputError: huggingface_hub is not installed.
    """
    from robustcompress import __version__

    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise InputError("the hub needs huggingface_hub: pip install 'robustcompress[hub]'") from error
    return HfApi(endpoint=endpoint(), library_name="robustcompress", library_version=__version__)


def has_token() -> bool:
    """Whether there is a token to send, as `hf auth login` leaves it or HF_TOKEN holds it."""
    from huggingface_hub import get_token

    return bool(get_token())


def addition(name: str, content: Any) -> Any:
    """A file of a commit: its name there, and its path here or its bytes."""
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


@contextmanager
def asking(address: Address, what: str) -> Iterator[None]:
    """Say in one sentence what a server or a connection refused.

    Raises:
        InputError: The repository or the revision does not exist, or the token does not allow this.
        HubError: The server cannot be reached, or failed.
    """
    from huggingface_hub import errors

    # The base of all errors of a connection is another library's, and another one in each major version.
    bases = [kind for kind in errors.HfHubHTTPError.__mro__[1:] if kind.__module__ != "builtins"]
    transport: Any = (*bases, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    where = f"{address} on {endpoint()}"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{what}: {where} has no revision {address.revision!r}") from error
    except errors.GatedRepoError as error:
        raise InputError(f"{what}: {where} is gated; ask its owner for access on its page") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: there is no {where}, or it is private and your token may not see it; check the name, or log in "
            "with `hf auth login`"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"{what}: there is no token; `hf auth login`, or set HF_TOKEN") from error
    except (JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{what}: {where} does not answer as a hub does ({type(error).__name__}: {first_line(error)}); "
            "see HF_ENDPOINT"
        ) from error
    except transport as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"{what}: {where} refuses your token (HTTP {status}); it needs the right to do that: `hf auth login`"
            ) from error
        if status is not None:
            raise HubError(f"{what}: {where} answered with HTTP {status}: {first_line(error)}") from error
        raise HubError(
            f"{what}: {endpoint()} cannot be reached ({type(error).__name__}: {first_line(error)}); is there a network?"
        ) from error
    except ValueError as error:  # a name, or the metadata of a card, that the hub does not take
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error
