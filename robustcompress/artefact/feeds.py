"""Images as onnxruntime's calibrators read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustcompress.export.reading import BATCH, OnnxFile


def feeds(file: OnnxFile, images: Tensor) -> Iterator[Once]:
    """Give images to a file batch by batch; the last call of a fixed batch is filled up with images from the beginning.

    Args:
        file: Says what it reads, and how many a call.
        images: Float [N, C, H, W] in [0, 1].
    """
    count = len(images)
    index = torch.arange(math.ceil(count / file.batch) * file.batch if file.batch else count) % count
    for chunk in torch.split(index, file.batch or BATCH):
        yield Once({file.input: file.feed(images[chunk])})


class Once:
    """A reader of one batch, as `CalibrationDataReader` asks for it.

    Args:
        feed: The input's name and its array.
    """

    def __init__(self, feed: dict[str, Any]) -> None:
        self._feed: dict[str, Any] | None = feed

    def get_next(self) -> dict[str, Any] | None:
        """Give the batch the first time, then None."""
        feed, self._feed = self._feed, None
        return feed
