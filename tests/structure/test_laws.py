"""The laws of the structural layer over generated networks, each against an oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.structure import NEW, Axis, Edit, StructuralEditor
from robustcompress.structure.gates import top_channels
from robustcompress.structure.masks import TopK
from robustcompress.structure.verify import leave_out, silence_readers
from robustcompress.train import Lamb, Lars
from tests.structure.networks import EXAMPLE, images, networks, transformers

generated = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
TIGHT = 1e-9
any_network = st.one_of(networks(), networks(), transformers())


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TIGHT) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def pick(data: st.DataObject, editor: StructuralEditor) -> str:
    return data.draw(st.sampled_from([g.name for g in editor.editable]))


def some_keep(data: st.DataObject, width: int, least: int = 1) -> list[int]:
    return sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=least)))


def sources_for(data: st.DataObject, width: int, least: int, fresh: bool = True) -> list[int]:
    low = NEW if fresh else 0
    return data.draw(st.lists(st.integers(low, width - 1), min_size=least, max_size=width + 2))


def least(editor: StructuralEditor, name: str) -> int:
    return editor.groups[name].min_width


@generated
@given(net=networks(), data=st.data())
def test_everything_but_the_output_is_editable(net: nn.Module, data: st.DataObject) -> None:
    editor = StructuralEditor(net, EXAMPLE)
    frozen = {g.name: g.reason for g in editor.groups.values() if not g.editable}
    assert frozen.pop(editor.layout.output) == "holds the model's output"
    # What is added to the places of an image is as long as there are places.
    assert all(
        name.endswith(".back") and ("nothing reads" in reason or "followed" in reason)
        for name, reason in frozen.items()
    )


@generated
@given(net=transformers())
def test_heads_and_hidden_widths_of_transformers_are_editable(net: nn.Module) -> None:
    editor = StructuralEditor(net, EXAMPLE)
    assert [g.kind for g in editor.editable] == ["residual", *["heads", "hidden"] * len(net.blocks)]
    assert [g.name for g in editor.editable if not g.exact] == ["patch"]
    assert [g.width for g in editor.editable if g.kind == "heads"] == [
        block.attention.proj.in_features // block.attention.head_dim for block in net.blocks
    ]


@generated
@given(net=any_network, data=st.data())
def test_law_1_pruning_equals_silencing_the_readers(net: nn.Module, data: st.DataObject) -> None:
    editor, silent = StructuralEditor(net, EXAMPLE), copy.deepcopy(net)
    for _ in range(2):
        name = pick(data, editor)
        keep = some_keep(data, editor.widths[name], least(editor, name))
        twin = StructuralEditor(silent, EXAMPLE)
        silence_readers(silent, twin.layout, name, keep, twin.widths)
        expected = silent(images())
        editor.prune(name, keep)
        assert close(net(images()), expected)
        silent = copy.deepcopy(net)


@generated
@given(
    net=any_network,
    data=st.data(),
    init=st.sampled_from(["pair", "zero_out", "clone"]),
    training=st.booleans(),
)
def test_law_2_growing_changes_no_output(net: nn.Module, data: st.DataObject, init: str, training: bool) -> None:
    editor = StructuralEditor(net, EXAMPLE, seed=3)
    net.train(training)
    before, widths = copy.deepcopy(net)(images()), editor.widths
    for _ in range(2):
        name = pick(data, editor)
        editor.grow(name, data.draw(st.integers(1, 5)), init=init)
        leave_out(net, editor.layout, name, range(widths[name]), editor.widths)  # of statistics over channels
    assert close(copy.deepcopy(net)(images()), before, 1e-7)
    assert net.training is training


@generated
@given(net=any_network, data=st.data(), init=st.sampled_from(["pair", "zero_out", "kaiming"]))
def test_law_3_grow_then_drop_is_identity_bit_for_bit(net: nn.Module, data: st.DataObject, init: str) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    editor = StructuralEditor(net, EXAMPLE)
    name = pick(data, editor)
    width = editor.widths[name]
    editor.grow(name, data.draw(st.integers(1, 4)), init=init)
    editor.prune(name, range(width))
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@generated
@given(net=any_network, data=st.data())
def test_law_4_edits_compose(net: nn.Module, data: st.DataObject) -> None:
    other = copy.deepcopy(net)
    editor, at_once = StructuralEditor(net, EXAMPLE), StructuralEditor(other, EXAMPLE)
    name = pick(data, editor)
    a = sources_for(data, editor.widths[name], least(editor, name), fresh=False)
    b = sources_for(data, len(a), least(editor, name), fresh=False)
    editor.resize(name, a)
    editor.resize(name, b)
    at_once.resize(name, [a[i] for i in b])
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@generated
@given(net=any_network, data=st.data())
def test_law_5_replay_then_strict_load_is_bit_equal(net: nn.Module, data: st.DataObject) -> None:
    fresh = copy.deepcopy(net)
    editor = StructuralEditor(net, EXAMPLE)
    for _ in range(3):
        name = pick(data, editor)
        editor.resize(name, sources_for(data, editor.widths[name], least(editor, name)), init="kaiming")
    editor.resize_output(3)
    edits = [Edit.from_json(edit.to_json()) for edit in editor.edits]
    assert tuple(edits) == editor.edits
    replayed = StructuralEditor.replay(fresh, EXAMPLE, edits)
    assert replayed.widths == editor.widths
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh(images()), net(images()))
    assert net(images()).shape[1] == 3


@generated
@given(net=any_network, data=st.data())
def test_law_6_a_closed_gate_is_a_removed_channel_gradients_included(net: nn.Module, data: st.DataObject) -> None:
    editor = StructuralEditor(net, EXAMPLE)
    names = [g.name for g in editor.editable]
    scores = {name: torch.rand(editor.widths[name]) + 0.1 for name in names}
    ks = {name: data.draw(st.integers(least(editor, name), editor.widths[name])) for name in names}
    training = data.draw(st.booleans())
    net.train(training)
    x = images().requires_grad_()
    snapshot = copy.deepcopy(net)
    with editor.gates(scores, TopK(lambda scores: ks)) as gates:
        gated = net(x)
        loss = gated.square().sum()
        parameters = dict(net.named_parameters())
        gradients = dict(
            zip(
                ["x", *parameters, *gates.scores],
                torch.autograd.grad(loss, [x, *parameters.values(), *gates.parameters()], allow_unused=True),
                strict=True,
            )
        )
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(gradients[name] is not None and gradients[name].isfinite().all() for name in names)

    pruned = StructuralEditor(snapshot, EXAMPLE)
    for name, parameter in snapshot.named_parameters():
        parameter.grad = None if gradients[name] is None else gradients[name].clone()
    for name in names:  # the editor gathers .grad like the weights: what the gated net had is what the pruned must have
        pruned.prune(name, top_channels(scores[name], ks[name]).tolist())
    carried = {name: p.grad for name, p in snapshot.named_parameters()}
    snapshot.zero_grad()
    small = snapshot(images().requires_grad_())
    assert close(small, gated)
    small.square().sum().backward()
    for name, parameter in snapshot.named_parameters():
        if parameter.grad is not None and carried[name] is not None:
            assert close(parameter.grad, carried[name], 1e-7), name


@generated
@given(net=any_network, data=st.data())
def test_law_7_names_survive_edits(net: nn.Module, data: st.DataObject) -> None:
    editor = StructuralEditor(net, EXAMPLE)
    for _ in range(2):
        name = pick(data, editor)
        editor.resize(name, sources_for(data, editor.widths[name], least(editor, name)), init="kaiming")
    again = StructuralEditor(net, EXAMPLE)
    assert again.widths == editor.widths
    assert [g.kind for g in again.groups.values()] == [g.kind for g in editor.groups.values()]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "lars": lambda p: Lars(p, 1.0, weight_decay=1e-3),
    "lamb": lambda p: Lamb(p, 0.01, weight_decay=1e-3),
}


@generated
@given(net=any_network, data=st.data(), kind=st.sampled_from(sorted(OPTIMIZERS)))
def test_law_8_optimizer_and_ema_follow(net: nn.Module, data: st.DataObject, kind: str) -> None:
    net.train()
    frozen = data.draw(st.sampled_from([n for n, _ in net.named_parameters()]))
    net.get_parameter(frozen).requires_grad_(False)
    optimizer = OPTIMIZERS[kind]([p for p in net.parameters() if p.requires_grad])
    ema = AveragedModel(net)

    def step() -> None:
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()

    def moments() -> dict[tuple[str, str], torch.Tensor]:
        return {
            (name, key): value
            for name, p in net.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()
            if torch.is_tensor(value) and value.dim()
        }

    step()
    editor = StructuralEditor(net, EXAMPLE)
    editor.follow(optimizer, ema)
    name = pick(data, editor)
    # Let every moment say which weight it belongs to: then they must go where the weights go, bit for bit.
    for (parameter, _), value in moments().items():
        value.copy_(net.get_parameter(parameter).detach())
    keep = some_keep(data, editor.widths[name], least(editor, name))
    editor.prune(name, keep)
    editor.grow(name, 2, init="kaiming")
    editor.prune(name, range(len(keep)))
    assert all(torch.equal(value, net.get_parameter(n)) for (n, _), value in moments().items())
    # And what is new starts at zero.
    width = editor.widths[name]
    editor.grow(name, 1, init="kaiming")
    editor.prune(name, [width] if editor.groups[name].min_width == 1 else [width - 1, width])
    if editor.groups[name].min_width == 1:
        for axis in editor.groups[name].writers:
            for (n, _), value in moments().items():
                if n == f"{axis.module}.weight" and not _shares_axis(editor, axis):
                    assert not value.any()

    for value in moments().values():
        value.abs_()  # second moments are not negative
    live = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert live == {id(p) for p in net.parameters() if p.requires_grad}
    assert set(optimizer.state) <= {p for p in net.parameters()}
    assert not net.get_parameter(frozen).requires_grad
    assert net.training
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in net.parameters()]
    step()
    ema.update_parameters(net)
    assert ema.module.eval()(images()).isfinite().all()


def _shares_axis(editor: StructuralEditor, axis: Axis) -> bool:
    return len({s.group for s in editor.layout.axes[axis]}) > 1


@generated
@given(net=any_network, data=st.data(), init=st.sampled_from(["pair", "zero_out", "clone"]))
def test_growing_changes_no_output_of_the_ema_twin_either(net: nn.Module, data: st.DataObject, init: str) -> None:
    ema = AveragedModel(net)
    for parameter in ema.module.parameters():
        parameter.data.mul_(0.9)
    ema.eval()
    before = ema(images())
    editor = StructuralEditor(net, EXAMPLE)
    editor.follow(ema)
    name = pick(data, editor)
    width = editor.widths[name]
    editor.grow(name, data.draw(st.integers(1, 4)), init=init)
    leave_out(ema.module, editor.layout, name, range(width), editor.widths)
    assert close(ema(images()), before, 1e-7)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_edited_layers_really_train(kind: str) -> None:
    from tests.structure.networks import Net

    torch.manual_seed(0)
    net = Net([(1, 4), (0, 6)], "pool", 4).double()
    optimizer = OPTIMIZERS[kind](net.parameters())
    editor = StructuralEditor(net, EXAMPLE)
    editor.follow(optimizer)
    for group in editor.editable:
        editor.grow(group.name, 2)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.train()
    for _ in range(2):
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
    still = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert still == []
