"""Layers as products of smaller ones: the decompositions, and the layers that carry them out.

A convolution `W[O, I, h, w]` becomes

    tucker   1x1 to r_in channels, h x w to r_out, 1x1 to O: `W = core x_O U x_I V`, the Tucker-2 decomposition
             (Kim et al. 2016, section 3.1), by higher-order orthogonal iteration
    cp       1x1 to R channels, h x 1 and 1 x w within each, 1x1 to O: a sum of R outer products (Lebedev et al. 2015,
             section 3), by alternating least squares
    svd      1x1 to R channels, 1x1 to O, where h = w = 1; and the same of a linear layer

Nothing lies between the factors: each is the best approximation that its algorithm finds of the layer it stands for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

FIRST, LAST = "first", "last"
"""Names of the factors that read and that write what the layer read and wrote."""

RANKS: Mapping[str, int] = {"tucker": 2, "cp": 1, "svd": 1}
"""How many ranks each kind of decomposition has: of outputs and of inputs, or one."""

LARGEST = 4
"""Factors that hold more times the weights of their layer are refused: they are a mistake, or somebody's malice."""

_SWEEPS = {"tucker": 20, "cp": 100}
_RIDGE = 1e-9


class Factorised(nn.Sequential):
    """The factors of one layer, in order: `first`, what lies between, `last`."""


def complaint(layer: nn.Module, kind: str, ranks: Sequence[int]) -> str:
    """Why a layer cannot be factorised so; empty where it can."""
    plain = type(layer) is nn.Conv2d or type(layer) is nn.Linear
    if not plain or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        return f"a {type(layer).__name__} is not factorised: only plain Conv2d, without groups, and Linear are"
    pointwise = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    if pointwise != (kind == "svd"):
        if pointwise:
            return f"kind={kind!r} is for kernels larger than 1x1: use 'svd'"
        return f"kind={kind!r} is for linear layers and kernels of 1x1: use 'tucker' or 'cp'"
    if len(ranks) != RANKS[kind]:
        return f"ranks={list(ranks)}: {kind} has {RANKS[kind]}"
    most = largest_ranks(layer, kind)
    if any(type(rank) is not int or not 1 <= rank <= top for rank, top in zip(ranks, most, strict=True)):
        return f"ranks={list(ranks)}: must lie between 1 and {list(most)}"
    whole = layer.get_parameter("weight").numel()
    if (held := held_by(layer, kind, ranks)) > LARGEST * whole:
        return f"ranks={list(ranks)}: the factors would hold {held} weights, and the layer has {whole}; give lower ones"
    return ""


def held_by(layer: nn.Module, kind: str, ranks: Sequence[int]) -> int:
    """How many weights the factors of a layer hold."""
    return sum(module.get_parameter("weight").numel() for module in _layers(layer, kind, ranks).values())


def largest_ranks(layer: nn.Module, kind: str) -> tuple[int, ...]:
    """The ranks beyond which nothing is gained; with these the product is the layer itself (for "cp" nearly)."""
    wide, deep, *window = layer.get_parameter("weight").shape
    field = math.prod(window)
    if kind == "tucker":
        return min(wide, deep * field), min(deep, wide * field)
    return (min(wide, deep),) if kind == "svd" else (min(wide * deep, wide * field, deep * field),)


def spectrum(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Singular values of the weight unfolded by its outputs, and by its inputs: what a rank leaves out. Descending."""
    weight = layer.get_parameter("weight").detach().double().cpu()
    return torch.linalg.svdvals(weight.flatten(1)), torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))


def factorise(layer: nn.Module, kind: str, ranks: Sequence[int], *, blank: bool = False) -> Factorised:
    """The factors of a layer, in its mode, type and place, trained where it is trained; its bias is shared.

    Args:
        layer: Convolution or linear layer for which there is no `complaint`.
        kind: Of the decomposition.
        ranks: Its ranks.
        blank: Give the factors arbitrary values: others will be loaded.
    """
    weight, made = layer.get_parameter("weight"), _layers(layer, kind, ranks)
    if blank:
        generator = torch.Generator().manual_seed(0)
        shapes = [module.get_parameter("weight").shape for module in made.values()]
        found = [torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5 for shape in shapes]
    else:
        found = _DECOMPOSE[kind](weight.detach().double().cpu(), *ranks)
    for module, values in zip(made.values(), found, strict=True):
        fitting = values.to(weight).contiguous()
        module.register_parameter("weight", nn.Parameter(fitting, requires_grad=weight.requires_grad))
        module.register_parameter("bias", None)
    made[LAST].register_parameter("bias", layer._parameters["bias"])
    return Factorised(made).train(layer.training)


def product(factors: Factorised) -> Tensor:
    """The weight that the factors make up, in double precision: `[O, I, h, w]` or `[O, I]`."""
    weights = [module.get_parameter("weight").detach().double() for module in factors]
    if len(weights) == 2:
        first, last = (w.flatten(1) for w in weights)
        whole = last @ first
        return whole if isinstance(factors[0], nn.Linear) else whole[:, :, None, None]
    if len(weights) == 3:
        first, core, last = weights
        return torch.einsum("or,rshw,si->oihw", last.flatten(1), core, first.flatten(1))
    first, rows, columns, last = weights
    return torch.einsum("or,rh,rw,ri->oihw", last.flatten(1), rows.flatten(1), columns.flatten(1), first.flatten(1))


def svd(weight: Tensor, rank: int) -> list[Tensor]:
    """First `[R, I, ...]` and last `[O, R, ...]` of the best approximation of that rank; each has half of the scale."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    root, tail = s[:rank].sqrt(), (1,) * (weight.dim() - 2)
    return [(root[:, None] * v[:rank]).reshape(rank, -1, *tail), (u[:, :rank] * root).reshape(-1, rank, *tail)]


def tucker(weight: Tensor, out_rank: int, in_rank: int) -> list[Tensor]:
    """First `[r_in, I, 1, 1]`, core `[r_out, r_in, h, w]`, last `[O, r_out, 1, 1]`; first and last are orthonormal."""
    u, v = _leading(weight.flatten(1), out_rank), _leading(weight.transpose(0, 1).flatten(1), in_rank)
    for _ in range(_SWEEPS["tucker"]):
        before = u
        u = _leading(torch.einsum("oihw,is->oshw", weight, v).flatten(1), out_rank)
        v = _leading(torch.einsum("oihw,or->irhw", weight, u).flatten(1), in_rank)
        if float((u @ (u.T @ before) - before).norm()) < 1e-10 * math.sqrt(out_rank):
            break
    core = torch.einsum("oihw,or,is->rshw", weight, u, v)
    return [v.T[:, :, None, None].contiguous(), core, u[:, :, None, None].contiguous()]


def cp(weight: Tensor, rank: int) -> list[Tensor]:
    """First `[R, I, 1, 1]`, rows `[R, 1, h, 1]`, columns `[R, 1, 1, w]`, last `[O, R, 1, 1]`, of equal norms."""
    generator = torch.Generator().manual_seed(0)
    sizes = weight.shape
    factors = [torch.randn(size, rank, generator=generator, dtype=weight.dtype) for size in sizes]
    for number, size in enumerate(sizes):  # what is there of leading directions; the rest stays random
        lead = _leading(weight.movedim(number, 0).flatten(1), min(rank, size))
        factors[number][:, : lead.shape[1]] = lead
    error = math.inf
    for _ in range(_SWEEPS["cp"]):
        for number in range(4):
            others = [factors[other] for other in range(4) if other != number]
            gram = torch.stack([other.T @ other for other in others]).prod(0)
            spread = torch.einsum("ar,br,cr->abcr", *others).flatten(0, 2)
            right = weight.movedim(number, 0).flatten(1) @ spread
            ridge = _RIDGE * float(gram.diagonal().mean())
            factors[number] = torch.linalg.solve(gram + ridge * torch.eye(rank, dtype=gram.dtype), right.T).T
        norms = [factor.norm(dim=0).clamp_min(1e-30) for factor in factors]
        mean = torch.stack(norms).log().mean(0).exp()  # products stay, and no factor runs away
        factors = [factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True)]
        before, error = error, float((torch.einsum("or,ir,hr,wr->oihw", *factors) - weight).norm())
        if before - error < 1e-7 * float(weight.norm()):
            break
    last, first, rows, columns = factors
    return [first.T[:, :, None, None], rows.T[:, None, :, None], columns.T[:, None, None, :], last[:, :, None, None]]


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, `[rows, rank]`; orthonormal also where the matrix has fewer."""
    u: Tensor = torch.linalg.svd(matrix, full_matrices=rank > min(matrix.shape))[0][:, :rank]
    lead = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # their sign is arbitrary: the same on every machine
    return u * torch.where(lead == 0, 1.0, lead)


def _layers(layer: nn.Module, kind: str, ranks: Sequence[int]) -> OrderedDict[str, nn.Module]:
    """Layers of the right shapes, without values."""
    wide, narrow = ranks[0], ranks[-1]
    if isinstance(layer, nn.Linear):
        with torch.device("meta"):
            first, last = nn.Linear(layer.in_features, narrow), nn.Linear(wide, layer.out_features)
        return OrderedDict([(FIRST, first), (LAST, last)])
    assert isinstance(layer, nn.Conv2d)

    def conv(inputs: int, outputs: int, *along: int, groups: int = 1) -> nn.Conv2d:
        """Over the window along some dimensions, pointwise along the others."""

        def here(values: Sequence[int], other: int) -> tuple[int, int]:
            return values[0] if 0 in along else other, values[1] if 1 in along else other

        around = layer.padding if isinstance(layer.padding, str) else here(layer.padding, 0)
        with torch.device("meta"):
            return nn.Conv2d(
                inputs,
                outputs,
                here(layer.kernel_size, 1),
                here(layer.stride, 1),
                around if along else 0,
                here(layer.dilation, 1),
                groups,
                padding_mode=layer.padding_mode if along else "zeros",
            )

    inputs, outputs = layer.in_channels, layer.out_channels
    if kind == "svd":
        # A stride leaves images out: before the first factor, so that none is computed for nothing.
        return OrderedDict([(FIRST, conv(inputs, narrow, 0, 1)), (LAST, conv(narrow, outputs))])
    if kind == "tucker":
        between = [("core", conv(narrow, wide, 0, 1))]
    else:
        between = [
            ("rows", conv(narrow, narrow, 0, groups=narrow)),
            ("columns", conv(narrow, narrow, 1, groups=narrow)),
        ]
    return OrderedDict([(FIRST, conv(inputs, narrow)), *between, (LAST, conv(wide, outputs))])


_DECOMPOSE: Mapping[str, Callable[..., list[Tensor]]] = {"tucker": tucker, "cp": cp, "svd": svd}
