"""Adversarial spectral utilization: how much of a group's width is in use, and how hard the attack presses on it.

Reconstructed: GRAPE's abstract names the score and no more. Its parts are from the literature on spectra of
representations: effective rank (Roy and Vetterli 2007) and participation ratio, joined by their harmonic mean as in
spectral scaling laws (Jha and Reagen 2025), times the root mean square of the adversarial loss's gradient, because an
activation spectrum alone hardly changes under attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.structure.kinds import kind_of

POSITIONS = 4096
"""Spectra are estimated from at most so many positions a batch."""


@dataclass(frozen=True, slots=True)
class Utilization:
    """The score of one group.

    Attributes:
        soft_rank: Effective rank of the activations' covariance over the width, in (0, 1].
        hard_rank: Its participation ratio over the width, in (0, 1].
        pressure: RMS gradient of the adversarial loss at the activations, relative to the mean over groups.
    """

    soft_rank: float
    hard_rank: float
    pressure: float

    def score(self, beta: float) -> float:
        """Harmonic mean of the two ranks times `pressure ** beta`; never below 1e-6."""
        used = 2 * self.soft_rank * self.hard_rank / max(self.soft_rank + self.hard_rank, 1e-12)
        return float(max(1e-6, used * self.pressure**beta))

    def to_json(self) -> dict[str, float]:
        """The parts as plain JSON."""
        return asdict(self)


def measure_utilization(session: Session, groups: Sequence[str], *, batches: int) -> dict[str, Utilization]:
    """Score groups on attacked training images, on the averaged network in eval mode.

    Args:
        session: The network under compression.
        groups: Which groups; each is read in evaluation mode, too.
        batches: How many attacked batches to look at.
    """
    net = session.averaged
    covariance: dict[str, torch.Tensor] = {}
    gradient: dict[str, float] = dict.fromkeys(groups, 0.0)
    for x, y in session.attacked(batches):
        with _Taps(session, net, groups) as taps, eval_mode(net), torch.enable_grad():
            loss = F.cross_entropy(net(x.requires_grad_()), y)
            gradients = torch.autograd.grad(loss, [taps.seen[name] for name in groups])
        for name, slope in zip(groups, gradients, strict=True):
            activations = taps.channels(name, taps.seen[name].detach())
            covariance[name] = covariance.get(name, 0) + _covariance(activations)
            # The mean loss divides by the batch; undone here, so that the batch size does not enter the score.
            gradient[name] += float((taps.channels(name, slope) * len(y)).square().mean().sqrt())
    mean = sum(gradient.values()) / len(gradient)
    return {name: Utilization(*_ranks(covariance[name]), gradient[name] / max(mean, 1e-20)) for name in groups}


class _Taps:
    """Holds what each group's first reader is given, while a forward pass runs."""

    def __init__(self, session: Session, net: nn.Module, groups: Sequence[str]) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self._net, self._handles = net, list[torch.utils.hooks.RemovableHandle]()
        layout, widths = session.editor.layout, session.editor.widths
        self._axes = {
            name: next(axis for axis in layout.groups[name].readers if axis.module not in layout.auxiliary)
            for name in groups
        }
        # Sorted by channel: behind a flatten each channel has several positions, which are samples of one activation.
        self._positions = {
            name: torch.argsort(owners, stable=True)[int((owners < 0).sum()) :].view(widths[name], -1)
            for name, owners in ((name, layout.owners(axis, name, widths)) for name, axis in self._axes.items())
        }

    def __enter__(self) -> _Taps:
        for name, axis in self._axes.items():
            module = self._net.get_submodule(axis.module)

            def tap(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                self.seen[name] = args[0]

            self._handles.append(module.register_forward_pre_hook(tap))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def channels(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The group's part of a reader's input, one row a position: `[positions, C]`."""
        kind = kind_of(self._net.get_submodule(self._axes[name].module))
        assert kind is not None
        flat = values.movedim(kind.channel_dim, -1).flatten(0, -2)
        return flat[:, self._positions[name].to(flat.device)].movedim(1, -1).flatten(0, 1)  # [N, C, copies] to rows


def _covariance(activations: torch.Tensor) -> torch.Tensor:
    if len(activations) > POSITIONS:
        activations = activations[:: -(-len(activations) // POSITIONS)]
    centred = (activations - activations.mean(0)).double()
    return (centred.T @ centred / len(centred)).cpu()


def _ranks(covariance: torch.Tensor) -> tuple[float, float]:
    """Effective rank and participation ratio of a covariance, both over its size."""
    spectrum = torch.linalg.eigvalsh(covariance).clamp_min(0)
    if float(spectrum.sum()) <= 0:
        return 1.0 / len(spectrum), 1.0 / len(spectrum)
    shares = spectrum / spectrum.sum()
    soft = float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
    hard = float(1.0 / shares.square().sum())
    return soft / len(spectrum), hard / len(spectrum)
