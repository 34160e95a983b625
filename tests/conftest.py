"""Shared by all tests."""

from __future__ import annotations

import os

import torch

# Several test processes run beside each other: one thread each is faster than all fighting for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
