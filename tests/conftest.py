"""Shared by all tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

# Several test processes run beside each other: one thread each is faster than all fighting for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# A shell has its background jobs ignore Ctrl-C, and they their children: tests that send it would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that the test saves, as matplotlib's own object, in order."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        found.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found
