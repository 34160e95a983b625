"""Types of blocks: a part that is inserted, against the same network without it, and against the part's own formula."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from robustcompress import Budget, ThreatModel, measure
from robustcompress.budget import CostModel
from robustcompress.errors import InputError
from robustcompress.export import export_onnx
from robustcompress.models.resnet import BasicBlock, PreActBlock
from robustcompress.robust.evaluate import evaluate
from robustcompress.structure import NEW, Bypass, StructuralEditor, edit_from_json
from robustcompress.structure.parts import LEAST_HIDDEN, InnerResidual, SqueezeExcite
from robustcompress.structure.verify import leave_out, silence_readers
from tests.structure import networks
from tests.structure.networks import EXAMPLE, images, randomise
from tests.structure.test_models import EVERY, close, editor_of, half, inputs, outputs

generated = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = ("se", "rir")
kinds = pytest.mark.parametrize("kind", KINDS)


GENERATED = (networks.Residual, networks.Bare, networks.Projected, networks.Inverted, networks.Grouped)


def residual_blocks(model: nn.Module) -> list[str]:
    """The blocks of a network that end a branch over images with a layer and add a shortcut, as its classes say."""
    from torchvision.models import mobilenetv3, resnet

    from robustcompress.models.mobilenet import InvertedResidual

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (BasicBlock, PreActBlock, resnet.BasicBlock, *GENERATED))
        or (isinstance(module, InvertedResidual) and module.residual)
        or (isinstance(module, mobilenetv3.InvertedResidual) and module.use_res_connect)
    ]


NAMES = ("resnet8", "resnet20", "wrn_16_4", "preact_resnet18", "mobilenet_v2", "torchvision:resnet18", "vit_micro")
QUICK = ("resnet8", "vit_micro")
named = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES]
)
WITH_PLACES = [n for n in NAMES if n != "vit_micro"]
with_places = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in WITH_PLACES]
)


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> None:
    """Parts that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SqueezeExcite | InnerResidual):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


@named
def test_residual_blocks_over_images_have_a_place_and_no_others(name: str) -> None:
    editor = editor_of(name)
    assert list(editor.insertable) == residual_blocks(editor.model)
    assert bool(editor.insertable) is (name != "vit_micro")


@with_places
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_changes_and_all_is_recorded(name: str, training: bool) -> None:
    editor = editor_of(name)
    model, x = editor.model.train(training), inputs(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise depends on the draws before
    before, groups, blocks = outputs(copy.deepcopy(model), x), editor.groups, editor.insertable
    leaving = editor.bypassable
    edits = editor.insert_all([(block, kind) for block in blocks for kind in KINDS])
    assert torch.equal(outputs(copy.deepcopy(model), x), before)
    assert editor.edits == editor.inserted == edits and [(e.module, e.kind) for e in edits] == [
        (block, kind) for block in blocks for kind in KINDS
    ]
    assert list(editor.parts.values()) == [*KINDS] * len(blocks)
    assert all(module.training is training for module in model.modules() if not isinstance(module, nn.Dropout))
    new = {n: g for n, g in editor.groups.items() if n not in groups}
    assert set(editor.groups) == set(groups) | set(new) and len(new) == len(edits)
    assert all(group.editable and group.kind == "hidden" for group in new.values())
    assert [g.width for g in new.values()] == [e.width for e in edits]
    for block, edit in zip([b for b in blocks for _ in KINDS], edits, strict=True):
        name_ = next(n for n, k in editor.parts.items() if n.startswith(f"{block}.") and k == edit.kind)
        channels = model.get_submodule(name_).squeeze.in_channels
        assert edit.width == min(channels, max(LEAST_HIDDEN, channels // {"se": 16, "rir": 4}[edit.kind]))
        (readers,) = [g for g in editor.groups.values() if any(a.module == f"{name_}.squeeze" for a in g.readers)]
        assert readers.name in groups, "what a part is given is the block's own group"
    for n, group in groups.items():
        now = editor.groups[n]
        assert (now.width, now.editable, now.exact, now.min_width) == (
            (group.width, group.editable, group.exact, group.min_width)
        )
    # A new trace finds the same, under the same names; and the blocks that could leave still can, and no part is one.
    size = EVERY[name][1]
    again = StructuralEditor(model, torch.zeros(2, 3, size, size))
    assert again.groups == editor.groups and again.insertable == editor.insertable == blocks
    assert again.bypassable == editor.bypassable == leaving


@with_places
def test_with_parts_prune_and_grow_keep_the_laws(name: str) -> None:
    editor = editor_of(name)
    model, x = editor.model, inputs(name)
    editor.insert_all([(block, kind) for block in editor.insertable[::2] for kind in KINDS])
    stir(model)
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
    assert not close(outputs(model, x), before, 1e-3), "nothing changed: this test could not fail"


@with_places
def test_replay_is_bit_equal_and_undo_gives_the_network_back(name: str) -> None:
    editor = editor_of(name)
    factory, size = EVERY[name]
    model, x = editor.model, inputs(name)
    first, *rest = editor.insertable
    before = outputs(model, x)
    editor.insert(first, "se")
    for group in editor.editable[:3]:
        editor.resize(group.name, [*half(group), NEW], init="kaiming")
    for block in editor.bypassable[:1]:
        editor.bypass(block)
    left = [block for block in rest if block in editor.insertable]
    editor.insert_all([(left[0], "rir"), (left[-1], "rir"), (left[-1], "se")])
    editor.prune(next(n for n in editor.groups if n.endswith("rir.squeeze")), [0, 2])
    stir(model)
    edits = [edit_from_json(edit.to_json()) for edit in editor.edits]
    assert tuple(edits) == editor.edits
    fresh = factory().double().eval()
    replayed = StructuralEditor.replay(fresh, torch.zeros(2, 3, size, size), edits)
    assert replayed.widths == editor.widths and replayed.groups == editor.groups
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    undone = editor_of(name)
    undone.insert_all([(block, kind) for block in undone.insertable for kind in KINDS])
    stir(undone.model)
    assert not close(outputs(undone.model, x), before, 1e-3)
    for part in undone.parts:
        assert undone.bypass(part) == Bypass(part)
    assert torch.equal(outputs(undone.model, x), before) and not undone.parts
    with pytest.raises(InputError, match="was inserted there already"):
        undone.insert(first, "se")


@kinds
def test_a_part_computes_what_it_says(kind: str) -> None:
    editor = editor_of("resnet8")
    block = editor.model.get_submodule("layers.1.0")
    editor.insert("layers.1.0", kind)
    stir(editor.model)
    x = torch.randn(3, block.conv1.in_channels, 8, 8, dtype=torch.float64)
    branch = block.bn2.layer(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    part = block.bn2.get_submodule(kind)
    if kind == "se":
        hidden = F.relu(branch.mean((2, 3)) @ part.squeeze.weight[:, :, 0, 0].T + part.squeeze.bias)
        gate = 1 + torch.tanh(hidden @ part.excite.weight[:, :, 0, 0].T + part.excite.bias)
        wanted = branch * gate[:, :, None, None]
    else:
        inner = F.relu(part.norm(F.conv2d(F.relu(branch), part.squeeze.weight, padding=1)))
        wanted = branch + torch.einsum("oi,nihw->nohw", part.expand.weight[:, :, 0, 0], inner)
    assert close(block(x), F.relu(wanted + block.shortcut(x)))


@kinds
def test_every_new_weight_has_a_gradient_after_one_step(kind: str) -> None:
    editor = editor_of("resnet8")
    model = editor.model.train()
    editor.insert_all([(block, kind) for block in editor.insertable])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new = {n: p for n, p in model.named_parameters() if f".{kind}." in n}

    def backward() -> dict[str, float]:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs("resnet8", 8)), torch.arange(8)).backward()
        return {name: float(parameter.grad.abs().max()) for name, parameter in new.items()}

    first = backward()
    assert all(
        (size > 0) is name.endswith(("excite.weight", "excite.bias", "expand.weight")) for name, size in first.items()
    )
    optimizer.step()
    assert all(size > 0 for size in backward().values())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_average_and_proxy_follow(name: str) -> None:
    editor = editor_of("resnet8")
    net = editor.model.train()
    frozen = net.get_parameter("conv1.weight")
    frozen.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() == 1]},
        ]
    )
    gates = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    average, proxy = AveragedModel(net), copy.deepcopy(net).eval()

    def step() -> None:
        optimizer.zero_grad()
        net(inputs("resnet8", 4)).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)

    step()
    states = {p: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    averages = {k: v.clone() for k, v in average.module.state_dict().items()}
    editor.follow(optimizer, average, proxy, gates)
    editor.insert("layers.0.0", "se")
    editor.insert("layers.2.0", "rir")
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in net.parameters() if p.requires_grad}
    assert all(p.dim() > 1 for p in optimizer.param_groups[0]["params"])
    assert all(p.dim() == 1 for p in optimizer.param_groups[1]["params"])
    assert len(gates.param_groups[0]["params"]) == 1 and not frozen.requires_grad
    for parameter, state in states.items():
        assert all(
            torch.equal(optimizer.state[parameter][k], v) if torch.is_tensor(v) else optimizer.state[parameter][k] == v
            for k, v in state.items()
        )
    after = average.module.state_dict()
    assert list(after) == list(net.state_dict()) == list(proxy.state_dict())
    assert all(
        torch.equal(after[k.replace("bn2.", "bn2.layer.") if k not in after else k], v) for k, v in averages.items()
    )
    assert all(torch.equal(after[k], v) for k, v in net.state_dict().items() if ".se." in k or ".rir." in k)
    assert not proxy.get_submodule("layers.0.0.bn2").training and net.get_submodule("layers.0.0.bn2.se").training
    step()
    assert average.module.eval()(inputs("resnet8", 4)).isfinite().all()


class Dice(nn.Module):
    """Leaves its branch out half of the time while it is trained, as the dice of Python's own say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3), networks.Inverted(8, 9), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((x if self.training and random.random() < 0.95 else self.block(x)).mean((2, 3)))


def test_a_block_that_training_may_leave_out_can_have_a_part_and_no_draw_is_lost() -> None:
    editor = StructuralEditor(randomise(Dice()), EXAMPLE)
    states = random.getstate(), torch.get_rng_state()
    editor.insert("block", "se")
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert list(editor.parts) == ["block.project.se"]


def test_a_fork_a_copy_and_the_original_go_their_ways() -> None:
    editor = editor_of("resnet8")
    editor.insert("layers.0.0", "rir")
    fork, twin = editor.fork(), copy.deepcopy(editor)
    for other in (fork, twin):
        assert other.parts == editor.parts and other.edits == editor.edits
        other.insert("layers.1.0", "se")
        assert other.model.get_submodule("layers.1.0.bn2.se").squeeze.out_channels == LEAST_HIDDEN
    assert list(editor.parts) == ["layers.0.0.bn2.rir"] and len(editor.edits) == 1
    editor.insert("layers.1.0", "se")
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(*(e.model.state_dict().values() for e in (editor, fork, twin)), strict=True)
    ), "the same seed draws the same part"


def test_what_the_parts_cost_is_counted_and_predicted() -> None:
    editor = editor_of("resnet8")
    example = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    costs, before = CostModel(editor, example), measure(editor.model, example)
    blocks = editor.insertable
    editor.insert_all([(block, kind) for block in blocks for kind in KINDS])
    after = measure(editor.model, example)
    added = macs = 0
    for part, kind in editor.parts.items():
        module = editor.model.get_submodule(part)
        c, h = module.squeeze.in_channels, module.squeeze.out_channels
        places = 32 * 32 // 4 ** int(part.split(".")[1])
        added += 2 * c * h + c + h if kind == "se" else 10 * c * h + 2 * h
        macs += (
            2 * c * h if kind == "se" else (10 * c * h + 4 * h) * places
        )  # thop counts 4 for each position of a norm
    assert after.params - before.params == added
    assert after.macs - before.macs == macs
    assert costs.predict(editor.widths) == (after.macs, after.params)
    widths = {group.name: max(group.min_width, group.width // 2) for group in editor.editable}
    for name, width in widths.items():
        editor.prune(name, range(width))
    pruned = measure(editor.model, example)
    assert costs.predict(widths)[1] == pruned.params and Budget(macs=1.0).allows(pruned, after)
    for part in list(editor.parts)[::2]:
        editor.bypass(part)
    assert costs.predict(editor.widths)[1] == measure(editor.model, example).params


def test_onnx_and_autoattack_take_it(tmp_path: Path) -> None:
    from robustcompress.data import load_data

    editor = editor_of("resnet8")
    editor.insert_all([(block, kind) for block in editor.insertable for kind in KINDS])
    stir(editor.model)
    report = export_onnx(editor.model, tmp_path / "typed.onnx", sample=inputs("resnet8", 7), tolerance=1e-4)
    assert [(c.batch, c.argmax_agreement) for c in report.parity] == [(1, 1.0), (7, 1.0)]
    data = load_data("digits").test.first(2)
    found = evaluate(editor.model.float(), data, ThreatModel("linf", 0.1), attacks=("clean", "autoattack"))
    assert {row.name for row in found.attacks} >= {"clean"} and all(0 <= row.accuracy <= 1 for row in found.attacks)


@st.composite
def extended(draw: st.DrawFn) -> tuple[networks.Net, list[tuple[str, str]]]:
    """A generated network with a residual block, and parts for some of its blocks."""
    blocks = draw(st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 10]), st.integers(2, 5)), max_size=2))
    blocks.insert(draw(st.integers(0, len(blocks))), (draw(st.sampled_from([1, 2, 3, 5, 10])), draw(st.integers(2, 5))))
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = randomise(networks.Net(blocks, draw(st.sampled_from(["pool", "flatten", "conv"])), draw(st.integers(2, 5))))
    pairs = st.tuples(st.sampled_from(residual_blocks(net)), st.sampled_from(KINDS))
    return net, draw(st.lists(pairs, min_size=1, max_size=4, unique=True))


@generated
@given(case=extended(), data=st.data())
def test_of_generated_networks(case: tuple[networks.Net, list[tuple[str, str]]], data: st.DataObject) -> None:
    net, parts = case
    reference, before = copy.deepcopy(net), net(images())
    editor = StructuralEditor(net, EXAMPLE)
    groups = editor.groups
    assert list(editor.insertable) == residual_blocks(net)
    editor.insert_all(parts)
    assert torch.equal(net(images()), before)
    assert {n: (g.width, g.editable) for n, g in groups.items()}.items() <= {
        n: (g.width, g.editable) for n, g in editor.groups.items()
    }.items()
    stir(net)
    for _ in range(2):  # law 1, for any group
        name = data.draw(st.sampled_from([g.name for g in editor.editable]))
        keep = sorted(
            data.draw(st.sets(st.integers(0, editor.widths[name] - 1), min_size=editor.groups[name].min_width))
        )
        silent = copy.deepcopy(net)
        silence_readers(silent, editor.layout, name, keep, editor.widths)
        editor.prune(name, keep)
        assert close(net(images()), silent(images()))
    name = data.draw(st.sampled_from([g.name for g in editor.editable if g.exact]))
    now = net(images())
    editor.grow(name, data.draw(st.integers(1, 3)))
    assert close(net(images()), now, 1e-7)
    StructuralEditor.replay(reference, EXAMPLE, [edit_from_json(edit.to_json()) for edit in editor.edits])
    reference.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(reference(images()), net(images()))
