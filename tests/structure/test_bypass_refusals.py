"""Blocks that look as if they could leave the network, and cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError
from robustcompress.structure import StructuralEditor
from tests.structure import networks
from tests.structure.networks import EXAMPLE


class Odd(nn.Module):
    """Blocks that look as if they could leave, one attribute a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.signed = networks.Residual(4, 3)  # its input may be negative
        self.normed, self.projected = Normed(), networks.Projected(4, 4)
        self.doubled, self.gated, self.wide = Doubled(), networks.Squeeze(4, 2), networks.Chain(4, 6)
        self.clipped, self.asked, self.fine = Clipped(), Doubled(1.0), networks.Bare(6, 0)
        self.scaled, self.pair, self.unused = Scaled(), Pair(), networks.Bare(4, 0)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.signed(self.stem(x))
        x = self.gated(self.doubled(self.projected(self.normed(x))))
        x = self.asked(self.clipped(F.relu(x))) * self.asked.factor
        x = self.pair(self.scaled(x), x)
        return self.fc(self.fine(self.wide(x)).mean((2, 3)))


class Normed(networks.Bare):
    def __init__(self) -> None:
        super().__init__(4, 0)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x + self.conv(x))


class Doubled(networks.Bare):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(4, 0)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x + self.conv(x)


class Clipped(networks.Bare):
    """Only large inputs show what it does."""

    def __init__(self) -> None:
        super().__init__(4, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x + self.conv(x), max=50.0)


class Scaled(networks.Bare):
    """The scale of the sum is one at first, and trains."""

    def __init__(self) -> None:
        super().__init__(4, 0)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x + self.conv(x))


class Pair(networks.Bare):
    def __init__(self) -> None:
        super().__init__(4, 0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.conv(y)


REFUSED = {
    "signed": "where the input may be negative",
    "normed": "a norm behind the sum",
    "projected": "a projection",
    "doubled": "does not return what it was given",
    "gated": "does not return what it was given",
    "wide": r"turns a shape of \[4, 8, 8\] into \[6, 8, 8\]",
    "clipped": "does not return what it was given",
    "asked": "does not run without it",
    "scaled": "passes one of its layers",
    "pair": "must be given one tensor",
    "unused": "called 0 times",
    "act": "holds no layer",
    "stem": "single layer",
    "": "whole model",
    "fone": "there is no module 'fone'; did you mean 'fine'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(name: str) -> None:
    if "odd" not in _ODD:
        torch.manual_seed(0)
        _ODD["odd"] = StructuralEditor(Odd().double(), EXAMPLE)
    editor = _ODD["odd"]
    before, modules = {k: v.clone() for k, v in editor.model.state_dict().items()}, list(editor.model.modules())
    layout = editor.layout
    with pytest.raises(InputError, match=f"the bypass was refused: .*{REFUSED[name]}"):
        editor.bypass(name)
    assert all(torch.equal(v, before[k]) for k, v in editor.model.state_dict().items())
    assert list(editor.model.modules()) == modules and editor.edits == () and editor.layout is layout
    assert editor.model.training and editor.bypassable == ("fine",)


_ODD: dict[str, StructuralEditor] = {}


class Around(nn.Module):
    """A network around one block of four channels, whose input is not negative."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.fc = networks.Chain(3, 4), block, nn.Linear(4, 5)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)

    def after(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.after(self.block(self.before(x))).mean((2, 3)))


class Dead(Around):
    """What the block is given is zero, and twice that is as well."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x) * 0.0


class Peeking(Around):
    """Takes more from the block than what it returns, where there is more."""

    def after(self, x: torch.Tensor) -> torch.Tensor:
        hidden = getattr(self.block, "hidden", None)
        return x if hidden is None else x + hidden


class Remembering(networks.Bare):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = x
        return x + self.conv(x)


class Tapped(Around):
    """Holds a layer of the block by a second name."""

    def __init__(self, block: networks.Bare) -> None:
        super().__init__(block)
        self.tap = nn.ModuleList([block.conv])


class Biased(networks.Bare):
    def __init__(self) -> None:
        super().__init__(4, 0)
        self.bias, self.scale = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, self.scale, self.conv(x)) + self.bias


class Plain(networks.Residual):
    """Its last norm has neither scale nor shift."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.bn2 = nn.BatchNorm2d(4, affine=False)


class Overwriting(networks.Bare):
    """Writes to what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sub_(1.0) + self.conv(x)


class Frozen(networks.Residual):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: Dead(Doubled()), "does not return what it was given"),
        (lambda: Peeking(Remembering(4, 0)), "without it the model does not compute"),
        (lambda: Tapped(networks.Bare(4, 0)), "holds some of its parameters elsewhere"),
        (lambda: Around(Overwriting(4, 0)), "does not return what it was given"),
        (lambda: Around(networks.Residual(4, 3)), ""),
        (lambda: Around(Biased()), ""),
        (lambda: Around(Plain()), ""),
        (lambda: Around(Frozen()), ""),
        (lambda: Around(nn.Sequential(networks.Bare(4, 0), networks.Inverted(4, 3))), ""),
    ],
    ids=["dead", "peeking", "tapped", "overwriting", "residual", "biased", "norm without scale", "frozen", "sequence"],
)
def test_the_proof_looks_at_the_network_and_not_at_the_code(net: Callable[[], Around], said: str) -> None:
    torch.manual_seed(0)
    model = net().double().eval()
    editor = StructuralEditor(model, EXAMPLE)
    if said:
        with pytest.raises(InputError, match=said):
            editor.bypass("block")
    else:
        editor.bypass("block")
        x = networks.images()
        assert torch.equal(model(x), model.fc(model.stem(x).mean((2, 3))))


def test_a_network_that_casts_says_that_its_blocks_cannot_be_proven() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.fc = nn.Conv2d(3, 4, 3), networks.Bare(4, 0), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.block(self.stem(x.float())).mean((2, 3)))

    editor = StructuralEditor(Casting(), EXAMPLE)
    assert editor.bypassable == ()
    with pytest.raises(InputError, match="does not run in double precision"):
        editor.bypass("block")
