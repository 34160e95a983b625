"""Forward passes that mix channels where a trace, or a single edit, would not see it: refused or right, never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.structure import StructuralEditor
from tests.structure.networks import EXAMPLE
from tests.structure.test_mixing import assert_honest

Tensor = torch.Tensor


class Net(nn.Module):
    """Two convolutions and a classifier, with something between."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None, width: int = 8, **layers: nn.Module) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 6, 3, padding=1)
        self.fc, self.middle = nn.Linear(6, 5), middle
        for name, layer in layers.items():
            self.add_module(name, layer)

    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.c1(x))
        return F.relu(self.c2(self.middle(h) if self.middle is not None else h)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Tail(Net):
    """Does something behind its last layer that no layer sees."""

    def __init__(self, tail: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.features(x))


class Unrecorded(Net):
    """Two groups meet in what autograd does not record."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(c3=nn.Conv2d(3, 8, 3, padding=1), c4=nn.Conv2d(8, 6, 1))
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        y = self.c3(x)
        z = self.meet(self.c1(x), y)
        return self.fc((F.relu(self.c2(z)) + F.relu(self.c4(y))).mean((2, 3)))


class Bilinear(nn.Module):
    """The classifier is registered first, and reads products of features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(64, 5), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).flatten(2)
        return self.fc((h @ h.transpose(1, 2)).flatten(1))


class Outer(Net):
    """A classifier over the products of two sorts of features."""

    def __init__(self) -> None:
        super().__init__(g=nn.Linear(3, 7), wide=nn.Linear(42, 5))

    def forward(self, x: Tensor) -> Tensor:
        k = F.relu(self.g(x.mean((2, 3))))
        return self.wide((self.features(x)[:, :, None] * k[:, None]).flatten(1))


class Chunks(Net):
    """Three chunks of eight channels: of three, three and two."""

    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), d=nn.Conv2d(2, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.c1(x).chunk(3, 1)
        return self.fc((self.a(one) + self.b(two) + self.d(three)).mean((2, 3)))


def first_to_zero(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def in_eights(x: Tensor) -> Tensor:
    size = x.shape[1] // 8
    return x.view(len(x), x.shape[1] // size, size, *x.shape[2:]).flatten(1, 2)


MIDDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "first channel set to zero": first_to_zero,
    "first channel as gate": lambda x: x * torch.sigmoid(x[:, :1]),
    "first channel added": lambda x: x + x[:, [0]],
    "first channel shifted": lambda x: torch.cat([x[:, :1].roll(1, 2), x[:, 1:]], 1),
    "last channel doubled": lambda x: torch.cat([x[:, :-1], x[:, -1:] * 2], 1),
    "a mask made on the way": lambda x: x * (torch.arange(x.shape[1]) > 0).to(x).view(1, -1, 1, 1),
    "a factor by the width": lambda x: x * {8: 1.0, 16: 2.0}[x.shape[1]],
    "a size by the width": in_eights,
    "a saturated sum": lambda x: x * torch.tanh(x.sum(1, keepdim=True)),
    "a mean": lambda x: x + x.mean(1, keepdim=True),
    "normalised vectors": lambda x: F.normalize(x, dim=1),
    "a softmax": lambda x: x.softmax(1),
    "pixel shuffle and back": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "a scalar of all": lambda x: x * x.mean(),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_treats_some_channels_unlike_others_is_refused(name: str) -> None:
    editor = assert_honest(Net(MIDDLES[name]))
    assert [g.name for g in editor.editable] == ["c2"]


TAILS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mean": lambda net, h: net.fc(h) + h.mean(1, keepdim=True),
    "largest": lambda net, h: net.fc(h) * h.amax(1, keepdim=True),
    "cosine": lambda net, h: net.fc(h) / (h.norm(dim=1, keepdim=True) * net.fc.weight.norm(dim=1) + 1e-6),
}


@pytest.mark.parametrize("name", TAILS)
def test_what_comes_behind_the_last_layer_is_looked_at(name: str) -> None:
    editor = assert_honest(Tail(TAILS[name]))
    assert [g.name for g in editor.editable] == ["c1"]


MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "comparison": lambda a, b: a * (b > 0).to(a),
    "detached": lambda a, b: a * b.detach().sigmoid(),
    "where": lambda a, b: torch.where(b > 0, a, torch.zeros_like(a)),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_groups_that_meet_unrecorded_are_refused(name: str) -> None:
    editor = assert_honest(Unrecorded(MEETINGS[name]))
    assert [g.name for g in editor.editable] == ["c2"]


@pytest.mark.parametrize("net", [Chunks(), Outer(), Bilinear()], ids=["chunks", "outer product", "bilinear"])
def test_products_and_uneven_parts(net: nn.Module) -> None:
    assert_honest(net)


def test_an_output_that_is_not_one_layers_is_not_replaced() -> None:
    editor = StructuralEditor(Bilinear(), EXAMPLE)
    editor.resize_output(7)
    assert editor.model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8), nn.RMSNorm([8])])
def test_norms_over_channels(norm: nn.Module) -> None:
    class Normed(Net):
        def features(self, x: Tensor) -> Tensor:
            h = F.relu(self.c1(x))
            h = self.norm(h.movedim(1, -1)).movedim(-1, 1) if isinstance(self.norm, nn.RMSNorm) else self.norm(h)
            return F.relu(self.c2(h)).mean((2, 3))

    editor = assert_honest(Normed(norm=norm))
    assert [g.name for g in editor.editable] == ["c1", "c2"]


def test_a_norm_of_another_kind_under_a_known_name_is_refused() -> None:
    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias

    class Head(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.odd(self.features(x)))

    editor = assert_honest(Head(odd=Odd(6)))
    assert "is no plain norm" in editor.groups["c2"].reason


def test_networks_that_cannot_do_with_one_image() -> None:
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.features(x)[:, :, None, None].squeeze()))

    editor = assert_honest(Single(norm=nn.BatchNorm1d(6)))
    assert [g.name for g in editor.editable] == ["c1", "c2"]


def test_what_differs_in_training_is_refused() -> None:
    class Noisy(Net):
        def features(self, x: Tensor) -> Tensor:
            h = super().features(x)
            return h + torch.randn(len(x), 6, dtype=h.dtype) if self.training else h

    editor = StructuralEditor(Noisy(), EXAMPLE)
    assert "forward() assumes its width" in editor.groups["c2"].reason
    with pytest.raises(UnsupportedModelError, match="c2: the layer is called 2 times in training mode"):
        StructuralEditor(Twice(), EXAMPLE)


class Twice(Net):
    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.c1(x))
        return (self.c2(h) + (self.c2(h.flip(-1)) if self.training else 0)).mean((2, 3))


def test_looking_draws_no_random_numbers_and_leaves_results_alone() -> None:
    import random

    class Keeping(Net):
        def features(self, x: Tensor) -> Tensor:
            self.last = F.dropout(super().features(x), 0.1, training=True) * (0.5 + random.random())
            return self.last

    model = Keeping()
    model(EXAMPLE)  # leaves a tensor with a history behind
    noise, state = torch.random.get_rng_state(), random.getstate()
    StructuralEditor(model, EXAMPLE)
    assert torch.equal(torch.random.get_rng_state(), noise) and random.getstate() == state
    with pytest.raises(InputError, match="holds no image"):
        StructuralEditor(Net(), EXAMPLE[:0])


def test_whatever_a_forward_raises_is_one_clear_error() -> None:
    class Missing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.nothing(x)

    with pytest.raises(UnsupportedModelError, match=r"it does not run on an input of shape .*nothing"):
        StructuralEditor(Missing(), EXAMPLE)
