"""A stopwatch that needs no time and knows no noise."""

from __future__ import annotations

import torch
from torch import nn

from robustcompress.export.timing import Stopwatch
from robustcompress.latency import Timing


def clock(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Milliseconds that a network takes here: dear multiply-adds where the image is large, dear outputs, a constant."""
    seen: list[float] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = module.get_parameter("weight")
        places = output.shape[2:].numel() if output.dim() == 4 else 1
        slope = 3.0 if places > 16 else 1.0
        seen.append(slope * weight.numel() * places + 40.0 * output[0].numel())

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return 0.02 + 1e-6 * sum(seen)


class Clockwork:
    """Stands where `Stopwatch` stands."""

    jag = 0.0
    speed = 1.0  # of the whole machine: nothing should depend on it
    late = 1.0  # what the finished network takes more
    timed = 0

    def __init__(self, editor: object, image_shape: tuple[int, int, int]) -> None:
        self._real = Stopwatch(editor, image_shape)  # type: ignore[arg-type]
        self._shape = image_shape
        self._reference = clock(self._real.resized({}), image_shape)

    def resized(self, widths: dict[str, int], *, without: tuple[str, ...] = ()) -> nn.Module:
        return self._real.resized(widths, without=without)

    def time(self, model: nn.Module, *, seconds: float = 1.0, precision: float | None = None) -> Timing:
        type(self).timed += 1
        ms = clock(model.cpu(), self._shape)
        odd = sum(m.out_channels % 4 > 0 for m in model.modules() if isinstance(m, nn.Conv2d))
        late = self.late if seconds > 1.5 else 1.0
        return Timing(self.speed * ms * (1 + self.jag * odd) * late, self.speed * self._reference)
