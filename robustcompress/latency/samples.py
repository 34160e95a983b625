"""Which networks to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def sample_widths(
    full: Mapping[str, int], floor: Mapping[str, int], most: Mapping[str, int], *, steps: Mapping[str, int], count: int
) -> list[dict[str, int]]:
    """Widths of networks that tell layers apart; the same for the same arguments.

    The reference, the narrowest network, the widest, a quarter scaled evenly, and the rest at random: a ratio for the
    network and, around it, one for each group.

    Args:
        full: The reference's widths.
        floor: The narrowest.
        most: The widest.
        steps: By group, of what the widths between are multiples.
        count: How many at most; those that fall together are measured once.
    """
    generator = torch.Generator().manual_seed(0)
    least = max(0.1, min((floor[name] / width for name, width in full.items()), default=1.0))
    even = max(1, count // 4)

    def widths_at(ratios: Mapping[str, float]) -> dict[str, int]:
        nearest = {
            name: round(ratio * full[name] / steps.get(name, 1)) * steps.get(name, 1) for name, ratio in ratios.items()
        }
        return {name: int(min(most[name], max(floor[name], width))) for name, width in nearest.items()}

    found = [dict(full), dict(floor), dict(most)]
    found += [widths_at(dict.fromkeys(full, least ** ((i + 1) / (even + 1)))) for i in range(even)]
    while len(found) < count:
        base, *around = torch.rand(1 + len(full), generator=generator).tolist()
        middle = math.exp(math.log(least) * (1 - base)) * 1.1
        found.append(widths_at({n: middle * math.exp(1.2 * u - 0.6) for n, u in zip(full, around, strict=True)}))
    distinct = {tuple(widths.items()): widths for widths in found}
    return list(distinct.values())
