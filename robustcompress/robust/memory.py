"""Telling an error of too little memory from others, and what to do before the next try."""

from __future__ import annotations

import gc

import torch

_CPU = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _CPU)


def release() -> None:
    """Give back what nobody uses, and what the allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
