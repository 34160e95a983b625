"""Small robust networks that attacks are compared on: trained once into a directory, and read back from there."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustcompress import DataSplits, ModelSpec, Recipe, ThreatModel, compress, load, load_data
from robustcompress.robust import PGDAT, TRADES, Natural, Objective
from robustcompress.train.progress import console

LINF = ThreatModel("linf", 0.1)
"""As the quickstart has it: ink on paper hardly feels the 8/255 that is usual for photos."""
CIFAR_TRAIN, CIFAR_TEST = 4000, 400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Net:
    """One network: what it is, what it learns, and what it is attacked with.

    Attributes:
        name: What the tables call it.
        model: Factory.
        options: Its arguments.
        objective: What is minimised.
        threat: In training, and in the attack.
        epochs: Passes over the training images.
        photos: Trained on a part of CIFAR-10 in place of the digits.
    """

    name: str
    model: str = "resnet8"
    options: dict[str, Any] = field(default_factory=lambda: {"stem_stride": 4})
    objective: Objective = field(default_factory=lambda: PGDAT(steps=3, step_size=0.05))
    threat: ThreatModel = LINF
    epochs: float = 10
    photos: bool = False


_PHOTOS: dict[str, Any] = {"options": {"stem_stride": 2}, "epochs": 20, "photos": True}
_NARROW = {"stem_stride": 4, "width": 0.5}
NETS = (
    Net(name="digits, PGD-AT"),
    Net(name="digits, TRADES, half width", options=_NARROW, objective=TRADES(steps=3, step_size=0.05)),
    Net(name="CIFAR-10, PGD-AT", objective=PGDAT(steps=2, step_size=5 / 255), threat=ThreatModel(), **_PHOTOS),
    Net(name="digits, l2", objective=PGDAT(steps=3, step_size=0.75), threat=ThreatModel("l2", 1.5)),
    Net(name="digits, natural, eps 0.03", objective=Natural(), threat=ThreatModel("linf", 0.03), epochs=6),
    Net(
        name="CIFAR-10, l2",
        objective=PGDAT(steps=2, step_size=0.3),
        threat=ThreatModel("l2", 0.5),
        **_PHOTOS,
    ),
    Net(
        name="digits, ViT, PGD-AT",
        model="vit_micro",
        options={},
        objective=PGDAT(steps=2, step_size=0.05),
        epochs=15,
    ),
)


@functools.lru_cache
def images_of(net: Net, root: Path, *, test_limit: int = CIFAR_TEST) -> DataSplits:
    """What it was trained on; `root` holds CIFAR-10 as a directory of images, of which so many are for testing."""
    if not net.photos:
        return load_data("digits")
    return load_data(str(root), train_limit=CIFAR_TRAIN, test_limit=test_limit)


def trained(net: Net, directory: Path, data: DataSplits, *, seed: int, epochs: float | None = None) -> Any:
    """The network in eval mode; trained with the toolkit's own `compress` and kept where it was not yet."""
    place = directory / "".join(c if c.isalnum() else "-" for c in net.name)
    if not place.exists():
        directory.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3} if net.model.startswith("vit") else {}
        compress(
            ModelSpec(net.model, net.options),
            strategy="none",
            data=data,
            threat=net.threat,
            objective=net.objective,
            epochs=epochs or net.epochs,
            recipe=Recipe(batch_size=64, val_images=64, **own),
            attacks=("clean",),
            test_images=8,
            seed=seed,
            device="cpu",
            out=place,
            progress=False,
        )
        console().print(f"trained: {net.name}")
    return load(place).model.eval()
