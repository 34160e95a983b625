"""What processes are asked to do in these tests: functions that another process can import."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import robustcompress as rc
from robustcompress.data import load_data, stored
from robustcompress.distributed import World
from robustcompress.robust.objectives import PGDAT
from tests.strategies.nets import QUICK_RECIPE, build, state


def train_from_disk(world: World, place: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The weights of a run over images on the disk, and which were decoded while training, one by one."""
    data, seen = load_data(place, stream=True, workers=2), []
    whole = stored.decoded

    def decoded(content: bytes, name: str, **options: Any) -> np.ndarray[Any, Any]:
        seen.append(name)
        return whole(content, name, **options)

    stored.decoded = decoded
    try:
        result = rc.compress(
            build("residual"),
            "none",
            data=data,
            epochs=1.0,
            objective=PGDAT(steps=1),
            recipe=dataclasses.replace(QUICK_RECIPE, accumulate=2, val_images=0, **recipe),
            attacks=(),
            progress=False,
        )
    finally:
        stored.decoded = whole
    return {"weights": {name: value.numpy() for name, value in state(result.model).items()}, "seen": seen}
