"""Networks made of every join the editor claims to know, drawn at random."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robustcompress.models.attention import Attention
from robustcompress.models.vit import Block

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Chain(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out), out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.out = c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Bare(nn.Module):
    """A residual block of one convolution: it reads and writes the same group."""

    def __init__(self, c: int, _: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(c, c, 1), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class Projected(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.main, self.short, self.out = nn.Conv2d(c, out, 3, padding=1), nn.Conv2d(c, out, 1), out
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.main(x)) + self.short(x))


class Dense(nn.Module):
    def __init__(self, c: int, extra: int) -> None:
        super().__init__()
        self.norm, self.conv, self.out = nn.BatchNorm2d(c), nn.Conv2d(c, extra, 3, padding=1), c + extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Inverted(nn.Module):
    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(c, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.project, self.out = nn.Conv2d(hidden, c, 1), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu6(self.bn2(self.depth(F.relu6(self.bn1(self.expand(x)))))))


class Squeeze(nn.Module):
    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(c, hidden, 1), nn.Conv2d(hidden, c, 1), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Chunked(nn.Module):
    def __init__(self, c: int, half: int) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(c, 2 * half, 1), nn.BatchNorm2d(2 * half), half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.bn(self.conv(x)).chunk(2, 1)
        return a * torch.sigmoid(b)


class Scaled(nn.Module):
    def __init__(self, c: int, _: int) -> None:
        super().__init__()
        self.scale, self.act, self.out = nn.Parameter(torch.rand(c, 1, 1) + 0.5), nn.PReLU(c), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x * self.scale)


class Upsampled(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(c, out, 2, stride=2), out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.up(x)), 2)


class Grouped(nn.Module):
    """Convolutions in two groups, of unlike numbers of channels; the second multiplies a depthwise one's channels."""

    def __init__(self, c: int, each: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(c, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.grouped, self.bn2 = nn.Conv2d(6, 3 * each, 3, padding=1, groups=3), nn.BatchNorm2d(3 * each)
        self.multiplied = nn.Conv2d(3 * each, 6 * each, 3, padding=1, groups=3 * each)
        self.project, self.out = nn.Conv2d(6 * each, c, 1), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn2(self.grouped(F.relu(self.bn1(self.expand(x))))))
        return x + self.project(F.relu(self.multiplied(y)))


class Normed(nn.Module):
    """Norms that take their statistics from the image: whole groups of channels, or each channel by itself."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c, 2 * groups, 3, padding=1), nn.GroupNorm(groups, 2 * groups)
        self.conv2, self.norm2 = nn.Conv2d(2 * groups, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=groups % 2 == 0)
        self.conv3, self.out = nn.Conv2d(4, c, 1), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv3(F.relu(self.norm2(self.conv2(x))))


class Mixed(nn.Module):
    """One layer over places and one over channels: two sorts of channels in one tensor."""

    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.over, self.back = nn.Linear(4, hidden), nn.Linear(hidden, 4)
        self.up, self.down, self.out = nn.Linear(c, hidden), nn.Linear(hidden, c), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.adaptive_avg_pool2d(x, 2).flatten(2)
        y = (y + self.back(F.gelu(self.over(y)))).transpose(1, 2)
        y = y + self.down(F.gelu(self.up(y)))
        return x + y.mean(1)[:, :, None, None]


BLOCKS = (
    *(Chain, Residual, Bare, Projected, Dense, Inverted, Squeeze, Chunked, Scaled, Upsampled),
    *(Grouped, Normed, Mixed),
)


class Net(nn.Module):
    def __init__(self, blocks: list[tuple[int, int]], head: str, stem: int) -> None:
        super().__init__()
        self.stem = Chain(3, stem)
        width, layers = stem, []
        for number, size in blocks:
            layers.append(BLOCKS[number](width, size))
            width = layers[-1].out
        self.blocks, self.head = nn.Sequential(*layers), head
        if head == "pool":
            self.fc = nn.Linear(width, 5)
        elif head == "flatten":
            self.hidden, self.act = nn.Linear(width * 4, 6), nn.PReLU()
            self.fc = nn.Linear(6, 5)
        else:
            self.fc = nn.Conv2d(width, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        if self.head == "pool":
            return self.fc(x.mean((2, 3)))
        if self.head == "flatten":
            x = torch.flatten(F.adaptive_avg_pool2d(x, 2), 1)
            return self.fc(self.act(self.hidden(x)))
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.fc(x)), 1), 1)


class Encoder(nn.Module):
    """A transformer of one or two blocks, with a token of its own beside the four patches."""

    def __init__(self, heads: list[int], head_dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        dim = 6
        self.patch, self.token = nn.Conv2d(3, dim, 4, stride=4), nn.Parameter(torch.rand(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, count, head_dim, hidden) for count in heads))
        for block in self.blocks:
            block.attention = Attention(dim, len(block.attention.qkv.weight) // head_dim // 3, head_dim, bias=bias)
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.fc(self.norm(x)[:, 0])


@st.composite
def transformers(draw: st.DrawFn) -> Encoder:
    """A random transformer on 8x8 images; one head, and heads that are not as wide as the embedding, among them."""
    heads = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = Encoder(heads, draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.booleans()))
    return randomise(net)


@st.composite
def networks(draw: st.DrawFn) -> Net:
    """A random network with random weights and batch-norm statistics, in eval mode, double precision."""
    blocks = draw(st.lists(st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(2, 5)), min_size=1, max_size=3))
    head = draw(st.sampled_from(["pool", "flatten", "conv"]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = Net(blocks, head, draw(st.integers(2, 5)))
    return randomise(net)


def randomise(model: nn.Module) -> nn.Module:
    """Give batch norms statistics that shift and scale, so that leaks show; double precision, eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.double().eval()


def images(n: int = 4, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
