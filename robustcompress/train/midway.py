"""What training remembers within an epoch and nowhere else, so that a run can be left after any step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Remembers(Protocol):
    """Anything whose state is plain JSON and tensors by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take a state."""
        ...


class Midway:
    """Gathers the parts that matter until the end of an epoch; what a checkpoint gave back waits for its part.

    Running means, the memory of an objective, what a guard would go back to: at the end of an epoch all of it is empty
    or known from elsewhere, so that only a checkpoint within an epoch holds it.

    Attributes:
        complete: Whether the parts tell all there is; else a checkpoint has to wait for the end of the epoch.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Remembers] = {}
        self._found: dict[str, Any] = {}
        self.complete = True

    def hold(self, name: str, part: Remembers) -> None:
        """Have checkpoints hold a part from now on; one that was found in a checkpoint gets its state back first.

        Args:
            name: Of its own; a part of the same name is replaced.
            part: What is remembered.
        """
        self._parts[name] = part
        prefix = f"{name}/"
        found = {key: value for key, value in self._found.items() if key.startswith(prefix)}
        if found:
            self._found = {key: value for key, value in self._found.items() if key not in found}
            part.load_state_dict({key.removeprefix(prefix): value for key, value in found.items()})

    def drop(self, name: str) -> None:
        """Hold a part no longer, if it was held."""
        self._parts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts."""
        return {
            f"{name}/{key}": value for name, part in self._parts.items() for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; each part gets its own when it is held."""
        self._found = dict(state)
