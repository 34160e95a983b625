"""Where images come from: decoded once, kept as bytes in memory, augmented in batches on the device."""

from __future__ import annotations

from robustcompress.data.batches import Augment, Batches, crop_flip
from robustcompress.data.extra import TEACHER, Extra
from robustcompress.data.images import DataSplits, Images
from robustcompress.data.sources import NAMES, load_data

__all__ = ["NAMES", "TEACHER", "Augment", "Batches", "DataSplits", "Extra", "Images", "crop_flip", "load_data"]
