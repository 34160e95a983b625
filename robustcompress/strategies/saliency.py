"""Pruning in rounds by what each unit contributes to the trace of the mixed tangent kernel; nothing is trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustcompress.data import Batches
from robustcompress.robust.attacks import eval_mode
from robustcompress.robust.tangent import trained_parameters
from robustcompress.session import Session
from robustcompress.strategies.tickets import calibrated
from robustcompress.strategies.units import Channels, Scores, Weights
from robustcompress.structure.masks import ScoreMasks, largest_entries
from robustcompress.train import with_auxiliary

NOISE = 0.02
"""Length of the noise on the weights, as a share of their own: small enough that outputs are linear in it."""


def prune_in_rounds(session: Session, units: Channels | Weights, *, rounds: int) -> Scores:
    """Close units round by round, those with the smallest saliency first, until as few are open as the budget allows.

    Each round's counts lie on a geometric course from all units to those kept; each has another batch of training
    images, attacked on the dense network, other noise, and batch-norm statistics of the network as it is then.

    Args:
        session: The network, dense; its generator draws batches, noise and attacks. Comes back as it was.
        units: What is chosen among.
        rounds: How many.

    Returns:
        Scores whose largest are the units that are open in the end. Closed ones follow in the order in which they
        closed, below all open ones.
    """
    model, goal = session.model, session.goal
    device = next(model.parameters()).device
    dense = copy.deepcopy(model)
    seed = int(torch.randint(2**62, (), generator=session.generator))
    attacker = torch.Generator(device).manual_seed(seed)
    size = min(goal.recipe.batch_size, len(goal.data.train))
    batches = Batches(
        goal.data.train, size, device=device, generator=torch.Generator().manual_seed(seed), channels_last=False
    )
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    scores, objective = units.first_scores(units.magnitudes()), with_auxiliary(goal.objective, session.editor)
    bits = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    with calibrated(session):
        dense.load_state_dict(model.state_dict())
    dense.requires_grad_(False)
    for done in range(1, rounds + 1):
        x, y = next(stream)
        x_adv = objective.attack(dense, x, y, goal.threat, generator=attacker)
        with units.gates({name: b.float() for name, b in bits.items()}, dict) as gates, calibrated(session):
            found = trace_saliency(model, gates, x, x_adv, generator=session.generator)
        scores = below({name: s.to(bits[name].device) for name, s in found.items()}, scores, bits)
        counts = units.counts(scores)
        now = {n: round(b.numel() * (counts[n] / b.numel()) ** (done / rounds)) for n, b in bits.items()}
        bits = {n: largest_entries(s, now[n]) & bits[n] for n, s in scores.items()}
    return scores


def trace_saliency(
    model: nn.Module, gates: ScoreMasks, x: Tensor, x_adv: Tensor, *, generator: torch.Generator
) -> Scores:
    """`|d/dm sum_i <f(x_i) - f'(x_i), f(x~_i) - f'(x~_i)>| / |noise|^2` for each gate value m.

    f is the network, f' the same with Gaussian noise on all its weights. To second order in the noise, what the gates
    are differentiated in is in expectation the trace of the mixed tangent kernel over outputs and images, divided by
    the number of parameters, for the price of four forward passes and one backward pass. At `x_adv = x` this is the
    saliency of NTK-SAP (Wang et al., ICLR 2023); the product of differences at two images is ours.

    Args:
        model: Under `gates`, in whatever mode; evaluated in eval mode.
        gates: Open, with their values as scores.
        x: Clean images, `[N, C, H, W]`.
        x_adv: The same images attacked.
        generator: Of the noise, on the CPU.

    Returns:
        By name, of the shape of the gates, not negative.
    """
    parameters = trained_parameters(model)
    noise = noise_like(parameters, generator)
    with eval_mode(model), torch.enable_grad():
        images = torch.cat([x, x_adv])
        moved = functional_call(model, {name: p + noise[name] for name, p in parameters.items()}, (images,))
        clean, attacked = (functional_call(model, parameters, (images,)) - moved).split([len(x), len(x_adv)])
        trace = (clean * attacked).sum() / sum(n.square().sum() for n in noise.values())
        gradients = torch.autograd.grad(trace, gates.parameters(), materialize_grads=True)
    return {name: g.abs() for name, g in zip(gates.scores, gradients, strict=True)}


def noise_like(parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Gaussian noise of one standard deviation for all, `NOISE` times the root mean square of all parameters."""
    count = sum(p.numel() for p in parameters.values())
    scale = NOISE * (sum(float(p.square().sum()) for p in parameters.values()) / count) ** 0.5
    return {n: scale * torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for n, p in parameters.items()}


def below(found: Mapping[str, Tensor], before: Mapping[str, Tensor], open_bits: Mapping[str, Tensor]) -> Scores:
    """The scores found where units are open; elsewhere those of before, brought below the smallest found.

    Open units for which nothing was found count as much as the least for which something was: still above closed ones.
    """
    positive = [found[n][b & (found[n] > 0)] for n, b in open_bits.items()]
    floor = min((float(values.min()) for values in positive if values.numel()), default=1e-20)
    closed = [before[n].abs()[~b] for n, b in open_bits.items()]
    most = max((float(values.max()) for values in closed if values.numel()), default=0.0)
    scale = floor / (2 * most) if most > 0 else 0.0
    return {n: torch.where(b, found[n].clamp_min(floor), before[n].abs() * scale) for n, b in open_bits.items()}
