"""Depth: a block that leaves, against the same network with that block's branch silenced by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.errors import InputError
from robustcompress.export import export_onnx
from robustcompress.models.mobilenet import InvertedResidual
from robustcompress.models.resnet import BasicBlock, PreActBlock
from robustcompress.models.vit import Block
from robustcompress.structure import NEW, Bypass, Edit, StructuralEditor, edit_from_json
from robustcompress.structure.verify import leave_out, silence_readers
from tests.structure import networks
from tests.structure.networks import EXAMPLE, images, randomise
from tests.structure.test_models import EVERY, close, editor_of, half, inputs, outputs

generated = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def last_writers(block: nn.Module) -> list[nn.Module] | None:
    """What ends a block's branch, as its class is written; None where it has no identity shortcut."""
    from torchvision.models import mobilenetv3, resnet, vision_transformer
    from torchvision.models.convnext import CNBlock

    match block:
        case BasicBlock():
            return None if len(block.shortcut) else [block.bn2]
        case PreActBlock():
            return None if block.shortcut is not None else [block.conv2]
        case InvertedResidual():
            return [list(block.modules())[-1]] if block.residual else None
        case Block():
            return [block.attention.proj, block.fc2]
        case resnet.BasicBlock():
            return None if block.downsample is not None else [block.bn2]
        case mobilenetv3.InvertedResidual():
            return [block.block[-1][1]] if block.use_res_connect else None
        case vision_transformer.EncoderBlock():
            return [block.self_attention.inner.proj, block.mlp[3]]
        case CNBlock():
            return [block.block[5]]
        case networks.Residual():
            return [block.bn2]
        case networks.Bare():
            return [block.conv]
        case networks.Inverted():
            return [block.project]
    return None


@torch.no_grad()
def silence(model: nn.Module, name: str) -> None:
    """Set to zero what the block's branch ends with."""
    for layer in last_writers(model.get_submodule(name)) or ():
        for parameter in layer.parameters():
            parameter.zero_()


NAMES = [name for name in EVERY if name != "densenet121"]
named = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(f"structure-{n}")) for n in NAMES]
)
WITH_BLOCKS = [name for name in NAMES if name not in ("vgg16_bn", "torchvision:squeezenet1_1")]
HEAVY = ("resnet18", "resnet20", "mobilenet_v2", "torchvision:resnet18")
with_blocks = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.xdist_group(f"structure-{n}"), *([pytest.mark.slow] if n in HEAVY else [])])
        for n in WITH_BLOCKS
    ],
)


@named
def test_the_blocks_with_an_identity_shortcut_can_leave_and_no_others(name: str) -> None:
    editor = editor_of(name)
    expected = [n for n, module in editor.model.named_modules() if last_writers(module) is not None]
    assert list(editor.bypassable) == expected
    assert bool(expected) is (name in WITH_BLOCKS)


@with_blocks
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_bypass_equals_the_silenced_branch(name: str, training: bool) -> None:
    editor = editor_of(name)
    model, x = editor.model, inputs(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise depends on the draws before
    model.train(training)
    silent, full, costly = copy.deepcopy(model), outputs(model, x), sum(p.numel() for p in model.parameters())
    for block in editor.bypassable:
        silence(silent, block)
        before = dict(model.get_submodule(block).named_parameters())
        assert editor.bypass(block) == Bypass(block)
        assert isinstance(model.get_submodule(block), nn.Identity) and model.get_submodule(block).training is training
        assert close(outputs(model, x), outputs(silent, x))
        costly -= sum(p.numel() for p in before.values())
        assert sum(p.numel() for p in model.parameters()) == costly
    assert not close(outputs(model, x), full, 1e-3), "nothing changed: this test could not fail"
    assert editor.bypassable == () and editor.bypassed == tuple(edit.module for edit in editor.edits)
    assert all(m.training is training for m in model.modules() if not isinstance(m, nn.Dropout))


@with_blocks
def test_what_is_left_is_what_a_new_trace_finds(name: str) -> None:
    editor = editor_of(name)
    block = editor.bypassable[-1]
    editor.bypass(block)
    again = StructuralEditor(editor.model, torch.zeros(2, 3, EVERY[name][1], EVERY[name][1]))
    assert not [axis for axis in editor.layout.axes if axis.module.startswith(f"{block}.")]

    def shape(editor: StructuralEditor) -> set[object]:
        return {(frozenset(g.members), g.width, g.kind, g.editable) for g in editor.groups.values()}

    assert shape(editor) == shape(again)
    assert {a: len(s) for a, s in editor.layout.axes.items()} == {a: len(s) for a, s in again.layout.axes.items()}
    assert set(editor.layout.attention.values()) == set(again.layout.attention.values())


@with_blocks
def test_what_is_left_prunes_and_grows_by_the_laws(name: str) -> None:
    editor = editor_of(name)
    model, x = editor.model, inputs(name)
    for block in editor.bypassable[::2]:
        editor.bypass(block)
    before, widths = outputs(model, x), editor.widths
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for group in editor.editable:
        editor.grow(group.name, 2)
    heard = copy.deepcopy(model)
    for group in editor.editable:
        leave_out(heard, editor.layout, group.name, range(widths[group.name]), editor.widths)
    assert close(outputs(heard, x), before, 1e-7)
    for group in editor.editable:
        editor.prune(group.name, range(widths[group.name]))
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    silent = copy.deepcopy(model)
    for group in editor.editable:
        silence_readers(silent, editor.layout, group.name, half(group), widths)
    for group in editor.editable:
        editor.prune(group.name, half(group))
    assert close(outputs(model, x), outputs(silent, x))


@with_blocks
def test_replay_then_strict_load_is_bit_equal(name: str) -> None:
    editor = editor_of(name)
    factory, size = EVERY[name]
    model, x = editor.model, inputs(name)
    first, *rest = editor.bypassable
    for group in editor.editable[:3]:
        editor.resize(group.name, [*half(group), NEW], init="kaiming")
    editor.bypass(first)
    for block in rest[1:]:
        editor.bypass(block)
    for group in editor.editable[2:6]:
        editor.resize(group.name, [*half(group), NEW], init="kaiming")
    for group in editor.editable[:2]:
        editor.grow(group.name, 2)
    edits = [edit_from_json(edit.to_json()) for edit in editor.edits]
    assert tuple(edits) == editor.edits and Bypass(first) in edits
    fresh = factory().double().eval()
    replayed = StructuralEditor.replay(fresh, torch.zeros(2, 3, size, size), edits)
    assert replayed.widths == editor.widths and replayed.groups == editor.groups
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, x), outputs(model, x))


@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        "vit_micro",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("wrn_16_4", "mobilenet_v2", "torchvision:mobilenet_v3_small")
        ),
    ],
)
def test_the_onnx_file_matches(name: str, tmp_path: Path) -> None:
    editor = editor_of(name)
    for block in editor.bypassable[::2]:
        editor.bypass(block)
    for group in editor.editable[:4]:
        editor.prune(group.name, half(group))
    report = export_onnx(editor.model, tmp_path / "short.onnx", sample=inputs(name, 7), tolerance=1e-4)
    assert [(c.batch, c.argmax_agreement) for c in report.parity] == [(1, 1.0), (7, 1.0)]


def expected_blocks(net: networks.Net) -> list[str]:
    """Which of the generated blocks can leave: an activation behind the sum needs an input that is not negative."""
    found, positive = [], True
    for number, block in enumerate(net.blocks):
        if isinstance(block, networks.Bare | networks.Inverted | networks.Grouped) or (
            isinstance(block, networks.Residual) and positive
        ):
            found.append(f"blocks.{number}")
        if isinstance(block, networks.Chain | networks.Residual | networks.Projected | networks.Upsampled):
            positive = True
        elif not isinstance(block, networks.Squeeze):  # a product with a sigmoid keeps the sign
            positive = False
    return found


# Two channels behind scales and slopes of either sign: with many a draw of the weights none of them is negative.
NARROW = [networks.randomise(networks.Net([(8, 2), (1, 2)], "pool", stem)) for stem in (2, 3)]


@example(net=NARROW[0])
@example(net=NARROW[1])
@settings(generated, max_examples=60)
@given(net=networks.networks())
def test_of_generated_networks_exactly_the_identity_shaped_blocks_can_leave(net: networks.Net) -> None:
    assert list(StructuralEditor(net, EXAMPLE).bypassable) == expected_blocks(net)


@st.composite
def shortened(draw: st.DrawFn) -> tuple[networks.Net, str]:
    """A generated network with a block that can leave, and that block."""
    kinds = st.sampled_from([1, 1, 2, 5, 0, 3, 4, 6, 8])
    blocks = draw(st.lists(st.tuples(kinds, st.integers(2, 5)), max_size=2))
    blocks.insert(draw(st.integers(0, len(blocks))), (draw(st.sampled_from([2, 5])), draw(st.integers(2, 5))))
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = networks.Net(blocks, draw(st.sampled_from(["pool", "flatten", "conv"])), draw(st.integers(2, 5)))
    return randomise(net), draw(st.sampled_from(expected_blocks(net)))


@generated
@given(case=shortened(), data=st.data())
def test_a_bypass_commutes_with_resizes_of_what_stays(case: tuple[networks.Net, str], data: st.DataObject) -> None:
    net, block = case
    other = copy.deepcopy(net)
    one, two = StructuralEditor(net, EXAMPLE), StructuralEditor(other, EXAMPLE)
    silent = copy.deepcopy(net)
    silence(silent, block)
    one.bypass(block)
    assert close(net(images()), silent(images()))
    for _ in range(2):
        group = data.draw(st.sampled_from([g.name for g in one.editable]))
        low = two.groups[group].min_width
        gather = data.draw(st.lists(st.integers(0, one.widths[group] - 1), min_size=low, max_size=9))
        one.resize(group, gather)
        two.resize(group, gather)
    two.bypass(block)
    assert one.widths == two.widths and one.groups == two.groups
    assert list(net.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(net(images()), other(images()))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}


@generated
@given(case=shortened(), kind=st.sampled_from(sorted(OPTIMIZERS)), apart=st.booleans())
def test_optimizer_average_and_proxy_follow(case: tuple[networks.Net, str], kind: str, apart: bool) -> None:
    net, block = case
    net.train()
    frozen = next(iter(net.named_parameters()))[0]
    net.get_parameter(frozen).requires_grad_(False)
    inner = [p for n, p in net.named_parameters() if n.startswith(f"{block}.")]
    outer = [p for n, p in net.named_parameters() if not n.startswith(f"{block}.") and p.requires_grad]
    # The block may have a parameter group of its own, which is then empty.
    optimizer = OPTIMIZERS[kind]([{"params": outer}, {"params": inner}] if apart else [*outer, *inner])
    average, proxy = AveragedModel(net), copy.deepcopy(net).eval()

    def step() -> None:
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)

    step()
    kept = {p: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items() if p not in set(inner)}
    averages = {k: v.clone() for k, v in average.module.state_dict().items() if not k.startswith(f"{block}.")}
    editor = StructuralEditor(net, EXAMPLE)
    editor.follow(optimizer, average, proxy)
    editor.bypass(block)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in outer}
    assert set(optimizer.state) == set(kept)
    for parameter, state in kept.items():
        for key, value in state.items():
            found = optimizer.state[parameter][key]
            assert torch.equal(found, value) if torch.is_tensor(value) else found == value
    after = average.module.state_dict()
    assert list(after) == list(averages) == list(net.state_dict())
    assert all(torch.equal(after[key], averages[key]) for key in averages)
    assert list(proxy.state_dict()) == list(net.state_dict()) and not proxy.get_submodule(block).training
    assert not net.get_parameter(frozen).requires_grad and net.get_submodule(block).training
    step()
    assert average.module.eval()(images()).isfinite().all()


def test_a_block_leaves_once_and_a_whole_stage_may_leave() -> None:
    editor = editor_of("resnet20")
    model, x = editor.model, inputs("resnet20")
    silent = copy.deepcopy(model)
    for number in range(3):
        silence(silent, f"layers.0.{number}")
    editor.bypass("layers.0.1")
    with pytest.raises(InputError, match=r"layers\.0\.1 \(Identity\) cannot be bypassed: it holds no layer"):
        editor.bypass("layers.0.1")
    editor.bypass("layers.0")
    assert close(outputs(model, x), outputs(silent, x))
    assert editor.bypassed == ("layers.0.1", "layers.0")
    assert editor.groups["conv1"].kind == "hidden" and "layers.0.0.conv1" not in editor.widths


def test_a_block_behind_small_layers_of_torchvisions_convnext_can_leave() -> None:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings_ = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)]
    model = randomise(ConvNeXt(settings_, layer_scale=0.5, num_classes=5))
    editor = StructuralEditor(model, torch.zeros(2, 3, 32, 32))
    expected = [name for name, module in model.named_modules() if last_writers(module) is not None]
    assert list(editor.bypassable) == expected and len(expected) == 4
    silent = copy.deepcopy(model)
    for block in expected[1:3]:
        silence(silent, block)
        editor.bypass(block)
    assert close(outputs(model, images(2, 32)), outputs(silent, images(2, 32)))


@pytest.mark.parametrize("data", [{"bypass": ""}, {"bypass": None}, {"bypass": "a", "sources": [1]}, {"bypass": ["a"]}])
def test_a_damaged_record_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a bypass"):
        edit_from_json(data)
    assert edit_from_json(Edit("a", (1,)).to_json()) == Edit("a", (1,))
