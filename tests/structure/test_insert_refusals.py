"""Where no part can be inserted, and why; and records that cannot have been written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError
from robustcompress.structure import Insert, StructuralEditor, edit_from_json
from tests.structure.networks import Inverted, Residual, randomise
from tests.structure.test_models import editor_of


class Functional(nn.Module):
    """What its branch ends with is no module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(6, 6, 3, padding=1), nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.conv(x)


class Even(nn.Module):
    """Two ways of one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.one(x) + self.two(x))


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) * x


class Curious(nn.Module):
    """Looks into the layer that ends its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) * 1.0 if self.conv.out_channels < 0 else x + self.conv(x)


class Last(nn.Module):
    """Channels last, four dimensions: parts would take the rows for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.up(x)))


class Around(nn.Module):
    def __init__(self, block: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.fc, self.last = nn.Conv2d(3, 6, 3, padding=1), block, nn.Linear(6, 5), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.block(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Functional(), "what its residual branch ends with is what no module returns"),
        (Even(), "both ways to its sum pass 1 layers"),
        (Three(), "no sum of two, but the result of MulBackward0"),
        (Curious(), "the model does not run with it"),
        (nn.Sequential(Residual(6, 3), Inverted(6, 4)), r"it consists of blocks; name one of them: block\.0, block\.1"),
        (nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), "no sum of a branch and a shortcut"),
    ],
    ids=["functional", "even", "product", "curious", "several", "chain"],
)
def test_the_reason_is_said_and_nothing_has_changed(block: nn.Module, said: str) -> None:
    net = randomise(Around(block))
    editor = StructuralEditor(net, torch.zeros(2, 3, 8, 8))
    before, groups, state = repr(net), editor.groups, editor.generator.get_state()
    with pytest.raises(InputError, match=rf"the insertion was refused: block.*{said}"):
        editor.insert("block", "se")
    assert repr(net) == before and editor.groups == groups and not editor.edits
    assert torch.equal(editor.generator.get_state(), state)


def test_where_channels_come_last_no_part_fits() -> None:
    editor = StructuralEditor(randomise(Around(Last(), last=True)), torch.zeros(2, 3, 6, 6))  # as many rows as channels
    assert editor.insertable == ()
    with pytest.raises(InputError, match="has its channels elsewhere than in dimension 1"):
        editor.insert("block", "rir")
    assert not editor.parts


def test_all_complaints_come_at_once() -> None:
    editor = editor_of("resnet8")
    editor.insert("layers.0.0", "se")
    with pytest.raises(InputError) as caught:
        editor.insert_all(
            [("layers.0.0", "se"), ("layers.1", "se"), ("layers.9.0", "rir"), ("conv1", "se"), ("fc", "sa")]
        )
    for said in (
        "layers.0.0: a part of kind 'se' (squeeze-excite) was inserted there already",
        "there is no module 'layers.9.0'; did you mean",
        "conv1 (Conv2d): it is a single layer",
        "kind='sa' does not exist; did you mean 'se'",
    ):
        assert said in str(caught.value)
    with pytest.raises(InputError, match=r"residual in residual\) was inserted there already"):
        editor.insert_all([("layers.2.0", "rir"), ("layers.2.0", "rir")])
    with pytest.raises(InputError, match="it is a part that was inserted"):
        editor.insert("layers.0.0.bn2.se", "rir")
    assert len(editor.edits) == 1


def test_blocks_of_a_transformer_are_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"gives \[64, 40\], and parts are for images"):
        editor_of("vit_micro").insert("blocks.0", "se")


@pytest.mark.parametrize(
    "record",
    [
        {"insert": "", "kind": "se", "width": 8},
        {"insert": "a", "kind": "se"},
        {"insert": "a", "kind": 3, "width": 8},
        {"insert": "a", "kind": "se", "width": 0},
        {"insert": "a", "kind": "se", "width": 1 << 40},
        {"insert": "a", "kind": "se", "width": True},
        {"insert": "a", "kind": "se", "width": 8, "bypass": "b"},
    ],
)
def test_a_record_that_nobody_wrote_is_no_insertion(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not an insertion|a part has"):
        edit_from_json(record)


def test_a_roll_by_less_than_nothing_is_followed() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.out(self.conv(x).roll(-2, 1)).mean((2, 3)))

    net = randomise(Rolled())
    editor = StructuralEditor(copy.deepcopy(net), torch.zeros(2, 3, 8, 8))
    assert editor.groups["conv"].width == 6  # found, whether or not it can be edited


def test_an_insertion_reads_back() -> None:
    edit = Insert("layers.0.1", "rir", 8)
    assert edit_from_json(edit.to_json()) == edit
