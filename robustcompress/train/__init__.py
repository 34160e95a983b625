"""One training loop for every strategy."""

from robustcompress.train.ascent import Ascent, SharpnessAscent, recipe_ascent, sharpness_ascent, weight_ascent
from robustcompress.train.auxiliary import with_auxiliary
from robustcompress.train.care import Care, TrainingError
from robustcompress.train.compiled import CompiledNetwork
from robustcompress.train.device import (
    computes_in_bf16,
    describe,
    resolve_device,
    safe_memory_format,
    set_memory_format,
)
from robustcompress.train.ema import average_epoch, averaged, equally_averaged, make_average
from robustcompress.train.frozen import frozen, frozen_but
from robustcompress.train.guard import Guard, make_guard
from robustcompress.train.large_batch import Lamb, Lars
from robustcompress.train.loop import make_optimizer, phase_steps, train
from robustcompress.train.midway import Midway
from robustcompress.train.progress import Progress
from robustcompress.train.recipe import HOW, Recipe, augmentation
from robustcompress.train.schedules import SCHEDULES, Schedule, lr_factor, warm_up_factor
from robustcompress.train.score_ascent import ScoreAscent, calibrate
from robustcompress.train.selection import Selection
from robustcompress.train.statistics import BATCHES as STATISTICS_BATCHES
from robustcompress.train.statistics import estimate_statistics

__all__ = [
    "HOW",
    "SCHEDULES",
    "STATISTICS_BATCHES",
    "Ascent",
    "Care",
    "CompiledNetwork",
    "Guard",
    "Lamb",
    "Lars",
    "Midway",
    "Progress",
    "Recipe",
    "Schedule",
    "ScoreAscent",
    "Selection",
    "SharpnessAscent",
    "TrainingError",
    "augmentation",
    "average_epoch",
    "averaged",
    "calibrate",
    "computes_in_bf16",
    "describe",
    "equally_averaged",
    "estimate_statistics",
    "frozen",
    "frozen_but",
    "lr_factor",
    "make_average",
    "make_guard",
    "make_optimizer",
    "phase_steps",
    "recipe_ascent",
    "resolve_device",
    "safe_memory_format",
    "set_memory_format",
    "sharpness_ascent",
    "train",
    "warm_up_factor",
    "weight_ascent",
    "with_auxiliary",
]
