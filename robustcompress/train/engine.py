"""What processes that train one network add up in every step: gradients, batch-norm statistics, meters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustcompress.distributed import DistributedError, World
from robustcompress.errors import first_line
from robustcompress.robust.memory import is_out_of_memory

Compression = Literal["none", "fp16", "bf16", "powersgd"]
"""How gradients travel between processes."""

COMPRESSIONS = get_args(Compression)

POWERSGD_RANK, POWERSGD_BEGINS = 2, 10
"""Of PowerSGD: the rank of what is sent, and how many steps of a phase send whole gradients first."""


class PeerMemoryError(MemoryError):
    """Memory ran out in another process, and all make the step again."""


class _Holder(nn.Module):
    """The parameters that a phase trains, whoever owns them: a network, gates."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.moving = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        """Return the loss that was computed from the parameters."""
        return loss


class Engine:
    """Adds up gradients and statistics over the parts of a step, of one process or of several.

    Between processes gradients are added by `DistributedDataParallel`, made anew for every phase and so after every
    edit. It wraps a holder of the optimizer's parameters, not the network: attacks and ascents run on the network
    itself, whose passes exchange nothing, and the finished loss goes through the wrapper once, which arms the reducer
    for the backward pass.

    Args:
        model: The network; its buffers are averaged.
        parameters: What moves.
        world: The processes.
        compression: How gradients travel.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        world: World,
        compression: Compression = "none",
    ) -> None:
        self.world = world
        self._compression = compression
        self._parameters = [p for p in parameters if p.requires_grad]
        buffers = list(model.buffers())
        self._floating = [b for b in buffers if b.is_floating_point() and b.numel()]
        self._counters = [b for b in buffers if not b.is_floating_point()]
        self._wrapped: DistributedDataParallel | None = None
        self._asked = False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Make a step such that all processes can make it again where memory runs out in one of them.

        They look once, before the last backward pass, which exchanges gradients: a process that has failed by then is
        heard, and the others fail with it. One that fails behind that has to be started again.

        Raises:
            PeerMemoryError: In those that have not failed themselves.
        """
        self._asked = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self.world.size > 1 and is_out_of_memory(error) and not isinstance(error, PeerMemoryError):
                if self._asked:
                    raise DistributedError(
                        f"memory ran out in process {self.world.rank} while gradients were exchanged "
                        f"({first_line(error)}): give a larger accumulate"
                    ) from error
                self._ask(failed=True)
            raise

    def _ask(self, *, failed: bool) -> bool:
        """Whether any process has failed in this attempt."""
        self._asked = True
        return self.world.any(failed)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a loss to `.grad`; behind the last of a step it is that of all processes.

        Args:
            loss: Scalar with its graph, times its part's share of the batch.
            last: Whether it is this process's last part of the step.
        """
        if self.world.size == 1:
            torch.autograd.backward(loss)
            return
        scaled = loss * self.world.size  # the wrapper takes the mean over processes: what is wanted is the sum
        if last and self._ask(failed=False):
            raise PeerMemoryError("memory ran out in another process")
        if self._wrapped is None and not last:
            torch.autograd.backward(scaled)
            return
        wrapped = self._wrapped = self._wrapped or self._wrap(scaled)
        with nullcontext() if last else wrapped.no_sync():
            torch.autograd.backward(wrapped(scaled))

    @contextmanager
    def buffers_averaged(self) -> Iterator[Callable[[float], None]]:
        """Let each part of a step move the buffers from where they stand now; leave the mean of all.

        Yields:
            To be called behind each part, with its share of the batch. Counters are those behind any one part.
        """
        floating, counters = self._floating, self._counters
        before = [b.clone() for b in (*floating, *counters)]
        sums = [torch.zeros_like(b) for b in floating]
        done = 0

        def note(share: float) -> None:
            nonlocal done
            done += 1
            if floating:
                torch._foreach_add_(sums, floating, alpha=share)
            now = [b.clone() for b in counters]
            _copy([*floating, *counters], before)
            after[:] = now

        after: list[Tensor] = []
        try:
            yield note
        except BaseException:
            _copy([*floating, *counters], before)
            raise
        if floating and self.world.size > 1:
            flat = self.world.sum_(torch.cat([s.reshape(-1) for s in sums]))
            pieces = torch.split(flat, [s.numel() for s in sums])
            sums = [piece.view(s.shape).to(s.dtype) for piece, s in zip(pieces, sums, strict=True)]
        if done:
            _copy([*floating, *counters], [*sums, *after])

    def total(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch, from each process's share of it."""
        return loss if self.world.size == 1 else self.world.sum_(loss.detach().double())

    def totals(self, values: Sequence[Tensor | float], device: torch.device) -> list[Tensor | float]:
        """Sums of numbers over all processes, exchanged at once; of one process the numbers as they are."""
        if self.world.size == 1:
            return list(values)
        numbers = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        return list(self.world.sum_(torch.stack(numbers)))

    def close(self) -> None:
        """Let go of the parameters: hooks of a wrapper must not outlive the phase."""
        if self._wrapped is not None:
            self._wrapped._remove_autograd_hooks()  # type: ignore[no-untyped-call]
            self._wrapped = None

    def _wrap(self, loss: Tensor) -> DistributedDataParallel:
        """The wrapper of this phase, for a graph such as that of this loss."""
        reached = _leaves(loss)
        spare = self.world.any(any(id(p) not in reached for p in self._parameters))
        wrapped = DistributedDataParallel(
            _Holder(self._parameters),
            find_unused_parameters=spare,
            init_sync=False,  # they are equal already, and the graph of this loss must not see them written to
        )
        _compress(wrapped, self._compression)
        return wrapped


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _leaves(loss: Tensor) -> set[int]:
    """Which tensors the backward pass of a loss would leave a gradient in."""
    found: set[int] = set()
    seen: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    return found


def _compress(wrapped: DistributedDataParallel, compression: Compression) -> None:
    if compression == "none":
        return
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_BEGINS
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        hook = default_hooks.fp16_compress_hook if compression == "fp16" else default_hooks.bf16_compress_hook
        wrapped.register_comm_hook(None, hook)
