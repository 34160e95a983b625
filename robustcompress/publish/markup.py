"""HTML that cannot be injected into: elements are built from parts, and whatever is no element is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
"""Control characters, and those that hide text or turn its direction: they could make a page say another thing."""

_VOID = frozenset(("br", "hr", "img", "meta", "link"))

LONGEST = 400
"""Letters of one value that a page shows: a name of a megabyte would make it unreadable."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Part = object
"""What may stand within an element: `Html`, shown as it is; None, left out; a list of parts; else text, escaped."""


def plain(value: object, longest: int = LONGEST) -> str:
    """A value as text for people: nothing invisible in it, and cut where it is longer than `longest` letters."""
    text = _UNSEEN.sub("�", str(value)[: 4 * longest])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def join(parts: Iterable[Part]) -> Html:
    """Put parts behind each other; see `Part`."""
    return Html("".join(_render(part) for part in parts))


def _render(part: Part) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return str(part)
    if isinstance(part, list | tuple):
        return join(part)
    return html.escape(plain(part, 100 * LONGEST))


def tag(name: str, /, *parts: Part, **attributes: object) -> Html:
    """One element.

    Args:
        name: Its name.
        parts: What stands within it.
        attributes: Trailing underscores are dropped (`class_`), others become hyphens (`aria_label`); None is left out.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value, 10_000_000), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>" if name in _VOID else f"<{name}{said}>{join(parts)}</{name}>")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Part]], *, caption: Part = None, text: Sequence[int] = (0,)
) -> Html:
    """A table with headers; it scrolls sideways where the screen is narrow.

    Args:
        columns: Headings.
        rows: Cells; the first of a row is its heading.
        caption: Stands above.
        text: Which columns hold text; the others hold numbers and are aligned to the right.
    """

    def look(column: int) -> str | None:
        return None if column in text else "n"

    head = tag("tr", [tag("th", name, scope="col", class_=look(i)) for i, name in enumerate(columns)])
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=look(0)),
            [tag("td", cell, class_=look(i)) for i, cell in enumerate(row[1:], 1)],
        )
        for row in rows
    ]
    titled = tag("caption", caption) if caption is not None else None
    return tag("div", tag("table", titled, tag("thead", head), tag("tbody", body)), class_="scroll", tabindex="0")


def facts(pairs: Mapping[str, Part]) -> Html:
    """Names and values below each other; those that are None are left out."""
    shown = [(name, value) for name, value in pairs.items() if value is not None and value != ""]
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in shown])


def section(anchor: str, title: str, *parts: Part) -> Html:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title, id=f"{anchor}-title"), *parts, id=anchor, aria_labelledby=f"{anchor}-title")


def figure(picture: Html, caption: Part) -> Html:
    """A picture and what is to be said about it."""
    return tag("figure", tag("div", picture, class_="scroll", tabindex="0"), tag("figcaption", caption))


def note(*parts: Part, warning: bool = False) -> Html:
    """A paragraph that stands out."""
    return tag("p", tag("strong", "Warning: ") if warning else None, *parts, class_="warning" if warning else "note")


def fold(title: Part, *parts: Part) -> Html:
    """Something that is shown when it is asked for, and is printed where the browser knows how."""
    return tag("details", tag("summary", title), *parts)
