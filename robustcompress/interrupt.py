"""Being asked to stop: Ctrl-C and SIGTERM end a long piece of work after the step it is at, not within it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustcompress.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: signal.Signals | None = None


def asked() -> signal.Signals | None:
    """The signal that asked to stop; None where none has, or nobody catches them (see `graceful`)."""
    return _asked


def stop_if_asked(where: str) -> None:
    """Raise Interrupted if a signal has asked to stop.

    Args:
        where: What was stopped, and what is kept of it, in a sentence.

    Raises:
        Interrupted: A signal has.
    """
    if _asked is not None:
        raise Interrupted(where, _asked)


@contextmanager
def graceful() -> Iterator[None]:
    """Have the first SIGINT or SIGTERM stop the work inside at the next place where it can go on later.

    The work then raises `Interrupted`, with its checkpoint written where it keeps one. The second signal stops it at
    once, as `KeyboardInterrupt`. Outside the main thread, which alone may say what signals do, nothing changes. A
    signal that is ignored, as Ctrl-C is in a shell's background, stays ignored.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != owner:  # a forked child has work of its own, and nobody in it who looks
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _asked is not None:
            raise KeyboardInterrupt
        _asked = signal.Signals(number)
        # Not through print: the signal may have come while something else was being printed.
        os.write(2, f"\n{_asked.name}: stopping after this step; once more to stop at once\n".encode())

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _asked = None
