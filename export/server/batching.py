"""Dynamic batching: requests that arrive together share one call of the network."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

_log = logging.getLogger("uvicorn.error")


class FullError(Exception):
    """As many requests are being served as may be."""


@dataclass(slots=True, eq=False)
class _Waiting:
    image: np.ndarray
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    answer: asyncio.Future[tuple[np.ndarray, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batcher:
    """Collects images into batches and runs them, one batch at a time, off the event loop.

    While a batch runs, the next one fills: batches grow by themselves with the load. Beyond that, the first image of a
    batch waits at most `max_wait` seconds, and only for requests that are already inside: alone it does not wait.

    Args:
        run: Maps images of one shape to `[N, classes]`; called in a thread of its own, never twice at once.
        max_batch: Images in one call.
        max_wait: Seconds.
        places: Requests that may be inside at once, from the first byte of the body to the answer. This bounds the
            memory: each holds at most one body and one picture.
    """

    def __init__(
        self, run: Callable[[Sequence[np.ndarray]], np.ndarray], *, max_batch: int, max_wait: float, places: int
    ) -> None:
        self._run = run
        self._max_batch, self._max_wait, self._places = max_batch, max_wait, places
        self._taken = 0
        self._coming = 0  # requests inside whose image is not in the queue yet
        self._queue: asyncio.Queue[_Waiting | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._worker: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether images that are submitted will be answered."""
        return self._worker is not None and not self._worker.done()

    @property
    def full(self) -> bool:
        """Whether another request would be turned away."""
        return self._taken >= self._places

    async def serve(self, prepare: Callable[[], Awaitable[np.ndarray]]) -> tuple[np.ndarray, int]:
        """Take a place, prepare the image, and wait for its answer.

        Args:
            prepare: Reads and decodes; its errors pass through.

        Returns:
            `[classes]`, and how many images shared the call.

        Raises:
            FullError: No place is free.
        """
        if self.full:
            raise FullError
        self._taken += 1
        try:
            self._coming += 1
            try:
                waiting = _Waiting(await prepare())
            finally:
                self._coming -= 1
            self._queue.put_nowait(waiting)
            return await waiting.answer
        finally:
            self._taken -= 1

    async def start(self) -> None:
        """Begin to serve; needs a running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Answer everything that is waiting, then end."""
        self._queue.put_nowait(None)
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        last = False
        while not last:
            batch, last = await self._collect()
            by_shape: dict[tuple[int, ...], list[_Waiting]] = defaultdict(list)
            for waiting in batch:  # files that resize by themselves get pictures of many sizes
                by_shape[waiting.image.shape].append(waiting)
            for same in by_shape.values():
                await self._answer(same)

    async def _collect(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether it is the last."""
        first = await self._queue.get()
        if first is None:
            return [], True
        batch = [first]
        with contextlib.suppress(TimeoutError):
            # From its arrival: what filled up while the last batch ran does not wait again.
            async with asyncio.timeout_at(first.arrived + self._max_wait):
                while len(batch) < self._max_batch and (self._coming or not self._queue.empty()):
                    following = await self._queue.get()
                    if following is None:
                        return batch, True
                    batch.append(following)
        return batch, False

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self._thread, self._run, [waiting.image for waiting in batch])
            answers = list(zip(batch, rows, strict=True))
        except Exception as error:  # one bad batch must not end the service
            _log.exception("a batch of %d images failed", len(batch))
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        for waiting, row in answers:
            if not waiting.answer.done():
                waiting.answer.set_result((row, len(batch)))
