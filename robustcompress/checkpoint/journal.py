"""What a run has done so far: written to a checkpoint as it goes, played back when the run starts again.

A strategy is a deterministic script over phases. When a killed run starts again its script runs again: finished
phases return at once, edits are carried out again on weights that mean nothing, and what was decided by looking at
weights is read from the journal. Where the script reaches the phase that the checkpoint was written in, the state of
that moment is put in place, and training goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from robustcompress.checkpoint.disk import NotWrittenError
from robustcompress.checkpoint.files import Checkpoint, read, settle, write
from robustcompress.checkpoint.identity import same_run
from robustcompress.checkpoint.plain import from_plain, to_plain
from robustcompress.checkpoint.state import State
from robustcompress.distributed import ALONE, World
from robustcompress.errors import CheckpointError, OutOfTime
from robustcompress.interrupt import asked, stop_if_asked
from robustcompress.train import TrainingError

T = TypeVar("T")


class Journal:
    """The record of one run, in one directory.

    Args:
        directory: Holds the checkpoint, or will.
        identity: What makes a run the same run, as plain JSON by name (see `compress`), given that of the run that is
            recorded there already: what may be left open follows it.
        versions: Versions by name; a difference is said, and no error.
        every_s: Least seconds between two writes within a phase, within an epoch or at its end.
        deadline: When to stop, on the clock of `time.monotonic`; None for never.
        say: Tells the person who waits.
        world: The processes of the run, each of which has a journal of it; the first alone reads and writes.

    Attributes:
        identity: Of this run.
        replaying: Whether the script has not yet reached the point where the run was interrupted.

    Raises:
        InputError: The directory holds the checkpoint of another run.
        CheckpointError: The checkpoint is damaged.
    """

    def __init__(
        self,
        directory: Path,
        identity: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        versions: Mapping[str, str],
        every_s: float = 60.0,
        deadline: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        world: World = ALONE,
    ) -> None:
        self.directory = directory
        self.identity: dict[str, Any] = {}
        self._identify, self._world = identity, world
        self._versions = dict(versions)
        self._every_s = every_s
        self._deadline = deadline
        self._say = say
        self._written = time.monotonic()
        self._mark: float | None = self._written  # when the epoch began; None where this process did not begin it
        self._last_epoch: float | None = None  # unknown until this process has trained one: each call gets somewhere
        self._phases: list[dict[str, Any]] = []  # finished ones, see `_begin`
        self._here: dict[str, Any] = {}
        self._decisions: list[dict[str, Any]] = []
        self._replayed = 0  # decisions read back
        self._failing, self._standing = "", "there is none yet"  # why nothing can be written, and what was before
        self._found: Checkpoint | None = self._open()
        self._history: list[dict[str, Any]] = self._found.record["history"] if self._found is not None else []

    @property
    def replaying(self) -> bool:
        """Whether what happens now has happened before."""
        return self._found is not None

    def decide(self, name: str, compute: Callable[[], T], generator: torch.Generator) -> T:
        """Return what `compute` returns, or returned when this was decided; `generator` then stands as it did after."""
        if self._found is None:
            before = generator.get_state()
            value = to_plain(name, compute())
            after = generator.get_state()
            drawn = None if torch.equal(before, after) else bytes(after.tolist()).hex()
            self._decisions.append({"name": name, "value": value, "drawn": drawn})
        else:
            logged = self._found.record["decisions"]
            if self._replayed == len(logged) or logged[self._replayed]["name"] != name:
                self._diverged(f"it decides on {name!r}")
            value, drawn = logged[self._replayed]["value"], logged[self._replayed]["drawn"]
            self._replayed += 1
            if drawn is not None:
                generator.set_state(torch.tensor(list(bytes.fromhex(drawn)), dtype=torch.uint8))
        result: T = from_plain(value)
        return result

    def replay_record(self, record: Mapping[str, Any], position: int) -> dict[str, Any]:
        """The record that stands at this position of the history, for one that the script writes again."""
        labels = ("phase", "event")
        logged = self._history[position] if position < len(self._history) else {}
        if any(logged.get(label) != record.get(label) for label in labels):
            self._diverged(f"it records {[record.get(label) for label in labels]}")
        return logged

    def enter(self, phase: str, steps: int, history: list[dict[str, Any]], state: State) -> int:
        """Begin a phase.

        Args:
            phase: Its name.
            steps: Its length.
            history: The run's history; records that were written already are added to it.
            state: Where the run's state lives; restored if this is the phase that was interrupted.

        Returns:
            How many steps are done; `steps` for a phase that had finished.

        Raises:
            CheckpointError: The script went another way than the run that wrote the checkpoint.
            OutOfTime: The deadline leaves no time for an epoch.
        """
        if self._found is None:
            self._stop_in_time(phase, 0, steps)
            self._here = {"name": phase, "steps": steps, "began": [len(history), len(self._decisions)]}
            self._mark = time.monotonic()
            return 0
        record = self._found.record
        number = len(self._phases)
        logged = (record["phases"] + [record["phase"]])[number]
        here = {"name": phase, "steps": steps, "began": [len(history), self._replayed]}
        if any(logged[key] != value for key, value in here.items()):
            self._diverged(f"it comes to phase {phase!r} of {steps} steps")
        ended, self._replayed = logged["ended"]
        history[:] = self._history[:ended]
        if number < len(record["phases"]):
            self._phases.append(logged)
            return steps
        self._here = here
        return self._arrive(logged, state)

    def _arrive(self, logged: dict[str, Any], state: State) -> int:
        found = self._found
        assert found is not None
        try:
            same_device = state.restore(found.tensors, found.record["state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not hold this run's state ({error}); {self._remedy}") from error
        except CheckpointError as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error}; {self._remedy}") from error
        self._decisions, self._found = found.record["decisions"], None
        done: int = logged["done"]
        self._standing = f"the last one, of phase {logged['name']!r} after {done} steps, stands"
        self._say(f"resumed from {self.directory}: phase {logged['name']!r}, {done} of {logged['steps']} steps done")
        if found.small:
            self._say("the checkpoint is of the small form, which rounds: the run goes on approximately")
        if not same_device:
            self._say("the checkpoint is of another kind of device: the attack draws new noise")
        if done == logged["steps"]:
            self._phases.append(self._here | {"ended": logged["ended"]})
        self._written = time.monotonic()
        self._mark = None if "midway" in found.record["state"] else self._written
        return done

    def epoch_done(self, done: int, history: list[dict[str, Any]], state: State) -> None:
        """Write a checkpoint where one is due, and stop the run where the next epoch would miss the deadline.

        Args:
            done: Steps done in the phase.
            history: The run's history.
            state: Where the run's state lives.

        Raises:
            OutOfTime: The deadline would be missed, or a signal asked to stop.
        """
        now = time.monotonic()
        if self._mark is not None:
            self._last_epoch = now - self._mark
        self._mark = now
        steps = self._here["steps"]
        # At a phase's end nothing is known of what comes next, which may be nothing: `enter` looks at the clock there.
        late = done < steps and self._is_late()
        if late or done == steps or self._is_due() or asked():
            self._write(done, history, state)
        self._stop_if_asked(done)
        if done == steps:
            self._phases.append(self._ended(history))
        elif late:
            self._stop_in_time(self._here["name"], done, steps)

    def step_done(self, done: int, history: list[dict[str, Any]], state: State) -> None:
        """Write a checkpoint within an epoch where one is due.

        Args:
            done: Steps done in the phase.
            history: The run's history.
            state: Where the run's state lives.

        Raises:
            Interrupted: A signal asked to stop.
        """
        if (self._is_due() or asked()) and (state.midway is None or state.midway.complete):
            self._write(done, history, state, within=True)
            self._stop_if_asked(done)

    def _is_due(self) -> bool:
        return time.monotonic() - self._written >= self._every_s

    def _ended(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return self._here | {"ended": [len(history), len(self._decisions)]}

    def _write(self, done: int, history: list[dict[str, Any]], state: State, *, within: bool = False) -> None:
        if not state.is_finite():
            raise TrainingError(
                f"weights are not finite in phase {self._here['name']!r} after {done} steps; lower the learning rate, "
                f"or set clip_norm=1.0; of the checkpoints in {self.directory}, {self._standing}"
            )
        self._written = time.monotonic()
        if not self._world.first:
            return
        tensors, record = state.gather(within=within)
        run = {
            "identity": self.identity,
            "versions": self._versions,
            "phases": self._phases,
            "phase": self._ended(history) | {"done": done},
            "decisions": self._decisions,
            "history": history,
            "state": record,
        }
        self._written = time.monotonic()  # also where it fails: the next interval tries again
        try:
            write(self.directory, run, tensors)
        except NotWrittenError as error:
            if not self._failing:
                self._say(f"warning: {error}; {self._standing}, and training goes on; trying again every interval")
            self._failing = str(error)
            return
        if self._failing:
            self._say(f"checkpoints are written to {self.directory} again")
        self._failing = ""
        self._standing = f"the last one, of phase {self._here['name']!r} after {done} steps, stands"
        self._written = time.monotonic()

    def finish(self) -> None:
        """Raise a CheckpointError when the script ended before it reached what it had done."""
        if self._found is not None:
            self._diverged("it ends")

    @property
    def _remedy(self) -> str:
        return f"remove {self.directory} to begin anew"

    def _open(self) -> Checkpoint | None:
        found = self._read()
        if found is None:
            self.identity = json.loads(json.dumps(self._identify({})))
            return None
        try:
            record = found.record
            identity, versions = dict(record["identity"]), dict(record["versions"])
            parts = [*record["phases"], record["phase"]]
            sound = all({"name", "steps", "began", "ended"} <= part.keys() for part in parts)
            sound &= "done" in record["phase"] and isinstance(record["history"], list)
            sound &= all({"name", "value", "drawn"} <= decision.keys() for decision in record["decisions"])
            sound &= {"epoch", "device", "values", "kept", "edits"} <= record["state"].keys()
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise CheckpointError(f"the checkpoint in {self.directory} is damaged; {self._remedy}")
        self.identity = json.loads(json.dumps(self._identify(identity)))
        same_run(f"checkpoint={self.directory}", identity, self.identity)
        for name in sorted(versions.keys() | self._versions.keys()):
            if versions.get(name) != self._versions.get(name):
                self._say(
                    f"warning: the checkpoint was written with {name} {versions.get(name)}, this is "
                    f"{self._versions.get(name)}: results may differ"
                )
        if found.note:
            self._say(f"warning: {found.note}")
            if self._world.first:
                settle(self.directory)
        self._say(f"going on with the run in {self.directory}")
        return found

    def _read(self) -> Checkpoint | None:
        def tell() -> list[Any] | None:
            found = read(self.directory)
            return None if found is None else [found.record, found.tensors, found.small, found.note]

        told = self._world.only_first(tell)
        if told is None:
            return None
        return Checkpoint(record=told[0], tensors=told[1], small=told[2], note=told[3])

    def _is_late(self) -> bool:
        if self._deadline is None or self._last_epoch is None:
            return False
        return self._world.broadcast(time.monotonic() + self._last_epoch > self._deadline)

    def _stop_if_asked(self, done: int) -> None:
        stop_if_asked(self._stopped(self._here["name"], done, self._here["steps"]))

    def _stopped(self, phase: str, done: int, steps: int) -> str:
        """What is said of a stop, and where the run goes on."""
        failed = f", but {self._failing}; {self._standing}" if self._failing else ""
        return (
            f"stopped in phase {phase!r} after {done} of {steps} steps{failed}; the same call with "
            f"checkpoint={str(self.directory)!r} goes on from there"
        )

    def _stop_in_time(self, phase: str, done: int, steps: int) -> None:
        if self._is_late():
            raise OutOfTime(f"the deadline leaves no time for another epoch: {self._stopped(phase, done, steps)}")

    def _diverged(self, what: str) -> None:
        raise CheckpointError(
            f"the run went another way than the one that wrote {self.directory}: {what}, which that run did not do at "
            "this point. Did the code change? A strategy must put what it decides by looking at weights through "
            f"session.decide(); {self._remedy}"
        )
