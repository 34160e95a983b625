"""Which process of how many this is, and how they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustcompress import errors
from robustcompress.distributed.packing import flatten, pack, restore, sizes, unpack
from robustcompress.errors import RobustCompressError

T = TypeVar("T")


class DistributedError(RobustCompressError):
    """Another process failed, or the processes do not do the same."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run. All methods are for all of them to call, in the same order.

    Attributes:
        rank: Number of this process, from 0 on.
        size: How many there are.
        local_rank: Number of this process on its machine: its GPU.
        control: The group that tensors on the CPU go through; None for the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks, writes and decides."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """What the first process gives here: plain JSON with tensors (which come back on the CPU).

        Tensors are sent one by one, so a checkpoint of any size may be.
        """
        if self.size == 1:
            return value
        text, tensors = flatten(value) if self.first else (b"", [])
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, group=self.control)
        head = torch.frombuffer(bytearray(text or int(length)), dtype=torch.uint8)
        dist.broadcast(head, 0, group=self.control)
        if not self.first:
            text = head.numpy().tobytes()
            tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes(text)]
        for tensor in tensors:
            if len(tensor):
                dist.broadcast(tensor, 0, group=self.control)
        result: T = value if self.first else restore(text, tensors)
        return result

    def gather(self, value: T) -> list[T]:
        """What every process gives here, in their order: plain JSON with tensors (which come back on the CPU)."""
        if self.size == 1:
            return [value]
        row = pack(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(row)]), group=self.control)
        most = max(int(length) for length in lengths)
        rows = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.cat([row, torch.zeros(most - len(row), dtype=torch.uint8)]), group=self.control)
        return [value if rank == self.rank else unpack(other) for rank, other in enumerate(rows)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, on the device that it is on."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over all processes, in double precision."""
        found: list[float] = self.sum_(torch.tensor([float(value) for value in values], dtype=torch.float64)).tolist()
        return found

    def most(self, number: int) -> int:
        """The largest of the whole numbers that the processes give."""
        tensor = torch.tensor([number])
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.most(int(flag)))

    def share(self, items: int) -> range:
        """The numbers of the items that are this process's, of so many: dealt like cards."""
        return range(self.rank, items, self.size)

    def only_first(self, act: Callable[[], T]) -> T:
        """Have the first process act, for all: the others wait, and get what it returned, or the error that it met.

        Args:
            act: Returns plain JSON with tensors; exchanges nothing itself.

        Raises:
            RobustCompressError: What the first process raised.
            DistributedError: It met an error of another kind, which it raises itself.
        """
        if self.size == 1:
            return act()
        answer: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.first:
            try:
                answer = {"value": act()}
            except Exception as error:
                failure, answer = error, _told(error)
        sent = self.broadcast(answer)
        if failure is not None:
            raise failure
        if "error" in sent:
            raise _raised(sent, "process 0: ")
        result: T = sent["value"]
        return result

    def together(self, act: Callable[[], T]) -> T:
        """Have every process act, and go on only where all could.

        Args:
            act: Exchanges nothing itself.

        Raises:
            RobustCompressError: In all processes, where any of them met one, or an error of the system.
        """
        if self.size == 1:
            return act()
        told: dict[str, Any] = {}
        failure: BaseException | None = None
        result: T | None = None
        try:
            result = act()
        except (RobustCompressError, OSError) as error:
            failure, told = error, _told(error)
        for rank, other in enumerate(self.gather(told)):
            if other:
                if failure is not None and self.first:
                    raise failure
                raise _raised(other, f"process {rank}: " if rank else "")
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum_(torch.zeros(1))


ALONE = World()
"""One process."""


def _told(error: BaseException) -> dict[str, Any]:
    return {"error": str(error) or type(error).__name__, "kind": type(error).__name__}


def _raised(told: Mapping[str, Any], prefix: str) -> RobustCompressError:
    """The error of another process, as what it was there."""
    kind = getattr(errors, str(told["kind"]), None)
    known = isinstance(kind, type) and issubclass(kind, RobustCompressError)
    text = told["error"] if known else f"{told['kind']}: {told['error']}"
    error: RobustCompressError = (kind if known else DistributedError)(f"{prefix}{text}")  # type: ignore[misc]
    return error
