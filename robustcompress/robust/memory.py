"""Telling an error of too little memory from others, and what to do before the next try."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustcompress.allocator import KEEPER
from robustcompress.distributed import World

_CPU = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _CPU)


@contextmanager
def memory_of_all(world: World) -> Iterator[None]:
    """Have memory run out in all processes where it did in one: each then goes on to make the same again.

    Args:
        world: The processes; none of them exchanges anything within the block.

    Raises:
        MemoryError: Memory ran out in another process.
    """
    failure: BaseException | None = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if world.size == 1 or not is_out_of_memory(error):
            raise
        failure = error
    if world.size > 1 and world.any(failure is not None):
        raise failure or MemoryError("memory ran out in another process")


def release() -> None:
    """Give back what nobody uses, and what the allocators keep for later."""
    gc.collect()
    KEEPER.give_up()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
