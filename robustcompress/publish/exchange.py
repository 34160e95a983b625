"""`push` and `pull`: a saved result to a hub and back, with what people want to read beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from robustcompress.data import DataSplits, Images
from robustcompress.durable import draft_of
from robustcompress.errors import InputError
from robustcompress.hub import Address, Sent, fetch, send
from robustcompress.models import ModelSpec
from robustcompress.publish.artefacts import KINDS
from robustcompress.publish.card import model_card
from robustcompress.publish.page import build_page
from robustcompress.publish.reading import model_name, strategy_name
from robustcompress.result import HISTORY, RECIPE, RESULT, WEIGHTS, CompressResult, check_target, load

CARD, PAGE = "README.md", "report.html"

BESIDE = ("*.onnx", *(f"*{ending}" for ending in KINDS))
"""What goes along with a result where it lies beside it. Nothing else leaves the directory."""

Reference = nn.Module | Callable[[], nn.Module] | ModelSpec | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What `push` did.

    Attributes:
        sent: Where it lies, and what was sent.
        made: Those of the files that were written for it; the others were in the directory.
    """

    sent: Sent
    made: tuple[str, ...]


def push(
    directory: str | Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool = True,
    message: str = "",
    data: DataSplits | Images | None = None,
    model: Reference = None,
) -> Pushed:
    """Send a saved result to the Hugging Face Hub, in one commit.

    The result is loaded first, so that what others will load is whole. Sent are the result's own files, ONNX files and
    the records of verification and timing beside it, `README.md` and `report.html`. The last two are written where the
    directory has none; those in it are sent as they are.

    Args:
        directory: What `CompressResult.save` wrote.
        repo: "owner/name", or "hf://owner/name"; with "@branch" a branch that exists.
        license: Identifier of the network's license, such as "apache-2.0", for the card that is written.
        private: Whether nobody else may see it: a repository that is made now is private, and one that exists must be,
            because what was public once cannot be taken back. False makes a new one public.
        message: Of the commit.
        data: Its data, for attacked images in the report that is written.
        model: As for `load`.

    Raises:
        InputError: The address is none, there is no token, or it does not allow this; or the repository is public, and
            `private` is not False.
        ResultError: There is no result, or it is damaged.
        HubError: The server cannot be reached, or failed.
    """
    address, directory = Address.read(repo), Path(directory)
    result = load(directory, model=model)
    files, made = contents(result, directory, address, license=license, data=data)
    said = message or f"{model_name(result)} compressed by {strategy_name(result)}, seed {result.seed}"
    return Pushed(sent=send(address, files, message=said[:200], private=private), made=made)


def contents(
    result: CompressResult,
    directory: Path,
    address: Address,
    *,
    license: str | None = None,
    data: DataSplits | Images | None = None,
) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """What is sent of a directory, by name, and what of it is written now."""
    names = [name for name in (RESULT, WEIGHTS, HISTORY, RECIPE) if (directory / name).is_file()]
    names += sorted(path.name for pattern in BESIDE for path in directory.glob(pattern) if path.is_file())
    files: dict[str, Path | bytes] = {name: directory / name for name in names}
    made = tuple(name for name in (PAGE, CARD) if not (directory / name).is_file())
    if license is not None and CARD not in made:
        raise InputError(
            f"license={license!r}: {directory / CARD} is sent as it is; state the license there, or move it away"
        )
    if CARD in made:
        card = model_card(result, repo=address.repo, license=license, files=[*names, PAGE])
        files[CARD] = card.encode()
    if PAGE in made:
        title = f"{model_name(result)} compressed by {strategy_name(result)}"
        files[PAGE] = build_page(result, data, directory=directory, title=title, name=str(address)).encode()
    return files | {name: directory / name for name in (CARD, PAGE) if name not in made}, made


def pull(address: str, directory: str | Path, *, model: Reference = None) -> Path:
    """Fetch a result into a directory: its own files, and the card, ONNX files and records that lie beside it.

    Only plain data are fetched, and nothing that is not known by name. A report page is not, because one that a
    stranger wrote may hold scripts: `write_report` writes it anew. The result is loaded once, so that what comes to
    lie in the directory is whole, and then put in place in one step.

    Args:
        address: "hf://owner/name", or "hf://owner/name@revision".
        directory: Must not exist; directories above it are made.
        model: As for `load`; a result of the author's own network is put in place without it, and not built.

    Returns:
        The directory.

    Raises:
        InputError: The address is none, there is no such repository or revision, or the directory exists.
        ResultError: What lies there is no result, or a damaged one.
        HubError: The server cannot be reached, or failed.
    """
    directory, where = Path(directory), Address.read(address)
    check_target(directory)
    optional = (HISTORY, RECIPE, CARD, *BESIDE)
    cached = fetch(where, (RESULT, WEIGHTS), optional=optional)
    with draft_of(directory) as draft:
        for path in sorted({path for pattern in (RESULT, WEIGHTS, *optional) for path in cached.glob(pattern)}):
            shutil.copyfile(path, draft / path.name)
        try:
            load(draft, model=model)
        except InputError as error:
            if model is not None or "needs its reference model" not in str(error):
                raise
        draft.replace(directory)
    return directory
