"""The laws of the structural layer, for layers that the editor was taught."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.budget import CostModel
from robustcompress.robust.objectives import PGDAT
from robustcompress.structure import NEW, StructuralEditor, kinds, teach_layer
from robustcompress.structure.magnitudes import group_norms, reader_norms
from robustcompress.structure.weights import WeightGates, count_weights, maskable_weights
from tests.strategies.nets import QUICK_RECIPE, small_data
from tests.structure.networks import EXAMPLE, images
from tests.structure.taught import CASES, Case, FilterResponse, Gate, Kernel, LowRank, Net, Standardised
from tests.structure.test_mixing import assert_honest


@pytest.fixture(autouse=True)
def taught() -> Iterator[None]:
    kept = dict(kinds._TAUGHT)
    for case in CASES.values():
        teach_layer(case.type, case.kind)
    yield
    kinds._TAUGHT.clear()
    kinds._TAUGHT.update(kept)


each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def made(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = case.net().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net


def edited(case: Case) -> tuple[nn.Module, StructuralEditor]:
    """A network in which every group has lost, moved and gained channels."""
    net = made(case)
    editor = StructuralEditor(net, EXAMPLE, seed=5)
    for group in editor.editable:
        editor.resize(group.name, [4, 0, NEW, 3, 3, NEW, NEW], init="kaiming")
    return net, editor


@each
def test_laws_1_and_2_and_what_cannot_be_edited_says_why(case: Case) -> None:
    editor = assert_honest(made(case))
    assert {name: group.editable for name, group in editor.groups.items()} == {
        name: name not in case.held and name != "fc" for name in ("a", "b", "c", "fc")
    }
    assert all("mixes its channels" in editor.groups[name].reason for name in case.held)
    members = {axis.module for group in editor.groups.values() for axis in group.members}
    assert members >= {name for name, module in editor.model.named_modules() if isinstance(module, case.type)}


@each
def test_law_2_also_holds_in_training(case: Case) -> None:
    if case.type.__name__ == "Noisy":
        return
    for init in ("pair", "zero_out", "clone"):
        net = made(case).train()
        editor = StructuralEditor(net, EXAMPLE, seed=3)
        before = copy.deepcopy(net)(images())
        for group in editor.editable:
            editor.grow(group.name, 3, init=init)
        assert torch.allclose(copy.deepcopy(net)(images()), before, 1e-9, 1e-9)
        assert net.training


@each
def test_laws_3_and_4_bit_for_bit(case: Case) -> None:
    net, other = made(case), made(case)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    editor, at_once = StructuralEditor(net, EXAMPLE), StructuralEditor(other, EXAMPLE)
    for group in editor.editable:
        editor.grow(group.name, 3, init="kaiming")
        editor.prune(group.name, range(group.width))
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    for group in editor.editable:
        editor.resize(group.name, [5, 1, 1, 0, 3])
        editor.resize(group.name, [4, 2, 0])
        at_once.resize(group.name, [3, 1, 5])
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items())


@each
def test_laws_5_and_7_replay_and_the_same_trace_again(case: Case) -> None:
    net, editor = edited(case)
    fresh = made(case, seed=9)
    StructuralEditor.replay(fresh, EXAMPLE, editor.edits)
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh(images()), net(images()))
    again = StructuralEditor(net, EXAMPLE)
    assert again.widths == editor.widths
    for module in net.modules():
        if isinstance(module, Kernel):
            assert (module.inputs, module.outputs) == tuple(module.kernel.shape)
        elif isinstance(module, Gate):
            assert module.channels == len(module.logit) == module.seen.shape[1]


@each
def test_law_6_a_gate_is_an_edit_gradients_included(case: Case) -> None:
    net = made(case)
    editor = StructuralEditor(net, EXAMPLE)
    keep = {group.name: [0, 2, 3, 5] for group in editor.editable}
    scores = {name: torch.zeros(editor.widths[name]).index_fill(0, torch.tensor(k), 1) for name, k in keep.items()}
    with editor.gates(scores):
        gated = net(images())
        gated.square().sum().backward()
    for name, channels in keep.items():
        editor.prune(name, channels)  # which gathers the gradients like the weights
    carried = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    small = net(images())
    assert torch.allclose(small, gated, 1e-9, 1e-9)
    small.square().sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert carried.keys() == found.keys()
    assert all(torch.allclose(found[name], gradient, 1e-7, 1e-9) for name, gradient in carried.items())


@each
def test_law_8_optimizers_follow_and_every_layer_trains(case: Case) -> None:
    net = made(case).train()
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    editor = StructuralEditor(net, EXAMPLE)
    editor.follow(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()

    step()
    for parameter, state in optimizer.state.items():
        state["exp_avg"].copy_(parameter.detach())
    for group in editor.editable:
        editor.resize(group.name, [5, 0, 3])
    assert all(torch.equal(state["exp_avg"], parameter) for parameter, state in optimizer.state.items())
    for group in editor.editable:
        editor.grow(group.name, 2)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@each
def test_law_9_the_exported_network_is_the_edited_one(case: Case, tmp_path: Path) -> None:
    net, _ = edited(case)
    report = rc.export_onnx(net.float(), tmp_path / "net.onnx", image_shape=EXAMPLE.shape[1:])  # which verifies it
    assert report.parity and all(check.relative_diff < 1e-5 for check in report.parity)


@each
def test_parameters_are_predicted_exactly(case: Case) -> None:
    net = made(case)
    editor = StructuralEditor(net, EXAMPLE)
    model = CostModel(editor, EXAMPLE)
    widths = {group.name: 3 + number for number, group in enumerate(editor.editable)}
    macs, params = model.predict(widths)
    for name, width in widths.items():
        editor.prune(name, range(width))
    assert params == sum(parameter.numel() for parameter in net.parameters())
    assert macs == pytest.approx(rc.measure(net, EXAMPLE).macs)


def test_against_the_same_network_of_layers_of_torch() -> None:
    """A kernel is a weight turned round, and a low rank adds to it: pruned alike, they compute the same."""
    torch.manual_seed(1)
    for layer in (Kernel, LowRank):
        ours, theirs = (
            Net(b=layer(8, 9), c=layer(9, 6), flat=True),
            Net(b=nn.Linear(8, 9), c=nn.Linear(9, 6), flat=True),
        )
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()}, strict=False)
        for name in ("b", "c"):
            mine, linear = ours.get_submodule(name), theirs.get_submodule(name)
            linear.bias.data.copy_(mine.bias)
            linear.weight.data.copy_(mine.kernel.T if layer is Kernel else mine.weight + mine.up @ mine.down)
        editors = [StructuralEditor(net.double().eval(), EXAMPLE) for net in (ours, theirs)]
        assert torch.allclose(ours(images()), theirs(images()))
        for editor in editors:
            editor.resize("a", [7, 2, 2, 0])
            editor.resize("b", [1, 8, 3])
            editor.prune("c", [0, 5])
        assert torch.allclose(ours(images()), theirs(images()))


def test_new_channels_begin_as_told() -> None:
    nets = [made(CASES[name]) for name in ("filter response", "gate", "low rank", "kernel")]
    means = {"tau": nets[0].middle.tau.mean(), "logit": nets[1].middle.logit.mean()}
    for net in nets:
        editor = StructuralEditor(net, EXAMPLE)
        editor.grow("a", 2)
        editor.grow("b", 2)
    response, gate, rank, kernel = (net.state_dict() for net in nets)
    assert response["middle.gamma"].flatten()[8:].tolist() == [1, 1]
    assert response["middle.beta"].flatten()[8:].tolist() == [0, 0]
    assert torch.allclose(response["middle.tau"].flatten()[8:], means["tau"])
    assert gate["middle.scale"][8:].tolist() == [1, 1] and not gate["middle.seen"].flatten()[8:].any()
    assert torch.allclose(gate["middle.logit"][8:], means["logit"])
    assert rank["b.bias"][9:].tolist() == [0, 0]
    for key in ("b.weight", "b.down", "c.weight", "c.down"):  # read with: the second newcomer cancels the first
        old = rank[key][:9]
        assert old[:, -2].abs().sum() > 0 and torch.equal(old[:, -2], -old[:, -1])
    assert torch.equal(rank["b.up"][9], rank["b.up"][10]) and rank["b.up"][9].abs().sum() > 0
    assert torch.equal(kernel["b.kernel"][8, :9], -kernel["b.kernel"][9, :9]) and kernel["b.kernel"][8].all()


def test_a_seed_takes_its_scale_from_what_each_output_is_a_sum_of() -> None:
    torch.manual_seed(0)
    net = Net(b=Kernel(8, 900), c=Kernel(900, 6), flat=True).double().eval()
    editor = StructuralEditor(net, EXAMPLE)
    editor.resize("b", [NEW] * 900, init="kaiming")
    assert float(net.b.kernel.detach().std()) == pytest.approx((2 / 8) ** 0.5, rel=0.05)  # He et al.: 8 inputs, not 900


def test_norms_and_masks_know_weights_from_shifts() -> None:
    net = made(CASES["low rank"])
    editor = StructuralEditor(net, EXAMPLE)
    b, c = net.b, net.c
    rows = b.weight.square().sum(1) + b.up.square().sum(1)
    columns = c.weight.square().sum(0) + c.down.square().sum(0)
    assert torch.allclose(group_norms(editor)["b"], (rows + columns).sqrt())
    assert torch.allclose(reader_norms(editor, only=["b"])["b"], c.weight.abs().sum(0) + c.down.abs().sum(0))
    expected = ["a.weight", *(f"{m}.{t}" for m in "bc" for t in ("weight", "down", "up")), "fc.weight"]
    assert sorted(maskable_weights(net)) == sorted(expected)
    assert count_weights(net)[0] == sum(net.get_parameter(name).numel() for name in expected)

    net = made(CASES["filter response"])
    net.middle.beta.data.fill_(100)
    norm = group_norms(StructuralEditor(net, EXAMPLE))["a"].square()
    parts = (net.a.weight.square().sum((1, 2, 3)), net.bn.weight.square(), net.b.weight.square().sum((0, 2, 3)))
    assert torch.allclose(norm, sum(parts) + net.middle.gamma.flatten() ** 2 + net.middle.tau.flatten() ** 2)
    assert list(maskable_weights(net)) == ["a.weight", "b.weight", "c.weight", "fc.weight"]


@pytest.mark.parametrize("name", ["low rank", "complex", "kernel"])
def test_single_weights_under_masks(name: str) -> None:
    net = made(CASES[name])
    order = [name for name, _ in net.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=generator).round() for n, w in maskable_weights(net).items()}
    zeroed = copy.deepcopy(net)
    for weight, mask in masks.items():
        zeroed.get_parameter(weight).data.mul_(mask)
    with WeightGates(net, masks):
        assert torch.equal(net(images()), zeroed(images()))
    assert [name for name, _ in net.named_parameters()] == order
    assert not torch.equal(net(images()), zeroed(images()))


@pytest.mark.parametrize(
    ("strategy", "budget"),
    [
        (rc.Magnitude(), rc.Budget(params=0.5)),
        (rc.Hydra(search=0.4), rc.Budget(params=0.5)),
        (rc.Grape(), rc.Budget(params=0.5)),
        (rc.Hydra(granularity="weight", search=0.4), rc.Budget(density=0.2)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_strategies_take_them_from_start_to_file(strategy: rc.Strategy, budget: rc.Budget, tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(4)
        model = Net(FilterResponse(8), b=Standardised(8, 9), num_classes=10)
        model.c = nn.Sequential(model.c, Gate(6))
        return model

    result = rc.compress(
        net(),
        strategy,
        data=small_data(),
        budget=budget,
        epochs=4.0,
        objective=PGDAT(steps=1),
        recipe=QUICK_RECIPE,
        attacks=(),
        progress=False,
    )
    if budget.params is not None:
        assert sum(p.numel() for p in result.model.parameters()) <= budget.params * result.before.params
    else:
        weights, nonzeros = count_weights(result.model)
        assert nonzeros <= 0.2 * weights and weights == result.before.weights
    result.save(tmp_path / "run")
    again = rc.load(tmp_path / "run", model=net())
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(again.model.eval()(x), result.model.eval()(x))
