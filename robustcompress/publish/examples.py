"""Images as they are and attacked, with what was added, and what the network says of both."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcompress.data import Images
from robustcompress.publish.markup import Html, Part, plain, section, tag
from robustcompress.publish.reading import percent
from robustcompress.result import CompressResult
from robustcompress.robust import pgd
from robustcompress.robust.evaluate import chosen_images

STEPS = 20
LOOKED_AT = 64
"""Images among which the first that are classified right are looked for."""

SIDES = (96, 64, 48, 32)
"""Pixels a side of the pictures, at most: the first of these at which all together are light enough."""

LIGHT = 600_000
"""Letters of all pictures together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One attacked image.

    Attributes:
        clean: float `[3, H, W]` in [0, 1].
        attacked: The same, attacked.
        label: Its class.
        before: What the network says of the clean image, and how sure it is.
        after: What it says of the attacked one.
    """

    clean: Tensor
    attacked: Tensor
    label: int
    before: tuple[int, float]
    after: tuple[int, float]


@torch.no_grad()
def attack_examples(result: CompressResult, images: Images, count: int, *, seed: int = 0) -> list[Example]:
    """Attack the first `count` test images, in `evaluate`'s order, that the network classifies right.

    Not chosen for effect: what withstands the attack is shown as well.
    """
    model = result.model
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    order = chosen_images(len(images), LOOKED_AT).to(images.pixels.device)
    few = images.subset(order).to(device)
    x, y = few.as_float(), few.labels
    right = model(x).argmax(1).eq(y).nonzero().flatten()[:count]
    if not len(right):
        return []
    x, y = x[right], y[right]
    generator = torch.Generator().manual_seed(seed)
    attacked = pgd(model, x, y, result.threat, steps=STEPS, generator=generator)
    said = [model(batch).softmax(1).max(1) for batch in (x, attacked)]
    return [
        Example(
            clean=x[i].cpu(),
            attacked=attacked[i].cpu(),
            label=int(y[i]),
            before=(int(said[0].indices[i]), float(said[0].values[i])),
            after=(int(said[1].indices[i]), float(said[1].values[i])),
        )
        for i in range(len(x))
    ]


def examples(result: CompressResult, found: list[Example], *, data: str) -> Html:
    """The pictures, three for each image."""
    title = "Attacked images"
    if not found:
        none = f"None of the first {LOOKED_AT} test images of {data} is classified right: there is nothing to attack."
        return section("examples", title, tag("p", none))
    broken = sum(example.after[0] != example.label for example in found)
    linf = result.threat.norm == "linf"
    factor = f"{0.5 / result.threat.eps:.3g}" if linf else "as much as each image allows"
    for side in SIDES:
        cards = [_card(result, example, side) for example in found]
        if sum(map(len, cards)) <= LIGHT:
            break
    largest = max(found[0].clean.shape[-2:])
    smaller = f" Shown at {side} of {largest} pixels." if largest > side else ""
    return section(
        "examples",
        title,
        tag(
            "p",
            f"The first {len(found)} test images of {data}, in the order of the evaluation, that the network "
            f"classifies right; not chosen for effect. PGD-{STEPS} within {result.threat.label()} breaks {broken} of "
            f"them. The middle picture is what was added, amplified ({factor}{' times' if linf else ''}; grey is no "
            f"change).{smaller} Percentages are the network's own confidence.",
        ),
        tag("ul", cards, class_="examples"),
    )


def _card(result: CompressResult, example: Example, side: int) -> Html:
    name = _class(result, example.label)
    delta = example.attacked - example.clean
    largest = result.threat.eps if result.threat.norm == "linf" else max(float(delta.abs().max()), 1e-12)
    broken = example.after[0] != example.label
    before, after = (f"{_class(result, said)}, {percent(sure)}" for said, sure in (example.before, example.after))
    pictures = (
        (example.clean, f"clean image of class {name}, classified as {before}", ("clean: ", before)),
        (delta / (2 * largest) + 0.5, f"what the attack added to this image of class {name}, amplified", ("added",)),
        (example.attacked, f"attacked image of class {name}, classified as {after}", ("attacked: ", after)),
    )
    shown: list[Part] = []
    for place, (pixels, alt, caption) in enumerate(pictures):
        picture = tag("img", src=_png(pixels, side, smooth=place != 1), alt=alt)
        shown.append(tag("figure", picture, tag("figcaption", *caption)))
    said = "broken" if broken else "withstood"
    return tag("li", tag("div", shown, class_="triple"), f"Class {name}: ", tag("strong", said), ".")


def _class(result: CompressResult, index: int) -> str:
    names = result.classes
    return plain(names[index], 40) if index < len(names) else str(index)


def _png(pixels: Tensor, side: int, *, smooth: bool) -> str:
    """A data address with the picture; the largest change of a perturbation must not be averaged away."""
    from PIL import Image

    levels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(levels)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
