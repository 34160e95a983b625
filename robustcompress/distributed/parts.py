"""Which parts of every batch are this process's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from robustcompress.distributed.world import ALONE, World
from robustcompress.errors import InputError


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that every batch is cut into, as equal as they can be, and which of them this process has.

    What a step computes depends on `total` alone, not on who computes which part.

    Attributes:
        total: How many there are.
        world: Among whose processes they are dealt: each has consecutive ones, and one at least.
        pieces: Into how many pieces each of them is cut in turn, where a part is too large for the memory.
    """

    total: int = 1
    world: World = ALONE
    pieces: int = 1

    def __post_init__(self) -> None:
        if self.world.size > self.total:
            raise InputError(
                f"{self.world.size} processes cannot share {self.total} parts of a batch: start {self.total} at most, "
                f"or begin a new run with accumulate={self.world.size}"
            )

    def __str__(self) -> str:
        uneven = self.total % self.world.size
        waiting = f": some wait for others, as {self.world.size} does not divide {self.total}" if uneven else ""
        return f"{self.world.size} processes share the {self.total} parts of every batch{waiting}"

    @property
    def whole(self) -> bool:
        """Whether a batch is not cut at all."""
        return self.total * self.pieces == 1

    @property
    def own(self) -> range:
        """The numbers of this process's parts."""
        bounds = _bounds(self.total, self.world.size)
        return range(bounds[self.world.rank], bounds[self.world.rank + 1])

    def cut(self, count: int) -> list[tuple[int, int]]:
        """The number and the size of each piece of this process's parts, of a batch of `count`; empty ones left out."""
        found = []
        for part in self.own:
            edges = _bounds(self._bounds(count)[part + 1] - self._bounds(count)[part], self.pieces)
            sizes = (end - begin for begin, end in pairwise(edges))
            found += [(part * self.pieces + piece, size) for piece, size in enumerate(sizes) if size]
        return found

    def rows(self, count: int) -> slice:
        """Where the images of this process's parts lie in a batch of `count`; cutting finer moves none of them."""
        bounds = self._bounds(count)
        return slice(bounds[self.own.start], bounds[self.own.stop])

    def finer(self, total: int) -> Parts:
        """The same, each part cut in pieces, so that there are `total` of them or a few more."""
        return replace(self, pieces=max(1, -(-total // self.total)))

    def check(self, count: int) -> None:
        """Raise InputError where a batch of `count` images has not one for each part."""
        if self.total > count:
            raise InputError(
                f"a batch of {count} images cannot be cut into {self.total} parts: give a smaller accumulate, fewer "
                "processes, or more images a batch"
            )

    def _bounds(self, count: int) -> list[int]:
        return _bounds(count, self.total)


def plan(accumulate: int, world: World, *, recorded: int | None = None) -> Parts:
    """Choose into how many parts batches are cut.

    Args:
        accumulate: What the recipe says; 1 leaves it open.
        world: The processes.
        recorded: What a run that goes on was begun with; None for a new run.

    Returns:
        `accumulate` parts, or one for each process where that is open. A run that goes on keeps what it has, so that it
        computes the same with more processes or fewer.

    Raises:
        InputError: Some process would have nothing to do.
    """
    if recorded is not None and accumulate in (1, recorded):
        return Parts(recorded, world)
    if 1 < accumulate < world.size:
        raise InputError(
            f"accumulate={accumulate} leaves {world.size - accumulate} of {world.size} processes without a part of the "
            f"batch: give accumulate={world.size}, or a multiple of it, or leave it out"
        )
    return Parts(world.size if accumulate == 1 else accumulate, world)


def _bounds(count: int, parts: int) -> list[int]:
    """Where each of `parts` begins, and the last ends, as `torch.tensor_split` cuts."""
    size, larger = divmod(count, parts)
    return list(accumulate((size + (part < larger) for part in range(parts)), initial=0))
