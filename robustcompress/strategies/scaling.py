"""The published scaling rule: no search, no score; the last stage is narrowed first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from robustcompress.errors import Problems
from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.strategies.base import (
    Direction,
    Strategy,
    Widths,
    check_numbers,
    fill_budget,
    floor_widths,
    largest,
    rounded,
    steps_of,
    uniform_widths,
)
from robustcompress.strategies.scratch import plant


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling(Strategy):
    """Widths by the rule of robust residual networks, trained from scratch for all epochs; zero evaluations.

    Huang et al. (NeurIPS 2021) found that less capacity in the last stage helps adversarial robustness; RobustResNet
    (Huang et al. 2022, arXiv 2212.11005) gives the three stages of a wide residual network the widths
    W1 : W2 : W3 = 2 : 2.5 : 1, in multiples of 16, 32 and 64 channels, which are the widths of a wide residual network
    without widening. So, relative to a reference widened evenly, the last stage has 1 / 2.5 = 0.4 of the second's
    multiplier and 1 / 2 of the first's.

    Ours: the rule for any network. Stages are the resolutions at which convolutions write. All groups share one ratio
    of their reference width, and those of the last stage have `last` times that; 0.4 is the paper's distance to its
    widest stage, and the slighter difference between the first two is left out. The depths are the reference's. Where
    the ratio would exceed `cap`, what is left of the budget widens the last stage again. A network of one resolution
    has no last stage: it is scaled evenly.

    Attributes:
        last: Width multiplier of the last stage over that of the others; 1 is `uniform`.
        cap: No group becomes wider than this multiple of the reference's width.
    """

    name: ClassVar[str] = "scaling"
    direction: ClassVar[Direction] = "prune"
    last: float = 0.4
    cap: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("scaling cannot run")
        check_numbers(problems, self, {"last": (0.01, 1.0), "cap": (1.0, 8.0)})
        problems.raise_if_any()

    def largest(self, widths: Widths) -> Widths:
        """Every group at its cap."""
        return {name: int(self.cap * width) for name, width in widths.items()}

    def run(self, session: Session) -> None:
        """Scale, then train."""
        plant(session, self._widths(session))
        session.train("train", share=1.0, select=True)

    def _widths(self, session: Session) -> Widths:
        stages = find_stages(session)
        if len(stages) < 2:
            session.say("scaling: the network has one resolution and so no last stage; every group is scaled evenly")
            return uniform_widths(session)
        session.say(f"scaling: stages at {', '.join(stages)}; the last has {self.last:g} times the others' multiplier")
        last = set(list(stages.values())[-1])
        full = {group.name: group.width for group in session.editor.editable}
        factors = {name: self.last if name in last else 1.0 for name in full}
        editor, round_to = session.editor, session.goal.round_to
        floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
        caps = {name: max(floor[name], int(self.cap * width)) for name, width in full.items()}

        def widths_at(ratio: float) -> Widths:
            return {n: rounded(ratio * factors[n] * width, steps[n], floor[n], caps[n]) for n, width in full.items()}

        def pick() -> Widths:
            widths = largest(session, widths_at, high=self.cap)
            # First whoever rounding put furthest behind the rule; what is left then widens the last stage past it.
            ruled = {name: max(widths[name], int(factors[name] * caps[name])) for name in full}
            return fill_budget(session, fill_budget(session, widths, ruled), caps)

        return session.choose("widths by the rule", pick)


def find_stages(session: Session) -> dict[str, list[str]]:
    """Editable groups by the resolution at which convolutions write them, the largest first.

    Groups that no convolution writes at a place of its own have no stage: hidden linear layers, and 1x1 convolutions on
    one position (squeeze and excitation).

    Returns:
        Group names by resolution, such as "16x16".
    """
    model, parameter = session.model, next(session.model.parameters())
    seen: dict[str, tuple[int, ...]] = {}
    handles = []
    writers = {g.name: [axis.module for axis in g.writers] for g in session.editor.editable}

    def watch(name: str, module: nn.modules.conv._ConvNd) -> None:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if math.prod(module.kernel_size) > 1 or math.prod(args[0].shape[2:]) > 1:
                seen[name] = tuple(output.shape[2:])

        handles.append(module.register_forward_hook(hook))

    for name in {writer for names in writers.values() for writer in names}:
        module = model.get_submodule(name)
        if isinstance(module, nn.modules.conv._ConvNd):
            watch(name, module)
    example = torch.zeros(2, *session.goal.data.image_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with eval_mode(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    places = {
        group: max((seen[n] for n in names if n in seen), key=math.prod, default=()) for group, names in writers.items()
    }
    stages: dict[str, list[str]] = {}
    for place in sorted(set(places.values()) - {()}, key=math.prod, reverse=True):
        stages["x".join(map(str, place))] = [group for group, found in places.items() if found == place]
    return stages
