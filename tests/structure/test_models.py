"""The laws of the structural layer over networks that people use, each against an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from robustcompress import models
from robustcompress.export import export_onnx
from robustcompress.structure import ChannelGroup, Edit, StructuralEditor
from robustcompress.structure.verify import leave_out, silence_readers
from tests.structure.networks import images, randomise

CLASSES = 10


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)

    return build


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    model = VisionTransformer(**sizes, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # it begins at zero, and then every output is equal
    return models.open_attention(model)


EVERY: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet8": (lambda: models.resnet8(width=0.5), 32),
    "resnet20": (lambda: models.resnet20(width=0.5), 32),
    "resnet18": (lambda: models.resnet18(width=0.25), 32),
    "preact_resnet18": (lambda: models.preact_resnet18(width=0.25), 32),
    "wrn_16_4": (lambda: models.wrn_16_4(width=0.5), 32),
    "vgg16_bn": (lambda: models.vgg16_bn(width=0.25), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(width=0.25), 32),
    "torchvision:resnet18": (torchvision_model("resnet18"), 64),
    "torchvision:squeezenet1_1": (torchvision_model("squeezenet1_1"), 64),
    "torchvision:mobilenet_v3_small": (torchvision_model("mobilenet_v3_small"), 64),
    "densenet121": (lambda: models.densenet121(width=0.125), 32),
    "vit_micro": (lambda: models.vit_micro(heads=5, dim=40), 32),
    "torchvision:vit": (torchvision_vit, 32),
}

# A transformer's residual stream goes through layer norms, which take their statistics over it.
EMBEDDING = {"vit_micro": ["patch"], "torchvision:vit": ["conv_proj"]}

EXPORTED = ("resnet8", "wrn_16_4", "torchvision:squeezenet1_1", "vit_micro")


def in_one_process(name: str) -> pytest.MarkDecorator:
    """Each network is traced once and then shared."""
    return pytest.mark.xdist_group(f"structure-{name}")


named = pytest.mark.parametrize("name", [pytest.param(name, marks=in_one_process(name)) for name in EVERY])

replayed = pytest.mark.parametrize(
    "name",
    [
        # Its 240 edits take a quarter of this file's time.
        pytest.param(name, marks=[in_one_process(name), *([pytest.mark.slow] if name == "densenet121" else [])])
        for name in EVERY
    ],
)
exported = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[in_one_process(name), *([] if name in EXPORTED else [pytest.mark.slow])])
        for name in EVERY
    ],
)

_TRACED: dict[str, StructuralEditor] = {}


def editor_of(name: str) -> StructuralEditor:
    """A fresh editor on a fresh copy of a network with random batch-norm statistics: double precision, eval mode."""
    if name not in _TRACED:
        factory, size = EVERY[name]
        torch.manual_seed(0)
        _TRACED[name] = StructuralEditor(randomise(factory()), torch.zeros(2, 3, size, size), seed=5)
    # Copied with its model: tracing again would cost ten times as much and find the same.
    return copy.deepcopy(_TRACED[name])


def inputs(name: str, n: int = 3) -> torch.Tensor:
    return images(n, EVERY[name][1])


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model)(x)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def half(group: ChannelGroup) -> list[int]:
    """About half the channels, irregularly chosen and never the first half: order and offsets show."""
    count = max(group.min_width, group.width // 2)
    generator = torch.Generator().manual_seed(group.width)
    return sorted(torch.randperm(group.width, generator=generator)[:count].tolist())


def prune_all(editor: StructuralEditor) -> None:
    for group in editor.editable:
        editor.prune(group.name, half(group))


@named
def test_every_group_but_the_output_is_editable(name: str) -> None:
    editor = editor_of(name)
    model = editor.model
    fixed = [g.name for g in editor.groups.values() if not g.editable]
    assert fixed == [editor.layout.output]
    assert [g.name for g in editor.groups.values() if not g.exact] == EMBEDDING.get(name, [])
    assert editor.groups[editor.layout.output].reason == "holds the model's output"
    assert editor.groups[editor.layout.output].kind == "output"
    # Every convolution and linear layer writes into some group, and what a group says of its width is true.
    writers = {axis.module for group in editor.groups.values() for axis in group.members}
    layers = [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm)
    ]
    assert sorted(writers & set(layers)) == sorted(layers)
    output = model.get_submodule(editor.layout.output)
    assert editor.widths[editor.layout.output] == CLASSES
    assert CLASSES in (getattr(output, "out_features", 0), getattr(output, "out_channels", 0))


@named
def test_law_1_pruning_every_group_at_once_equals_silencing_the_readers(name: str) -> None:
    editor = editor_of(name)
    model, x = editor.model, inputs(name)
    silent, widths, full = copy.deepcopy(model), editor.widths, outputs(model, x)
    for group in editor.editable:
        silence_readers(silent, editor.layout, group.name, half(group), widths)
    params = sum(p.numel() for p in model.parameters())
    prune_all(editor)
    assert close(outputs(model, x), outputs(silent, x))
    assert not close(outputs(model, x), full, 1e-3), "pruning changed nothing: this test could not fail"
    assert sum(p.numel() for p in model.parameters()) < 0.5 * params
    for group in editor.editable:
        assert group.width == max(group.min_width, widths[group.name] // 2)


@named
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_law_2_growing_every_group_changes_no_output(name: str, training: bool) -> None:
    editor = editor_of(name)
    model, x = editor.model, inputs(name)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # its noise depends on the width
    before, widths = outputs(model, x), editor.widths
    params = sum(p.numel() for p in model.parameters())
    for number, group in enumerate(editor.editable):
        editor.grow(group.name, 1 + number % 4)
    assert sum(p.numel() for p in model.parameters()) > params
    for group in editor.editable:
        leave_out(model, editor.layout, group.name, range(widths[group.name]), editor.widths)
    assert close(outputs(model, x), before, 1e-7)
    assert model.training is training


@named
def test_law_3_growing_and_dropping_every_group_is_identity_bit_for_bit(name: str) -> None:
    editor = editor_of(name)
    model = editor.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    widths = editor.widths
    for group in editor.editable:
        editor.grow(group.name, 3)
    for group in editor.editable:
        editor.prune(group.name, range(widths[group.name]))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@replayed
def test_law_5_replay_then_strict_load_is_bit_equal(name: str) -> None:
    editor = editor_of(name)
    factory, size = EVERY[name]
    model, x = editor.model, inputs(name)
    prune_all(editor)
    for group in editor.editable:
        editor.grow(group.name, 2, init="kaiming")
    editor.resize_output(4)
    edits = [Edit.from_json(edit.to_json()) for edit in editor.edits]
    assert tuple(edits) == editor.edits
    fresh = factory().double().eval()
    replayed = StructuralEditor.replay(fresh, torch.zeros(2, 3, size, size), edits)
    assert replayed.widths == editor.widths
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    assert outputs(fresh, x).shape == (len(x), 4)


@exported
def test_law_9_the_onnx_file_of_an_edited_model_matches_it(name: str, tmp_path: Path) -> None:
    editor = editor_of(name)
    prune_all(editor)
    for group in editor.editable[::2]:
        editor.grow(group.name, 3, init="kaiming")
    sample = inputs(name, 7)
    report = export_onnx(editor.model, tmp_path / "edited.onnx", sample=sample, tolerance=1e-4)
    assert [(c.batch, c.argmax_agreement) for c in report.parity] == [(1, 1.0), (7, 1.0)]
