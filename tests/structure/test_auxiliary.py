"""Networks with classifiers that only training uses: all of it is traced, proven, edited and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.structure import StructuralEditor
from robustcompress.structure.auxiliary import expose, tensors_of
from tests.structure.networks import EXAMPLE, images, randomise

Look = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class Head(nn.Module):
    def __init__(self, look: Look, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.fc1, self.drop, self.fc2 = nn.Linear(24, 7), nn.Dropout(dropout), nn.Linear(7, 5)
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.norm(self.conv(self.look(x)))), 2)
        return self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))


class Outputs(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor | None


class TwoHeads(nn.Module):
    """As GoogLeNet: a classifier on the way, in training alone."""

    def __init__(self, look: Look = lambda x: x, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.last = Block(), nn.Conv2d(8, 9, 3, padding=1)
        self.aux: nn.Module | None = Head(look, dropout)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.block(F.relu(self.norm(self.stem(x))))
        aux = self.aux(x) if self.training and self.aux is not None else None
        x = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return Outputs(x, aux) if self.training else x


def two_heads(look: Look = lambda x: x, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TwoHeads(look, dropout).double())


def both(net: nn.Module, exposed: StructuralEditor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits in evaluation mode; and both outputs in training mode, or as the trace looks at them."""
    net = copy.deepcopy(net)
    clean = net.eval()(images())
    net = net.train() if exposed is None else expose(net, exposed.layout.auxiliary)
    logits, aux = tensors_of(net(images()))
    return clean, logits, aux


def assert_close(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-9 * (1 + float(b.detach().abs().max()))


def test_a_head_of_training_is_part_of_the_structure() -> None:
    net = two_heads(dropout=0.5)
    editor = StructuralEditor(net, EXAMPLE)
    assert editor.layout.auxiliary == ("aux.conv", "aux.norm", "aux.fc1", "aux.fc2")
    assert {g.name: g.kind for g in editor.groups.values()} == {
        "stem": "residual",
        "last": "hidden",
        "aux.conv": "hidden",
        "aux.fc1": "hidden",
        "aux.fc2": "output",
        "fc": "output",
    }
    assert [axis.module for axis in editor.groups["stem"].readers] == ["block.conv", "last", "aux.conv"]
    assert editor.layout.output == "fc" and len(editor.editable) == 4
    assert [g for g in editor.groups if editor.layout.heard_in_training_only(g)] == ["aux.conv", "aux.fc1"]


def test_pruning_is_silencing_the_readers_in_both_modes() -> None:
    net = two_heads()
    editor, silent = StructuralEditor(net, EXAMPLE), copy.deepcopy(net)
    keeps = {"stem": [0, 2, 3, 6], "last": [1, 4, 5, 8], "aux.conv": [0, 3, 5], "aux.fc1": [1, 2, 6]}
    # By hand, so that nothing that was traced says who the readers are.
    columns = {"stem": ("block.conv", "last", "aux.conv"), "last": ("fc",), "aux.conv": (), "aux.fc1": ("aux.fc2",)}
    with torch.no_grad():
        for name, readers in columns.items():
            for reader in readers:
                weight = silent.get_submodule(reader).weight
                weight[:, [i for i in range(weight.shape[1]) if i not in keeps[name]]] = 0
        silent.aux.fc1.weight.unflatten(1, (6, 4))[:, [1, 2, 4]] = 0  # behind the flatten, four places a channel
    for name, keep in keeps.items():
        editor.prune(name, keep)
    assert_close(both(net), both(silent))
    assert net.aux.fc1.weight.shape == (3, 12) and net.aux.conv.weight.shape == (3, 4, 1, 1)


def test_growth_changes_no_output_in_either_mode_and_replays() -> None:
    net = two_heads()
    editor, before = StructuralEditor(net, EXAMPLE), both(net)
    for group in editor.editable:
        editor.grow(group.name, 3)
    assert_close(both(net), before)
    twin = two_heads()
    StructuralEditor.replay(twin, EXAMPLE, editor.edits)
    twin.load_state_dict(net.state_dict(), strict=True)
    for a, b in zip(both(twin), both(net), strict=True):
        assert torch.equal(a, b)


def test_closed_gates_are_removed_channels_in_either_mode() -> None:
    net = two_heads()
    editor, keep = StructuralEditor(net, EXAMPLE), [0, 2, 5]
    bits = {"stem": torch.zeros(8), "aux.conv": torch.zeros(6)}
    for values in bits.values():
        values[keep] = 1
    with editor.gates(bits):
        clean = net.eval()(images())
        gated = (clean, *tensors_of(expose(net, editor.layout.auxiliary)(images())))
    for name in bits:
        editor.prune(name, keep)
    assert_close(both(net, editor), gated)


def test_all_classifiers_are_replaced_together() -> None:
    net = two_heads()
    editor = StructuralEditor(net, EXAMPLE)
    assert editor.resize_output(3).group == "fc"
    assert [tuple(output.shape) for output in both(net)] == [(4, 3)] * 3
    twin = two_heads()
    StructuralEditor.replay(twin, EXAMPLE, editor.edits)
    twin.load_state_dict(net.state_dict(), strict=True)
    with pytest.raises(InputError, match="holds the model's output"):
        editor.prune("aux.fc2", [0, 1])


def test_a_block_in_front_of_a_head_can_leave() -> None:
    net = two_heads()
    editor, silent = StructuralEditor(net, EXAMPLE), copy.deepcopy(net)
    nn.init.zeros_(silent.block.conv.weight)
    nn.init.zeros_(silent.block.conv.bias)
    assert editor.bypassable == ("block",)
    editor.bypass("block")
    assert_close(both(net), both(silent))
    assert editor.layout.auxiliary and [axis.module for axis in editor.groups["stem"].readers] == ["last", "aux.conv"]


def weighted(x: torch.Tensor) -> torch.Tensor:
    return x * torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device)[:, None, None]


def reversed_(x: torch.Tensor) -> torch.Tensor:
    return weighted(x).flip(1)


MISREADINGS: dict[str, Look] = {
    "places matter": weighted,
    "another order": reversed_,
    "a width": lambda x: x.unflatten(1, (2, 4)).flatten(1, 2),
    "a sum": lambda x: x + x.mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_what_only_training_does_to_channels_is_seen(name: str) -> None:
    """Evaluation alone would let `stem` be edited."""
    editor = StructuralEditor(two_heads(MISREADINGS[name]), EXAMPLE)
    assert not editor.groups["stem"].editable
    assert {"last", "aux.conv", "aux.fc1"} <= {group.name for group in editor.editable}


class Functional(TwoHeads):
    """As torchvision's heads once were: dropout as a function, in a module that must be in training mode."""

    def __init__(self) -> None:
        super().__init__(lambda x: F.dropout(x, 0.5, training=self.training))


def test_random_heads_leave_the_rest_editable() -> None:
    torch.manual_seed(0)
    editor = StructuralEditor(Functional().double(), EXAMPLE)
    assert {"last", "aux.conv", "aux.fc1"} <= {group.name for group in editor.editable}


class Adding(TwoHeads):
    """What only training calls goes into the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(F.relu(self.norm(self.stem(x))))
        aux = self.aux(x) if self.training else 0
        return self.fc(F.relu(self.last(x)).mean((2, 3))) + aux


def test_an_addition_of_training_is_part_of_the_logits() -> None:
    torch.manual_seed(0)
    net = randomise(Adding().double())
    editor = StructuralEditor(net, EXAMPLE)
    assert [axis.module for axis in editor.groups[editor.layout.output].writers] == ["aux.fc2", "fc"]

    def looked() -> tuple[torch.Tensor, ...]:
        return tuple(copy.deepcopy(net).train(mode)(images()) for mode in (False, True))

    before = looked()
    for group in editor.editable:
        editor.grow(group.name, 2)
    assert_close(looked(), before)


class Exchanged(TwoHeads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(F.relu(self.norm(self.stem(x))))
        return self.aux(x) if self.training else self.fc(F.relu(self.last(x)).mean((2, 3)))


class Elsewhere(TwoHeads):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.block(F.relu(self.norm(self.stem(x))))
        aux = self.aux(x) if self.block.training else None
        x = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return (x, aux) if aux is not None else x


class Features(TwoHeads):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.block(F.relu(self.norm(self.stem(x))))
        out = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return (out, self.aux.conv(x)) if self.training else out


class Named(TwoHeads):
    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        return {"logits": out.logits, "aux": out.aux} if self.training else out


class Often(TwoHeads):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.block(F.relu(self.norm(self.stem(x))))
        out = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return (out, self.aux(x), self.aux(-x)) if self.training else out


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            Exchanged,
            r"last: the layer is used in evaluation mode only, and others \(aux\.conv, aux\.norm\) in",
        ),
        (Elsewhere, r"aux\.conv: .* training mode only, and what switches it on is not among the modules that hold it"),
        (Features, r"in training mode it returns tuple; it must return logits .* or a tuple of these"),
        (Named, r"in training mode it returns dict"),
        (Often, r"aux\.conv: the layer is called 2 times in training mode"),
    ],
)
def test_what_cannot_be_followed_is_refused(net: type[nn.Module], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s){said}"):
        StructuralEditor(net(), EXAMPLE)


def test_a_classifier_in_parts_is_not_replaced() -> None:
    torch.manual_seed(0)

    class Parts(TwoHeads):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.block(F.relu(self.norm(self.stem(x))))
            out = self.fc(F.relu(self.last(x)).mean((2, 3)))
            return (out, torch.cat([self.aux(x), self.side(x.mean((2, 3)))], 1)) if self.training else out

    net = Parts()
    net.side = nn.Linear(8, 3)
    editor = StructuralEditor(net, EXAMPLE)
    with pytest.raises(InputError, match=r"side: part of a classifier that only training uses; replace it by hand"):
        editor.resize_output(4)
    assert editor.edits == ()
