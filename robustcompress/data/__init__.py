"""Where images come from: bytes in memory, or files on the disk; augmented in batches on the device."""

from __future__ import annotations

from robustcompress.data.batches import Augment, Batches, crop_flip
from robustcompress.data.extra import TEACHER, Extra
from robustcompress.data.images import DataSplits, Images
from robustcompress.data.sources import NAMES, load_data
from robustcompress.data.stored import Stored
from robustcompress.data.streaming import Stream

__all__ = [
    "NAMES",
    "TEACHER",
    "Augment",
    "Batches",
    "DataSplits",
    "Extra",
    "Images",
    "Stored",
    "Stream",
    "crop_flip",
    "load_data",
]
