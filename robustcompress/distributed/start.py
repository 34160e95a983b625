"""How processes find each other: from torchrun's environment, or because the caller has seen to it."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from robustcompress.distributed.world import ALONE, DistributedError, World
from robustcompress.errors import InputError

TIMEOUT = timedelta(hours=24)
"""One process may measure, save or export for long while the others wait; that one has died is for torchrun to see."""

JOINED_BY = timedelta(minutes=30)
"""When all processes have to be there."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_control: tuple[Any, Any] = (None, None)  # the default group, and the one for tensors on the CPU that belongs to it


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that torchrun, or anything that speaks as it does, has started."""
    return all(name in environment for name in _LAUNCHED)


def current() -> World:
    """What torch.distributed says; one process where it was not started."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    rank = dist.get_rank()
    local = int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
    return World(rank, dist.get_world_size(), local, _group())


def start() -> World:
    """Join the other processes that torchrun has started, if it has; then what `current` says.

    The backend is nccl for tensors on GPUs, where there are any (each process takes that of its `LOCAL_RANK`), and gloo
    for those on the CPU. A group that the caller has made is used as it is. The processes part at exit.

    Raises:
        InputError: There are more processes on this machine than GPUs, of which there are some.
    """
    if not launched() or dist.is_initialized() or os.environ["WORLD_SIZE"] == "1":
        return current()
    if not dist.is_available():
        raise InputError("this torch is built without torch.distributed: start one process, without torchrun")
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise InputError(
                f"torchrun started process {local} of this machine, which has {gpus} GPUs: --nproc-per-node {gpus}, or "
                "CUDA_VISIBLE_DEVICES= for the CPU"
            )
        torch.cuda.set_device(local)
    served, rank, size = next(iter(rendezvous("env://", timeout=JOINED_BY)))
    store = PrefixStore(_incarnation(served, rank, size), served)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    atexit.register(stop)
    return current()


def _incarnation(store: Any, rank: int, size: int) -> str:
    """A name that these very processes share, and none that torchrun has started before them.

    The store outlives processes: torchrun's agent serves the same one to those that it starts again, in which the
    addresses of the dead still stand. Whoever is quick reads one of them, and waits for a process that is no more.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name: str = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    answered: set[str] = set()
    others, limit = range(1, size), time.monotonic() + JOINED_BY.total_seconds()
    while not all(store.check([f"heard/{mine}/{other}"]) for other in others):
        for other in others:  # what stands there may be of a dead one, and be replaced any moment
            token = store.get(f"hello/{other}").decode() if store.check([f"hello/{other}"]) else ""
            if token and token not in answered:
                store.set(f"answer/{token}", mine)
                answered.add(token)
        if time.monotonic() > limit:
            raise DistributedError(f"not all of {size} processes came within {JOINED_BY}")
        time.sleep(0.02)
    return mine


def stop() -> None:
    """Part from the other processes; nothing happens where there are none."""
    global _control
    _control = (None, None)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _group() -> Any:
    """The group for tensors on the CPU: None, the default one, if it takes them; else one of gloo, made once."""
    global _control
    default = dist.group.WORLD
    if _control[0] is not default:
        takes = "gloo" in str(dist.get_backend_config())
        _control = (default, None if takes else dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _control[1]
