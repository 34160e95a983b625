"""What is taught wrongly is refused with the reason, or proven wrong; and whose word counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.structure import LayerKind, StructuralEditor, kinds, teach_layer
from tests.structure.networks import EXAMPLE
from tests.structure.taught import (
    FILTER_RESPONSE,
    GATE,
    KERNEL,
    LOW_RANK,
    STANDARDISED,
    FilterResponse,
    Gate,
    Kernel,
    LowRank,
    Net,
    Standardised,
)
from tests.structure.test_mixing import assert_honest


@pytest.fixture(autouse=True)
def taught() -> Iterator[None]:
    kept = dict(kinds._TAUGHT)
    yield
    kinds._TAUGHT.clear()
    kinds._TAUGHT.update(kept)


def editor_of(net: nn.Module) -> StructuralEditor:
    torch.manual_seed(0)
    return assert_honest(net)


def reason(net: nn.Module, group: str) -> str:
    return editor_of(net).groups[group].reason


@pytest.mark.parametrize("wrong", ["Kernel", Kernel(2, 3), 3, dict])
def test_only_a_class_of_layers_can_be_taught(wrong: Any) -> None:
    with pytest.raises(InputError, match="give the class of the layer"):
        teach_layer(wrong, KERNEL)


def test_no_word_about_all_layers_and_no_other_description() -> None:
    with pytest.raises(InputError, match="every layer is one"):
        teach_layer(nn.Module, KERNEL)
    with pytest.raises(InputError, match="give a LayerKind"):
        teach_layer(Kernel, {"out": ("kernel", 1)})  # type: ignore[arg-type]
    assert Kernel not in kinds._TAUGHT


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ({"slots": {"out": (("kernel", 1),)}}, 'give "in" and "out", or "both" alone'),
        ({"slots": {"in": (), "out": (), "both": ()}}, 'give "in" and "out", or "both" alone'),
        ({"slots": {"both": (("gamma", -1),)}}, "counted from the first"),
        ({"slots": {"both": ("gamma",)}}, "give the tensor's name and its dimension"),
        ({"slots": {"both": (("gamma", 1),)}, "fill": {"gama": 1.0}}, "did you mean 'gamma'"),
        ({"slots": {"both": (("gamma", 1),)}, "fill": {"gamma": "zeros"}}, 'give a number, "mean" or "random"'),
        ({"slots": {"both": (("gamma", 1),)}, "widths": {"out": ("n",)}}, "counts the side 'out'"),
        ({"slots": {"both": (("gamma", 1),)}, "counts": ("groups",)}, "needs parts"),
        ({"slots": {"both": (("gamma", 1),)}, "role": "nrom"}, "did you mean 'norm'"),
    ],
)
def test_a_description_that_makes_no_sense(said: dict[str, Any], heard: str) -> None:
    with pytest.raises(InputError, match="this kind of layer makes no sense") as caught:
        LayerKind(**said)
    assert heard in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        LayerKind(slots={"both": (("gamma", 1),)}, fill={"beta": True}, counts=("groups",), role="norms")
    assert all(words in str(caught.value) for words in ("'beta', which no slot", "True", "needs parts", "'norms'"))


def test_layers_that_do_not_fit_are_named_all_at_once() -> None:
    teach_layer(
        Kernel,
        LayerKind(
            slots={"in": (("kernel", 0),), "out": (("kernal", 1), ("bias", 1))},
            widths={"in": ("input",), "out": ("outputs",)},
        ),
    )
    teach_layer(FilterResponse, LayerKind(slots={"both": (("gamma", 1), ("beta", 0))}))
    with pytest.raises(UnsupportedModelError) as caught:
        StructuralEditor(Net(FilterResponse(8), b=Kernel(8, 9), c=Kernel(9, 6), flat=True), EXAMPLE)
    said = str(caught.value)
    for layer in ("b (Kernel)", "c (Kernel)"):
        assert f"{layer}: it has no parameter or buffer 'kernal'; did you mean 'kernel'?" in said
        assert f"{layer}: it has no whole number 'input'" in said
        assert f"{layer}: 'bias' of shape" in said and "has no dimension 1" in said
    assert "middle (FilterResponse): it is unclear how many channels it passes: gamma says 8, beta says 1" in said


class Wrapped(nn.Module):
    """Holds a layer that the editor knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Conv2d(8, 9, 3, padding=1), nn.Parameter(torch.ones(9, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


class Loose(nn.Module):
    """Keeps its scale where no state dict sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_layers_within_layers_loose_tensors_and_norms_over_channels() -> None:
    teach_layer(Wrapped, LayerKind(slots={"in": (), "out": (("scale", 0),)}))
    teach_layer(Loose, LayerKind(slots={"both": (("scale", 0),)}, mixes=lambda layer: True))
    with pytest.raises(UnsupportedModelError) as caught:
        StructuralEditor(Net(Loose(), b=Wrapped()), EXAMPLE)
    said = str(caught.value)
    assert "b (Wrapped): its type was taught, and it holds layers that are edited by themselves (inner)" in said
    assert "b (Wrapped): nothing says how many channels it reads" in said
    assert "middle (Loose): it has no parameter or buffer 'scale'" in said
    assert "do not say that it mixes" in said


def test_a_wrapper_need_not_be_taught() -> None:
    assert not reason(Net(b=Wrapped()), "a") and not reason(Net(b=Wrapped()), "b.inner")


def test_a_kind_can_refuse_a_layer() -> None:
    teach_layer(Gate, LayerKind(slots=GATE.slots, refuse=lambda layer: "too wide" if layer.channels > 7 else ""))
    with pytest.raises(UnsupportedModelError, match=r"middle \(Gate\): too wide"):
        StructuralEditor(Net(Gate(8)), EXAMPLE)


def test_what_was_not_taught_keeps_its_width() -> None:
    editor = editor_of(Net(b=Kernel(8, 9), c=Kernel(9, 6), flat=True))
    assert all(group.reason for group in editor.groups.values())


def test_a_tensor_that_was_not_mentioned_shows() -> None:
    slots = {**LOW_RANK.slots, "out": (("weight", 0), ("bias", 0))}
    teach_layer(LowRank, LayerKind(slots=slots, channel_dim=-1))
    assert "assumes its width" in reason(Net(b=LowRank(8, 9), flat=True), "b")


def test_sides_taken_for_each_other_show() -> None:
    teach_layer(Kernel, LayerKind(slots={"in": (("kernel", 1),), "out": (("kernel", 0),)}, channel_dim=-1))
    net = Net(b=Kernel(8, 8, bias=False), c=nn.Linear(8, 6), flat=True)
    assert all(reason(net, group) for group in ("a", "b"))


class Whitened(nn.Module):
    """Multiplies by a matrix of statistics, which is the identity before any training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def test_what_buffers_do_shows_though_they_do_nothing_yet() -> None:
    teach_layer(Whitened, LayerKind(slots={"both": (("matrix", 0), ("matrix", 1))}, fill={"matrix": 0.0}))
    assert "mixes its channels" in StructuralEditor(Net(Whitened()), EXAMPLE).groups["a"].reason


class Shifted(Kernel):
    """Takes something off what it is given, so that a zero is not nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.kernel.detach().mean(1) - 1)


class Positive(nn.Linear):
    """Reads with magnitudes: weights cannot cancel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


class Squared(nn.Linear):
    """Reads with squares: copies cannot share a weight either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.square(), self.bias)


def test_readers_of_their_own_ways() -> None:
    teach_layer(Kernel, KERNEL)
    assert "c (Shifted): forward() makes something of a channel that is zero" in reason(
        Net(c=Shifted(9, 6), flat=True, b=Kernel(8, 9)), "b"
    )
    for layer in (Positive, Squared):
        assert f"c ({layer.__name__}): forward() changes when weights" in reason(
            Net(b=nn.Linear(8, 9), c=layer(9, 6), flat=True), "b"
        )
    told = LayerKind(
        slots=kinds.LINEAR.slots,
        widths=kinds.LINEAR.widths,
        fill={"weight": 0.0, "bias": 0.0},
        channel_dim=-1,
    )
    teach_layer(Positive, told)
    assert not reason(Net(b=nn.Linear(8, 9), c=Positive(9, 6), flat=True), "b")
    teach_layer(Squared, told)
    assert "copies share one" in reason(Net(b=nn.Linear(8, 9), c=Squared(9, 6), flat=True), "b")


class Finer(Kernel):
    """A subclass of a taught type."""


class Finest(Finer):
    """A subclass of that."""


def test_whose_word_counts() -> None:
    other = LayerKind(slots=KERNEL.slots, channel_dim=-1)
    teach_layer(Kernel, other)
    teach_layer(Kernel, KERNEL)
    assert kinds.kind_of(Kernel(2, 3)) is KERNEL and kinds.kind_of(Finest(2, 3)) is KERNEL
    teach_layer(Finer, other)
    assert [kinds.kind_of(t(2, 3)) for t in (Kernel, Finer, Finest)] == [KERNEL, other, other]
    assert kinds.kind_of(Standardised(2, 3)) is kinds.CONV
    teach_layer(Standardised, STANDARDISED)
    assert kinds.kind_of(Standardised(2, 3)) is STANDARDISED and kinds.kind_of(nn.Conv2d(2, 3, 1)) is kinds.CONV
    teach_layer(nn.modules.batchnorm._NormBase, FILTER_RESPONSE)
    assert kinds.kind_of(nn.BatchNorm2d(2)) is kinds.BATCH_NORM  # which is known of a nearer base
    teach_layer(nn.BatchNorm2d, FILTER_RESPONSE)
    assert kinds.kind_of(nn.BatchNorm2d(2)) is FILTER_RESPONSE and kinds.kind_of(nn.BatchNorm1d(2)) is kinds.BATCH_NORM
