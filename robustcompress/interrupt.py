"""Being asked to stop: Ctrl-C and SIGTERM end a long piece of work after the step it is at, not within it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustcompress.distributed import World, launched
from robustcompress.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: signal.Signals | None = None
_agreed: int | None = None  # the same for several processes, where they listen to each other; 0 for nothing


def asked() -> signal.Signals | None:
    """The signal that asked to stop; None where none has, or nobody catches them (see `graceful`).

    Of several processes that `listen` to each other it is what they heard last: all get the same answer.
    """
    if _agreed is None:
        return _asked
    return signal.Signals(_agreed) if _agreed else None


def listen(world: World) -> None:
    """Hear whether any process was asked to stop, for `asked` to say in all of them.

    Args:
        world: The processes; all call this, after the same step.
    """
    global _agreed
    _agreed = None if world.size == 1 else world.most(int(_asked or 0))


def stop_if_asked(where: str) -> None:
    """Raise Interrupted if a signal has asked to stop.

    Args:
        where: What was stopped, and what is kept of it, in a sentence.

    Raises:
        Interrupted: A signal has.
    """
    if (number := asked()) is not None:
        raise Interrupted(where, number)


@contextmanager
def graceful() -> Iterator[None]:
    """Have the first SIGINT or SIGTERM stop the work inside at the next place where it can go on later.

    The work then raises `Interrupted`, with its checkpoint written where it keeps one. The second signal stops it at
    once, as `KeyboardInterrupt` (but not under torchrun, which passes on what the terminal has sent to all already, and
    kills who takes longer than half a minute). Outside the main thread, which alone may say what signals do, nothing
    changes. A signal that is ignored, as Ctrl-C is in a shell's background, stays ignored.
    """
    global _asked, _agreed
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
            if launched():
                return
            raise KeyboardInterrupt
        _asked = signal.Signals(number)
        # Not through print: the signal may have come while something else was being printed.
        again = "" if launched() else "; once more to stop at once"
        os.write(2, f"\n{_asked.name}: stopping after this step{again}\n".encode())

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _asked = _agreed = None
