"""Whatever a forward() does with its channels, an edit is exact or refused with a reason; never silently wrong."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.structure import StructuralEditor
from robustcompress.structure.verify import leave_out, silence_readers
from tests.structure.networks import EXAMPLE, images

Middle = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def conv(into: int, out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2)


class Net(nn.Module):
    """Group `a` (8 channels, 8x8 pixels) goes through `middle`; `b` and `c` are as usual."""

    def __init__(self, middle: Middle, *, last: int = 8, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.b, self.c, self.fc = conv(last, 12), conv(12, 6), nn.Linear(6, 5)
        for name, member in members.items():
            setattr(self, name, member)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self, F.relu(self.bn(self.a(x))))
        return self.fc(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


def randomise(model: nn.Module, seed: int) -> None:
    """Other weights than those that the editor verified itself with, so that luck with the first does not help."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.15)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().add_(0.5)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)


def assert_honest(model: nn.Module) -> StructuralEditor:
    """Everything the editor offers to edit can be edited exactly, both ways; everything else has a reason."""
    model = model.double().eval()
    editor = StructuralEditor(model, EXAMPLE, seed=2)
    randomise(model, 11)
    x = images(3)
    with torch.no_grad():
        full = copy.deepcopy(model)(x)
        for group in editor.editable:
            for seed in range(2):
                silent, pruned = copy.deepcopy(model), copy.deepcopy(editor)
                order = torch.randperm(group.width, generator=torch.Generator().manual_seed(seed)).tolist()
                keep = sorted(order[: max(group.min_width, (group.width + seed) // 2)])
                silence_readers(silent, editor.layout, group.name, keep, editor.widths)
                pruned.prune(group.name, keep)
                assert_same(pruned.model(x), silent(x), f"{group.name} pruned to {keep}")
            turned = copy.deepcopy(editor)
            turned.resize(group.name, [*range(1, group.width), 0])
            assert_same(turned.model(x), full, f"{group.name} in another order")
            for init in ("pair", "zero_out", "clone"):
                grown = copy.deepcopy(editor)
                grown.grow(group.name, 3, init=init)
                leave_out(grown.model, grown.layout, group.name, range(group.width), grown.widths)
                assert_same(grown.model(x), full, f"{group.name} grown by {init}")
            grown.model.train()(x)
    assert [g.name for g in editor.groups.values() if not g.editable and len(g.reason) < 10] == []
    return editor


def assert_same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert found.shape == wanted.shape, what
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference <= 1e-7, what  # thirds of a clone are float32


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def attention(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    queries, keys, values = (layer(x).flatten(2) for layer in (net.q, net.k, net.v))
    weights = (queries.transpose(1, 2) @ keys).softmax(-1)
    return x + net.o((values @ weights.transpose(1, 2)).unflatten(2, (8, 8)))


# Joins that keep channels apart: `a` stays editable, and edits are exact.
EXACT: dict[str, Callable[[], Net]] = {
    "nothing": lambda: Net(lambda n, x: x),
    "one-channel gate": lambda: Net(lambda n, x: x * torch.sigmoid(n.g(x)), g=conv(8, 1)),
    "one-channel bottleneck": lambda: Net(lambda n, x: n.h(n.g(x)), g=conv(8, 1), h=conv(1, 8)),
    "scale view(1, -1, 1, 1)": lambda: Net(lambda n, x: x * n.p.view(1, -1, 1, 1), p=p(8)),
    "scale [1, C, 1, 1]": lambda: Net(lambda n, x: x * n.p, p=p(1, 8, 1, 1)),
    "one scalar": lambda: Net(lambda n, x: x * n.p, p=p(1)),
    "maximum of two": lambda: Net(lambda n, x: torch.maximum(n.g(x), n.h(x)), g=conv(8, 8), h=conv(8, 8)),
    "product of two": lambda: Net(lambda n, x: n.g(x) * n.h(x), g=conv(8, 8), h=conv(8, 8)),
    "halves by chunk": lambda: Net(lambda n, x: torch.add(*x.chunk(2, 1)), last=4),
    "maxout of neighbours": lambda: Net(lambda n, x: x.unflatten(1, (-1, 2)).amax(2), last=4),
    "stack, then flatten": lambda: Net(lambda n, x: torch.stack([x, n.g(x)], 2).flatten(1, 2), g=conv(8, 8), last=16),
    "linear on the last axis": lambda: Net(
        lambda n, x: n.g(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), g=nn.Linear(8, 8)
    ),
    "non-local block": lambda: Net(attention, q=conv(8, 4, 1), k=conv(8, 4, 1), v=conv(8, 4, 1), o=conv(4, 8, 1)),
    "spatial dropout": lambda: Net(lambda n, x: F.dropout2d(x, 0.3, n.training)),
}

# What mixes channels or counts them: exact if the editor can, else marked; never wrong.
MIXED: dict[str, Callable[[], Net]] = {
    "spatial attention": lambda: Net(
        lambda n, x: x * torch.sigmoid(n.g(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))),
        g=conv(2, 1),
    ),
    "permute, then flatten": lambda: Net(
        lambda n, x: n.g(F.avg_pool2d(x, 4).permute(0, 2, 3, 1).flatten(1))[..., None, None].expand(-1, -1, 8, 8),
        g=nn.Linear(32, 8),
    ),
    "channel shuffle by view": lambda: Net(
        lambda n, x: x.view(len(x), 2, x.shape[1] // 2, 8, 8).transpose(1, 2).reshape(x.shape)
    ),
    "channel shuffle": lambda: Net(lambda n, x: n.g(x), g=nn.ChannelShuffle(2)),
    "softmax": lambda: Net(lambda n, x: x.softmax(1)),
    "normalize": lambda: Net(lambda n, x: F.normalize(x, dim=1)),
    "layer norm": lambda: Net(lambda n, x: F.layer_norm(x, x.shape[1:])),
    "group norm": lambda: Net(lambda n, x: F.group_norm(x, 2)),
    "instance norm": lambda: Net(lambda n, x: F.instance_norm(x)),
    "flip": lambda: Net(lambda n, x: x + x.flip(1)),
    "roll": lambda: Net(lambda n, x: x + x.roll(1, 1)),
    "every second": lambda: Net(lambda n, x: x[:, ::2], last=4),
    "a list of channels": lambda: Net(lambda n, x: x[:, [2, 0, 1, 5]], last=4),
    "the first four": lambda: Net(lambda n, x: x[:, :4] + x[:, 4:], last=4),
    "sort": lambda: Net(lambda n, x: x.sort(1)[0]),
    "cumsum": lambda: Net(lambda n, x: x.cumsum(1)),
    "pixel shuffle": lambda: Net(lambda n, x: F.max_pool2d(F.pixel_shuffle(x, 2), 2), last=2),
    "gated linear unit": lambda: Net(lambda n, x: F.glu(x, 1), last=4),
    "halves swapped": lambda: Net(lambda n, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "uneven split": lambda: Net(lambda n, x: torch.cat(x.split([5, 3], 1)[::-1], 1)),
    "repeat": lambda: Net(lambda n, x: x.repeat(1, 2, 1, 1), last=16),
    "padded shortcut": lambda: Net(lambda n, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + n.g(x), g=conv(8, 12), last=12),
    "a weight for each position": lambda: Net(lambda n, x: x + n.p, p=p(8, 8, 8)),
    "a weight for each column": lambda: Net(lambda n, x: x + n.p, p=p(8)),
    "functional convolution": lambda: Net(lambda n, x: F.conv2d(x, n.p), p=p(8, 8, 1, 1)),
    "transposed to height": lambda: Net(lambda n, x: x.transpose(1, 2)),
    "divided by the width": lambda: Net(lambda n, x: x / x.shape[1] ** 0.5),
    "mean of all": lambda: Net(lambda n, x: x - x.mean((1, 2, 3), keepdim=True)),
    "detached branch": lambda: Net(lambda n, x: n.g(x.detach()) + n.h(x), g=conv(8, 8), h=conv(8, 8)),
    "hard mask": lambda: Net(lambda n, x: x * (n.g(x) > 0), g=conv(8, 8)),
    "efficient channel attention": lambda: Net(
        lambda n, x: x * torch.sigmoid(n.g(x.mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(-1),
        g=nn.Conv1d(1, 1, 3, padding=1),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_joins_that_keep_channels_apart_are_exact(name: str) -> None:
    torch.manual_seed(0)
    editor = assert_honest(EXACT[name]())
    assert {"a", "b", "c"} <= {group.name for group in editor.editable}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_channels_are_exact_or_marked_and_the_rest_stays_editable(name: str) -> None:
    torch.manual_seed(0)
    editor = assert_honest(MIXED[name]())
    assert {"b", "c"} <= {group.name for group in editor.editable}


def test_a_hard_coded_channel_count_is_marked_with_its_reason() -> None:
    torch.manual_seed(0)
    editor = assert_honest(Net(lambda n, x: x.view(-1, 8, 8, 8)))
    assert "forward() assumes its width" in editor.groups["a"].reason
    assert [group.name for group in editor.editable] == ["b", "c"]


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hidden, self.fc = conv(3, 6), conv(6, 4), nn.Linear(4 * 64, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(F.relu(self.hidden(x.view(-1, 4 * 64))))


def test_a_hard_coded_flatten_is_marked_with_its_reason() -> None:
    editor = assert_honest(Flattened())
    assert "forward() assumes its width" in editor.groups["b"].reason
    assert [group.name for group in editor.editable] == ["a", "hidden"]


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): what it reads enters the mean of its own weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Gained(nn.Conv2d):
    """Has a per-channel tensor that nobody has told the editor about."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out, 3, padding=1)
        self.register_buffer("gain", torch.rand(out, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def test_layers_with_a_forward_of_their_own() -> None:
    torch.manual_seed(0)
    editor = assert_honest(Net(lambda n, x: n.g(x), g=Standardised(8, 8, 3, padding=1)))
    assert "mixes its channels" in editor.groups["a"].reason
    assert [group.name for group in editor.editable] == ["b", "c", "g"]
    editor = assert_honest(Net(lambda n, x: n.g(x), g=Gained(8, 8)))
    assert "forward() assumes its width" in editor.groups["g"].reason
    assert [group.name for group in editor.editable] == ["a", "b", "c"]


class Outputs(nn.Module):
    """Several ways to make logits; `a` is hidden."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.w, self.bn = kind, conv(3, 6), p(5, 6), nn.BatchNorm1d(5)
        self.f, self.g, self.again, self.maps = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 5), conv(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.a(x))
        pooled = features.mean((2, 3))
        match self.kind:
            case "two heads added":
                return self.f(pooled) + self.g(pooled)
            case "two heads side by side":
                return torch.cat([self.f(pooled), self.g(pooled)], 1)
            case "logits read again":
                logits = self.f(pooled)
                return logits + self.again(logits)
            case "batch norm and log-softmax":
                return F.log_softmax(self.bn(self.f(pooled)), 1)
            case "convolution":
                return F.relu(self.maps(features)).mean((2, 3))
            case "cosine":
                return F.linear(F.normalize(pooled), F.normalize(self.w))
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    "kind",
    [
        "two heads added",
        "two heads side by side",
        "logits read again",
        "batch norm and log-softmax",
        "convolution",
        "cosine",
    ],
)
def test_no_output_is_ever_resized(kind: str) -> None:
    torch.manual_seed(0)
    editor = assert_honest(Outputs(kind))
    assert {group.name for group in editor.editable} <= {"a"}
    assert kind == "cosine" or editor.groups["a"].editable
    for group in editor.editable:
        editor.prune(group.name, [0, 3])
    shape = editor.model(images(2)).shape
    assert shape == (2, 10 if kind == "two heads side by side" else 5)


class OnTheImage(nn.Module):
    """The image's own three channels take part in a sum or a depthwise convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.bn = kind, conv(3, 3), nn.BatchNorm2d(3)
        self.depth = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.b, self.fc = conv(3, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x) if self.kind == "residual" else self.depth(self.bn(x))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_the_image_keeps_its_channels(kind: str) -> None:
    torch.manual_seed(0)
    editor = assert_honest(OnTheImage(kind))
    assert [group.name for group in editor.editable] == ["b"]


# Networks that an earlier trace, or an earlier proof of it, got wrong; each is the smallest that shows its trap.


class BesideTheImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(9, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.b(torch.cat([x, F.relu(self.a(x))], 1))).mean((2, 3)))


class Auxiliary(Net):
    """A branch that only training uses (GoogLeNet's auxiliary classifiers) reads `a` unseen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.a(x)))
        if self.training:
            x = x + self.g(x).mean(1, keepdim=True)
        return self.fc(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


def zero_head(middle: Middle) -> Net:
    """Zero-initialised classifiers are common; every difference vanishes behind one."""
    net = Net(middle)
    nn.init.zeros_(net.fc.weight)
    return net


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.cat([x * gate, gate], 1)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    # The image has no autograd node of its own unless it is given a gradient.
    "concat with the image": BesideTheImage,
    # Autograd keeps a negative start as an unsigned 64-bit number.
    "slice from the end": lambda: Net(lambda n, x: x[:, -3:], last=3),
    # Agrees with one pattern of pruning by luck (7 // 2 == 3), with growth it does not.
    "the first half by number": lambda: Net(lambda n, x: x[:, : x.shape[1] // 2], last=4),
    # At its least width it cannot be pruned, only grown.
    "one-channel gate that is also read": lambda: Net(
        lambda n, x: gated(x, torch.sigmoid(n.g(x))), g=conv(8, 1), last=9
    ),
    "local response norm": lambda: Net(lambda n, x: F.local_response_norm(x, 3, alpha=1.0)),
    # Behind a zero weight, or a dead ReLU, nothing is ever different.
    "softmax before a zero classifier": lambda: zero_head(lambda n, x: x.softmax(1)),
    # What evaluation does not run, the trace does not see.
    "a branch of training mode": lambda: Auxiliary(lambda n, x: x, g=conv(8, 4)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    torch.manual_seed(0)
    with contextlib.suppress(UnsupportedModelError):  # to refuse is as honest as to handle
        assert_honest(TRAPS[name]())


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 7, 1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3), keepdim=True)
        return self.fc(F.relu(self.c(x).squeeze()))


def test_a_bare_squeeze_sets_the_least_width() -> None:
    """At one channel it takes the channels' own dimension, too."""
    net = Squeezed()
    editor = StructuralEditor(net, EXAMPLE)
    assert {group.name: group.min_width for group in editor.editable} == {"a": 1, "b": 1, "c": 2}
    with pytest.raises(InputError, match="group 'c' would have 1 channels left; keep at least 2"):
        editor.prune("c", [3])
    for group in editor.editable:
        editor.prune(group.name, range(group.min_width))
    assert net(EXAMPLE).shape == (2, 5)
