"""Several processes on one machine that call the same function."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from robustcompress.distributed import start, stop

PATIENCE_S = 240.0


def together(size: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of `size` processes returns from `act(world, *arguments)`, in their order.

    Raises:
        AssertionError: One of them raised something, or they did not end.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers: Any = context.Queue()
    started = [
        context.Process(target=_enter, args=(rank, size, port, answers, act, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            rank, value, failure = answers.get(timeout=PATIENCE_S)
            assert failure is None, f"process {rank}:\n{failure}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"only processes {sorted(found)} of {size} ended") from None
    finally:
        for process in started:
            process.join(0 if len(found) < size else 30)
            process.kill()
    return [found[rank] for rank in range(size)]


def _enter(rank: int, size: int, port: int, answers: Any, act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    try:
        value = act(start(), *arguments)
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
    answers.put((rank, value, None))
    stop()
