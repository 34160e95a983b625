"""What a run writes down: its history, its decisions and, for the case that it is killed, its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from robustcompress.checkpoint import Journal, State, Stateful
from robustcompress.checkpoint.plain import from_plain, to_plain
from robustcompress.distributed import ALONE, World
from robustcompress.interrupt import listen, stop_if_asked
from robustcompress.train import Progress

T = TypeVar("T")


class Run(ABC):
    """The record of a run. Abstract: a `Session` is one.

    Args:
        seed: Of the strategy's own randomness.
        progress: Where progress is shown.
        on_record: Called with every record of the history as it is written.
        journal: Where the run is recorded, to be resumed from there; None for nowhere.
        world: The processes that carry the run out together, each running the same script.

    Attributes:
        history: One record an epoch or an event.
        generator: The strategy's own randomness, on the CPU.
        progress: Where progress is shown.
        world: The processes that carry the run out together.
    """

    def __init__(
        self,
        seed: int,
        *,
        progress: Progress | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        journal: Journal | None = None,
        world: World = ALONE,
    ) -> None:
        self.world = world
        self.history: list[dict[str, Any]] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.progress = progress or Progress(enabled=False)
        self._on_record = on_record
        self._journal = journal
        self._kept: dict[str, Stateful] = {}

    @abstractmethod
    def _everything(self) -> State:
        """Where all lies that moves while nothing is trained."""

    @property
    def replaying(self) -> bool:
        """Whether a resumed run is still catching up, on weights that mean nothing."""
        return self._journal is not None and self._journal.replaying

    def decide(self, name: str, compute: Callable[[], T]) -> T:
        """Decide something by looking at weights, or by drawing from `generator`.

        All that a strategy computes from weights and uses beyond the next phase, or to choose what to do, goes through
        here: when a killed run is resumed, the script runs again on weights that mean nothing up to the phase that was
        interrupted, and gets the decision of the first time; `compute` is not called then. Of several processes all
        compute, and all get what the first one found.

        Args:
            name: What is decided, for messages.
            compute: Decides. Numbers, text, tensors, and lists and mappings (with text as keys) of them.

        Returns:
            What `compute` returned, as JSON keeps it: tuples are lists, tensors are on the CPU.
        """

        def agreed() -> Any:
            return self.world.broadcast(to_plain(name, compute()))

        if self._journal is not None:
            decided: T = self._journal.decide(name, agreed, self.generator)
            return decided
        result: T = from_plain(agreed())
        return result

    def keep(self, name: str, thing: Stateful) -> None:
        """Have checkpoints hold the state of something that a strategy or a training method owns.

        Call it before the phase in which the thing is used, in every run; a resumed run gives it its state back.

        Args:
            name: A name of its own.
            thing: Has `state_dict()`, of tensors and plain JSON, and `load_state_dict()`; any `nn.Module` does.
        """
        self._kept[name] = thing

    def forget(self, name: str) -> None:
        """Undo `keep`."""
        del self._kept[name]

    def repeat(self, phase: str, times: int, act: Callable[[int], Mapping[str, float]]) -> None:
        """Do something many times over that is no training step of this network, such as trying another one.

        One phase: a killed run goes on behind the last time that was written down, with the state of what `keep` keeps
        as it was then, and this network's weights in place.

        Args:
            phase: Its name in progress and history.
            times: How often.
            act: Given the number of the time, from 0 on; returns metrics to show.
        """
        done, state = 0, None
        if self._journal is not None:
            state = self._everything()
            done = self._journal.enter(phase, times, self.history, state)
        if done == times:
            return
        with self.progress.phase(phase, times, done) as bar:
            for number in range(done, times):
                bar.advance(act(number))
                listen(self.world)
                if self._journal is not None and state is not None:
                    self._journal.epoch_done(number + 1, self.history, state)
                else:
                    self._stop_if_asked(phase)

    def _stop_if_asked(self, phase: str) -> None:
        """For a run that is recorded nowhere; a journal looks itself, after it has written."""
        stop_if_asked(f"stopped in phase {phase!r}; nothing is kept of this run, which had no checkpoint")

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the history."""
        if self._journal is not None and self._journal.replaying:
            self.history.append(self._journal.replay_record(record, len(self.history)))
            return
        self.history.append(record)
        if self._on_record is not None:
            self._on_record(record)

    def say(self, line: str) -> None:
        """Tell the person who waits; what a resumed run has said is not said again."""
        if not self.replaying:
            self.progress.say(line)
