"""What the editor refuses, what it says, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.structure import NEW, Edit, StructuralEditor
from tests.structure.networks import EXAMPLE, Net, images


class Stem(nn.Module):
    """A small network around one layer in question."""

    def __init__(self, *layers: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*layers)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        return self.fc((tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))


class Tied(Stem):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.layers[1].weight = self.layers[0].weight


class Returns(Stem):
    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(super().forward(x))  # type: ignore[return-value]


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Prefixed(nn.Module):
    """A wrapper as torch.compile makes one, without the seconds that importing its compiler takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(x)


def reused() -> Stem:
    layer = nn.Conv2d(8, 8, 1)
    return Stem(layer, nn.ReLU(), layer)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Stem(), EXAMPLE)


def pruned_by_torch() -> Stem:
    import torch.nn.utils.prune

    model = Stem(nn.Conv2d(8, 8, 1))
    torch.nn.utils.prune.l1_unstructured(model.layers[0], "weight", 0.5)
    return model


def parametrised(how: Callable[[nn.Module], nn.Module]) -> Stem:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stem(how(nn.Conv2d(8, 8, 1)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped transposed": (
        lambda: Stem(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)),
        "grouped transposed convolution cannot be edited yet",
    ),
    "layer norm": (
        lambda: Stem(nn.LayerNorm([8, 8, 8])),
        r"layers\.0 \(LayerNorm\): layer norm mixes all it normalises, and over",
    ),
    "local response norm": (lambda: Stem(nn.LocalResponseNorm(2)), "local response norm mixes"),
    "lazy": (lambda: Stem(nn.LazyConv2d(8, 1)), "run one batch through the model first"),
    "half": (lambda: Stem().half(), r"stem \(Conv2d\): parameters are torch.float16; call model.float\(\)"),
    "bfloat16": (lambda: Stem().bfloat16(), "parameters are torch.bfloat16"),
    "tied weights": (Tied, r"layers\.0\.weight, layers\.1\.weight: one parameter serves several layers; untie"),
    "reused layer": (reused, r"layers\.0: the layer is called 2 times in one forward pass"),
    "weight norm": (
        lambda: parametrised(torch.nn.utils.parametrizations.weight_norm),
        r"layers\.0 \(ParametrizedConv2d\): weight is parametrised; remove the parametrisation",
    ),
    "old weight norm": (lambda: parametrised(torch.nn.utils.weight_norm), r"layers\.0 \(Conv2d\): weight is parametr"),
    "old spectral norm": (lambda: parametrised(torch.nn.utils.spectral_norm), "weight is parametrised"),
    "torch's own pruning": (pruned_by_torch, r"layers\.0 \(Conv2d\): weight is parametrised"),
    "compiled": (lambda: Prefixed(Stem()), r"it is compiled; pass the module that was given to torch.compile"),
    "data parallel": (lambda: nn.DataParallel(Stem()), "it is wrapped for parallel training; pass model.module"),
    "scripted": (scripted, "it is a TorchScript module; pass the Python module it was made from"),
    "a tuple": (lambda: Returns(lambda y: (y, y)), "it returns tuple; it must return logits"),
    "a dictionary": (lambda: Returns(lambda y: {"out": y}), "it returns dict"),
    "maps": (lambda: Returns(lambda y: y[..., None]), r"it returns \(2, 5, 1\); it must return logits of shape"),
    "another batch": (lambda: Returns(lambda y: y.mean(0, keepdim=True)), r"it returns \(1, 5\)"),
    "no parameters": (Nothing, "Nothing cannot be edited: it has no parameters"),
}


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that an editor could disturb in a model that is only looked at."""
    lazy = torch.nn.parameter.is_lazy
    return {
        "state": {k: v if lazy(v) else v.clone() for k, v in model.state_dict().items()},
        "ids": [id(parameter) for parameter in model.parameters()],
        "grad": [None if lazy(p) or p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def training_of(model: nn.Module, pattern: Sequence[bool]) -> None:
    for number, module in enumerate(model.modules()):
        module.training = pattern[number % len(pattern)]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_left_as_it_was(name: str) -> None:
    factory, message = REFUSED[name]
    model = factory()
    if name != "scripted":
        training_of(model, (True, False, True))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        StructuralEditor(model, EXAMPLE)
    assert same(snapshot(model), before)


def test_torchs_own_attention_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"attention \(MultiheadAttention\): .*open_attention\(model\) first"
    ):
        StructuralEditor(Transformer(), EXAMPLE)


def test_all_layers_are_listed_at_once() -> None:
    model = Stem(
        nn.ConvTranspose2d(8, 8, 1, groups=4),
        nn.LocalResponseNorm(2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.LayerNorm([8, 8, 8]),
        nn.ConvTranspose2d(8, 8, 1, groups=2).half(),
    )
    model.fc.bias = model.stem.bias
    with pytest.raises(UnsupportedModelError) as caught:
        StructuralEditor(model, EXAMPLE)
    message = str(caught.value)
    for layer in range(5):
        assert f"layers.{layer}" in message
    assert "stem.bias, fc.bias: one parameter serves several layers" in message
    assert "layers.4 (ConvTranspose2d): grouped" in message and "layers.4 (ConvTranspose2d): parameters are" in message
    assert "torch.float16" in message


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8), (2, 8, 8, 3)])
def test_an_example_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    model = Stem(nn.BatchNorm2d(8)).train()
    before = snapshot(model)
    with pytest.raises(
        UnsupportedModelError, match=r"does not run on an input of shape \(" + ", ".join(map(str, shape))
    ):
        StructuralEditor(model, torch.zeros(shape))
    assert same(snapshot(model), before)


@pytest.mark.parametrize("pattern", [(True,), (False,), (True, False, False)], ids=["train", "eval", "mixed"])
def test_looking_at_a_model_changes_nothing(pattern: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    model = Net([(1, 4), (5, 6), (4, 5)], "flatten", 4)
    model(torch.rand(EXAMPLE.shape)).sum().backward()
    frozen = ["stem.conv.weight", "blocks.0.conv1.weight", "blocks.1.depth.weight", "fc.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    training_of(model, pattern)
    before, noise = snapshot(model), torch.random.get_rng_state()
    editor = StructuralEditor(model, EXAMPLE)
    assert same(snapshot(model), before)
    assert torch.equal(torch.random.get_rng_state(), noise), "looking draws random numbers"
    # Frozen layers are traced all the same (tracing follows autograd), and stay frozen when they are edited.
    reference = StructuralEditor(copy.deepcopy(model).requires_grad_(True), EXAMPLE)
    assert editor.layout == reference.layout
    for group in editor.editable:
        editor.prune(group.name, range(group.min_width, group.width))
        editor.grow(group.name, 2)
    assert [n for n, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    assert [module.training for module in model.modules()] == before["training"]
    assert snapshot(model)["hooks"] == before["hooks"]


def test_a_wholly_frozen_model_is_traced() -> None:
    model = Stem(nn.Conv2d(8, 8, 1)).requires_grad_(False)
    with torch.no_grad():
        editor = StructuralEditor(model, EXAMPLE)
    assert [group.name for group in editor.editable] == ["stem", "layers.0"]
    editor.prune("stem", [1])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_inference_mode_is_traced_or_refused() -> None:
    model = Stem(nn.Conv2d(8, 8, 1))
    with torch.inference_mode():
        editor = StructuralEditor(model, EXAMPLE)
    assert [group.name for group in editor.editable] == ["stem", "layers.0"]


# Edits


def editor_of(*layers: nn.Module, round_to: int = 1) -> StructuralEditor:
    torch.manual_seed(0)
    return StructuralEditor(Stem(*layers).eval(), EXAMPLE, round_to=round_to)


def refused(editor: StructuralEditor, message: str, edit: Callable[[], object]) -> None:
    """The edit raises, and nothing has changed."""
    before, edits, widths = snapshot(editor.model), editor.edits, editor.widths
    with pytest.raises(InputError, match=message):
        edit()
    assert same(snapshot(editor.model), before)
    assert editor.edits == edits and editor.widths == widths
    editor.model(EXAMPLE)


def test_unknown_groups_are_answered_with_the_nearest() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1))
    message = "there is no channel group 'layer.0'; did you mean 'layers.0'"
    refused(editor, message, lambda: editor.prune("layer.0", [0]))
    refused(editor, message, lambda: editor.resize("layer.0", [NEW]))
    refused(editor, message, lambda: editor.grow("layer.0", 2))
    refused(editor, "'layer.0'; did you mean", lambda: editor.gates({"layer.0": torch.ones(8)}))
    refused(editor, r"one of: fc, layers\.0, stem", lambda: editor.prune("zzz", [0]))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([0, 8], "group 'stem' has channels 0 to 7; there is no channel 8"),
        ([-2, 0], "there is no channel -2"),
        ([99], "there is no channel 99"),
        ([], "would have 0 channels left; keep at least 1"),
    ],
)
def test_sources_out_of_range(sources: Iterable[int], message: str) -> None:
    editor = editor_of(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    refused(editor, message, lambda: editor.resize("stem", list(sources)))
    editor.prune("stem", [0, 1, 2])
    refused(editor, "has channels 0 to 2; there is no channel 3", lambda: editor.prune("stem", [0, 3]))


def test_a_mask_is_not_a_list_of_channels() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1))
    refused(editor, "mask|boolean", lambda: editor.prune("stem", torch.arange(8) % 2 == 0))


def test_growing_by_nothing_and_unknown_beginnings() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1))
    refused(editor, r"grow\('stem', extra=0\): must be at least 1", lambda: editor.grow("stem", 0))
    refused(editor, "init='pairs' does not exist; did you mean 'pair'", lambda: editor.grow("stem", 1, init="pairs"))
    refused(
        editor, "needs at least one existing channel to copy", lambda: editor.resize("stem", [NEW] * 2, init="clone")
    )
    refused(editor, "num_classes=1: must be at least 2", lambda: editor.resize_output(1))


def test_all_problems_of_one_edit_at_once() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1), round_to=4)
    refused(
        editor,
        r"(?s)no channel 9.*3 channels, no multiple of round_to=4.*init='zero'.*did you mean 'zero_out'",
        lambda: editor.resize("stem", [0, 9, NEW], init="zero"),
    )


def test_the_output_is_never_resized() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1))
    refused(editor, "group 'fc' cannot be edited: holds the model's output", lambda: editor.prune("fc", [0, 1]))
    refused(editor, "holds the model's output", lambda: editor.gates({"fc": torch.ones(5)}))
    editor.resize_output(3)
    assert editor.model(EXAMPLE).shape == (2, 3)


def test_an_output_that_is_a_convolution_is_never_resized() -> None:
    import torchvision

    model = torchvision.models.squeezenet1_1(num_classes=10).eval()
    editor = StructuralEditor(model, torch.zeros(2, 3, 64, 64))
    assert editor.layout.output == "classifier.1"
    refused_before = editor.widths["classifier.1"]
    with pytest.raises(InputError, match=r"group 'classifier\.1' cannot be edited: holds the model's output"):
        editor.prune("classifier.1", range(5))
    for group in editor.editable:
        editor.prune(group.name, range(0, group.width, 2))
    assert editor.widths["classifier.1"] == refused_before == 10
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert model.classifier[1].out_channels == 10


def test_round_to() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1), round_to=4)
    refused(editor, "6 channels, no multiple of round_to=4", lambda: editor.prune("stem", range(6)))
    refused(editor, "10 channels, no multiple of round_to=4", lambda: editor.grow("stem", 2))
    editor.grow("stem", 4)
    editor.prune("stem", [0, 3, 5, 11])
    assert editor.widths["stem"] == 4
    with pytest.raises(InputError, match="round_to=0: must be at least 1"):
        StructuralEditor(Stem(), EXAMPLE, round_to=0)


@pytest.mark.parametrize(
    "passer",
    [lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), lambda: nn.PReLU(8)],
    ids=["depthwise", "prelu"],
)
def test_a_channelwise_layer_keeps_two_channels(passer: Callable[[], nn.Module]) -> None:
    # With one it would look like an ordinary convolution, or like a slope that all channels share.
    editor = editor_of(passer(), nn.Conv2d(8, 8, 1))
    assert editor.groups["stem"].min_width == 2
    refused(editor, "would have 1 channels left; keep at least 2", lambda: editor.prune("stem", [3]))
    editor.prune("stem", [3, 6])
    again = StructuralEditor(editor.model, EXAMPLE)
    assert again.widths == editor.widths
    editor.grow("stem", 3)
    editor.model(images(2).float())


def test_replay_refuses_what_does_not_fit() -> None:
    for edit, message in [
        (Edit("stem", (0, 8)), "no channel 8"),
        (Edit("steam", (0,)), "did you mean 'stem'"),
        (Edit("layers.0", ()), "0 channels left"),
    ]:
        model = Stem(nn.Conv2d(8, 8, 1))
        before = snapshot(model)
        with pytest.raises(InputError, match=message):
            StructuralEditor.replay(model, EXAMPLE, [edit])
        assert same(snapshot(model), before)


def test_gates_of_the_wrong_length() -> None:
    editor = editor_of(nn.Conv2d(8, 8, 1))
    refused(
        editor,
        r"(?s)'stem' needs 8 scores; these have shape \(7,\).*'layers.0' needs 8 scores; these have shape \(8, 1\)",
        lambda: editor.gates({"stem": torch.ones(7), "layers.0": torch.ones(8, 1)}),
    )


def test_an_output_that_autograd_does_not_know() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    with pytest.raises(UnsupportedModelError, match=r"autograd sees no way .* leave out no_grad\(\) and detach\(\)"):
        StructuralEditor(Detached(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), EXAMPLE)
