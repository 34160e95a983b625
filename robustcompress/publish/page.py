"""`write_report`: one HTML file about one result, with everything it shows inside."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from robustcompress.data import DataSplits, Images
from robustcompress.durable import write_text
from robustcompress.errors import InputError, Problems, ResultError
from robustcompress.publish import attacks, training
from robustcompress.publish.artefacts import artefacts
from robustcompress.publish.examples import LOOKED_AT, attack_examples, examples
from robustcompress.publish.markup import Html, join, note, plain, tag
from robustcompress.publish.overview import compression, costs, header
from robustcompress.publish.provenance import provenance, reproduction
from robustcompress.publish.reading import BOUND, model_name, strategy_name
from robustcompress.publish.structure import structure
from robustcompress.result import CompressResult
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import hash_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may do with the page: draw it. No script runs and nothing is fetched, whatever a record holds."""

CURVE_IMAGES = 200
EXAMPLES, MOST_EXAMPLES = 6, 24


def write_report(
    result: CompressResult,
    path: str | Path,
    data: DataSplits | Images | None = None,
    *,
    directory: str | Path | None = None,
    title: str = "",
    examples: int = EXAMPLES,
    curve: Sequence[float] = (),
    curve_images: int | None = CURVE_IMAGES,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a page about a result: costs, accuracy under attack, widths, training, provenance; one HTML file.

    The file needs nothing else: no script, no network. Everything in it is escaped, so that a page about a stranger's
    result is as harmless as any. It is written beside `path` first and renamed, so that it is whole or absent.

    Args:
        result: What `compress` returned or `load` read. Its recorded accuracies are shown, and are not measured again.
        path: The file, ending in .html, in a directory that exists.
        data: Its data, of which the test images are attacked; or those images. Without them there are no pictures of
            attacked images.
        directory: Where the result is saved: ONNX files and other commands' records that lie there are shown.
        title: Heading of the page; model and strategy where empty.
        examples: How many attacked images are shown, at most 24; 0 for none.
        curve: Radii of a security curve, each attacked by PGD-20. Without any, the one that the run recorded.
        curve_images: Test images of that curve; None for all.
        device: Where the curve is measured: "auto", "cpu", "cuda".
        overwrite: Whether `path` may exist.

    Returns:
        The path.

    Raises:
        InputError: Arguments that cannot work, all of them at once, before any work.
    """
    path, directory = Path(path), None if directory is None else Path(directory)
    images = data.test if isinstance(data, DataSplits) else data
    _check(result, path, data, images, directory, examples, curve, curve_images, overwrite)
    page = build_page(
        result,
        data,
        directory=directory,
        title=title or f"{model_name(result)} compressed by {strategy_name(result)}",
        name=directory.name if directory is not None and directory.name else "DIR",
        count=examples,
        curve=curve,
        curve_images=curve_images,
        device=device,
    )
    put(path, page)
    return path


def build_page(
    result: CompressResult,
    data: DataSplits | Images | None,
    *,
    directory: Path | None,
    title: str,
    name: str = "DIR",
    count: int = EXAMPLES,
    curve: Sequence[float] = (),
    curve_images: int | None = CURVE_IMAGES,
    device: str = "auto",
) -> str:
    """The page as text; `name` is what commands on it call the result. For the other arguments see `write_report`.

    Raises:
        ResultError: A number of the record is too large to be drawn.
    """
    images = data.test if isinstance(data, DataSplits) else data
    same = data is None or images is None or _are_its_own(result, data, images)
    called = plain(data.name, 80) if isinstance(data, DataSplits) else "the images given"
    measured: Sequence[object] = attacks.recorded_curve(result)
    if curve and images is not None:
        measured = attacks.measure_curve(result, images, curve, count=curve_images, device=device)
    shown = None
    if images is not None and count:
        shown = examples(result, attack_examples(result, images, count), data=called)
    sample = None if images is None else images.first(LOOKED_AT).as_float().cpu()
    try:
        head = header(result, title)
        sections = [
            compression(result),
            costs(result),
            attacks.attacks(result),
            attacks.curve(result, measured),  # type: ignore[arg-type]
            structure(result),
            training.training(result),
            training.searches(result),
            shown,
            artefacts(result, directory, sample),
            provenance(result, directory),
            reproduction(result, name),
        ]
    except ArithmeticError as error:
        raise ResultError(f"the record holds a number that is too large to be shown ({error})") from error
    other = None
    if not same:
        other = note(
            f"the test images of {called} are not those that this result was judged on, going by their hash: the "
            "pictures of attacked images, and what was measured for this page, are about other images than the "
            "accuracies.",
            warning=True,
        )
    return _document(title, [head, other], [part for part in sections if part is not None])


def _are_its_own(result: CompressResult, data: DataSplits | Images, images: Images) -> bool:
    """Whether these are the result's images: the same data, or the same test images in the same order."""
    if isinstance(data, DataSplits) and data.sha256 == result.data["sha256"]:
        return True
    if result.report is None:
        return False
    judged = images.subset(chosen_images(len(images), result.report.n))
    return hash_of(judged.pixels, judged.labels) == result.report.images_sha256


def _document(title: str, head: Sequence[Html | None], sections: Sequence[Html]) -> str:
    contents = [_link(part) for part in sections]
    return (
        "<!doctype html>\n"
        + tag(
            "html",
            tag(
                "head",
                tag("meta", charset="utf-8"),
                tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
                tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
                tag("meta", name="referrer", content="no-referrer"),
                tag("meta", name="generator", content="robustcompress"),
                tag("title", title),
                Html(f"<style>{_style()}</style>"),
            ),
            tag(
                "body",
                tag("header", *head, tag("nav", contents, aria_label="Contents")),
                tag("main", join(sections)),
                tag("footer", tag("p", "Written by robustcompress. ", BOUND)),
            ),
            lang="en",
        )
        + "\n"
    )


def _link(part: Html) -> Html:
    """The entry of a section in the contents; its anchor and heading are its own, and escaped already."""
    found = re.match(r'<section id="([a-z]+)"[^>]*><h2[^>]*>(.*?)</h2>', part)
    assert found is not None
    return join([tag("a", Html(found[2]), href=f"#{found[1]}"), " "])


@cache
def _style() -> str:
    return (files("robustcompress.publish") / "page.css").read_text().strip()


def put(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place") from error


def check_file(path: Path, suffix: str, problems: Problems, *, overwrite: bool) -> None:
    """Note why a text file could not be written there."""
    if not path.parent.is_dir():
        problems.add(f"{path}: there is no directory {path.parent}; create it first")
    elif path.is_dir():
        problems.add(f"{path} is a directory: name a file in it, such as {path / ('report' + suffix)}")
    elif path.exists() and not overwrite:
        problems.add(f"{path} exists; choose another file, or pass overwrite")
    if path.suffix.lower() not in ((".html", ".htm") if suffix == ".html" else (suffix,)):
        problems.add(f"{path}: the name must end in {suffix}")


def _check(
    result: CompressResult,
    path: Path,
    data: object,
    images: Images | None,
    directory: Path | None,
    count: int,
    curve: Sequence[float],
    curve_images: int | None,
    overwrite: bool,
) -> None:
    problems = Problems("the report cannot be written")
    check_file(path, ".html", problems, overwrite=overwrite)
    if directory is not None and not directory.is_dir():
        problems.add(f"directory {directory} does not exist")
    if images is not None and not isinstance(images, Images):
        problems.add(f"data is {type(data).__name__}: give what load_data() returns, or its test images")
    elif images is not None:
        if tuple(images.pixels.shape[1:]) != result.image_shape:
            problems.add(f"the images are {tuple(images.pixels.shape[1:])}, the result's are {result.image_shape}")
        if len(images) == 0:
            problems.add("there are no test images: give data that has some")
        if len(images) and int(images.labels.max()) >= len(result.classes):
            problems.add(f"label {int(images.labels.max())}: the result has {len(result.classes)} classes")
    if isinstance(data, DataSplits) and data.classes != result.classes:
        problems.add(f"the images have other classes ({plain(data.classes, 80)}) than the result")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_EXAMPLES:
        problems.add(f"examples={count!r}: give a whole number from 0 to {MOST_EXAMPLES}")
    for eps in curve:
        good = isinstance(eps, int | float) and not isinstance(eps, bool) and math.isfinite(eps) and eps > 0
        if not good or (result.threat.norm == "linf" and eps > 1):
            problems.add(f"curve: eps={eps!r} is no radius in the unit of the pixels, such as 8/255")
    if curve and images is None:
        problems.add("curve: there are no images to attack; pass data")
    if len(curve) > 50:
        problems.add(f"curve: {len(curve)} radii are too many; give at most 50")
    if curve_images is not None and (not isinstance(curve_images, int) or curve_images < 1):
        problems.add(f"curve_images={curve_images!r}: give a positive number, or None for all")
    problems.raise_if_any()
