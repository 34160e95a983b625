"""Layers as products: against the product itself, against what is known of decompositions, and under the laws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress import build_model, measure
from robustcompress.budget import CostModel
from robustcompress.errors import InputError
from robustcompress.structure import NEW, Factorise, StructuralEditor, edit_from_json
from robustcompress.structure.factors import (
    Factorised,
    complaint,
    cp,
    factorise,
    largest_ranks,
    product,
    spectrum,
    svd,
    tucker,
)
from robustcompress.structure.verify import silence_readers
from tests.structure.networks import EXAMPLE, Net, images, networks, randomise

generated = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, str, tuple[int, ...]]:
    kind = draw(st.sampled_from(("tucker", "cp", "svd", "linear")))
    wide, deep = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer: nn.Module
    if kind == "linear":
        kind, layer = "svd", nn.Linear(deep, wide, bias=draw(st.booleans()))
    else:
        window = (1, 1) if kind == "svd" else draw(st.sampled_from(((3, 3), (3, 1), (1, 5), (2, 3))))
        odd = all(size % 2 for size in window)  # of even ones torch warns
        padding = draw(st.sampled_from((0, 1, (1, 2), *(("same",) if odd else ()))))
        stride = 1 if padding == "same" else draw(st.sampled_from((1, 2, (2, 1))))
        layer = nn.Conv2d(
            deep,
            wide,
            window,
            stride=stride,
            padding=padding,
            dilation=draw(st.sampled_from((1, 2))),
            bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(("zeros", "circular"))),
        )
    most = largest_ranks(layer, kind)
    return layer.double(), kind, tuple(draw(st.integers(1, top)) for top in most)


@settings(generated, max_examples=60)
@given(layers())
def test_factors_compute_their_product(case: tuple[nn.Module, str, tuple[int, ...]]) -> None:
    layer, kind, ranks = case
    assert complaint(layer, kind, ranks) == ""
    factors, whole = factorise(layer, kind, ranks), copy.deepcopy(layer)
    with torch.no_grad():
        whole.get_parameter("weight").copy_(product(factors))
    x = torch.randn(2, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels, 9, 9).double()
    x = x[:, :, 0, 0] if isinstance(layer, nn.Linear) else x
    assert torch.allclose(factors(x), whole(x), atol=1e-10)
    assert factors.last.bias is layer.bias
    assert all(p.requires_grad and p.is_contiguous() for p in factors.parameters())


@settings(generated, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.data())
def test_errors_are_those_of_the_theory(wide: int, deep: int, seed: int, data: st.DataObject) -> None:
    weight = torch.randn(wide, deep, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer = nn.Conv2d(deep, wide, 3, bias=False).double()
    layer.weight = nn.Parameter(weight)
    by_out, by_in = (values.square() for values in spectrum(layer))
    ranks = tuple(data.draw(st.integers(1, top)) for top in largest_ranks(layer, "tucker"))
    first, core, last = tucker(weight, *ranks)
    error = float((product(factorise(layer, "tucker", ranks)) - weight).square().sum())
    lost = float(by_out[ranks[0] :].sum()), float(by_in[ranks[1] :].sum())
    # De Lathauwer et al. 2000: truncation loses no more than both tails, and nothing loses less than the larger.
    assert max(lost) - 1e-9 <= error <= sum(lost) + 1e-9
    for basis in (first.flatten(1), last.flatten(1).T):
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-10)
    assert math.isclose(float(core.square().sum()), float(weight.square().sum()) - error, abs_tol=1e-8)
    matrix = weight[:, :, 0, 0]
    rank = data.draw(st.integers(1, min(wide, deep)))
    left, right = svd(matrix, rank)[::-1]
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    assert torch.allclose((left @ right - matrix).square().sum(), tail, atol=1e-9)


def test_a_sum_of_outer_products_is_found_again() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (7, 6, 3, 3)]
    weight = torch.einsum("or,ir,hr,wr->oihw", *parts)
    layer = nn.Conv2d(6, 7, 3).double()
    layer.weight = nn.Parameter(weight)
    assert float((product(factorise(layer, "cp", (3,))) - weight).norm() / weight.norm()) < 1e-3
    norms = torch.stack([factor.flatten(1).norm(dim=1 if n < 3 else 0) for n, factor in enumerate(cp(weight, 3))])
    assert torch.allclose(norms, norms[:1].expand_as(norms)), "no factor runs away"


def eligible(model: nn.Module) -> list[Factorise]:
    """Every layer that can be, at about half of its ranks."""
    found = []
    for name, module in model.named_modules():
        for kind in ("tucker", "svd"):
            if isinstance(module, nn.Conv2d | nn.Linear):
                most = largest_ranks(module, kind)
                ranks = tuple(max(1, top // 2) for top in most)
                if not complaint(module, kind, ranks):
                    found.append(Factorise(name, kind, ranks))
    return found


def factorised(net: Net) -> tuple[StructuralEditor, nn.Module]:
    """A network with factors, and one with their products in place of its layers."""
    model = randomise(net).double()
    editor, whole = StructuralEditor(model, EXAMPLE), copy.deepcopy(model)
    edits = eligible(model)
    names = dict(editor.widths)
    assert editor.factorise(edits) == tuple(edits) == editor.edits
    assert {name: editor.widths[name] for name in names} == names, "groups that were there keep names and widths"
    with torch.no_grad():
        for edit in edits:
            factors = model.get_submodule(edit.module)
            assert isinstance(factors, Factorised)
            whole.get_submodule(edit.module).get_parameter("weight").copy_(product(factors))
    return editor, whole


@pytest.mark.parametrize("training", [False, True])
@generated
@given(networks())
def test_generated_networks_compute_with_the_products(training: bool, net: Net) -> None:
    editor, whole = factorised(net)
    x = images().double()
    with torch.no_grad():
        a, b = editor.model.train(training)(x), whole.train(training)(x)
    assert torch.allclose(a, b, atol=1e-8 * max(1.0, float(b.abs().max())))


@generated
@given(networks(), st.integers(0, 99))
def test_ranks_are_groups_under_the_laws(net: Net, seed: int) -> None:
    editor, _ = factorised(net)
    model, x = editor.model.eval(), images().double()
    ranks = [g for g in editor.editable if g.name.endswith((".first", ".core"))]
    assert ranks
    generator = torch.Generator().manual_seed(seed)
    silenced, before = copy.deepcopy(model), model(x)
    for group in ranks:
        keep = sorted(torch.randperm(group.width, generator=generator)[: max(1, group.width // 2)].tolist())
        silence_readers(silenced, editor.layout, group.name, keep, editor.widths)
    generator.manual_seed(seed)
    twin = editor.fork()
    for group in ranks:
        editor.prune(group.name, torch.randperm(group.width, generator=generator)[: max(1, group.width // 2)].tolist())
        twin.grow(group.name, 2)
    assert torch.allclose(model(x), silenced(x), atol=1e-9), "law 1"
    assert torch.allclose(twin.model(x), before, atol=1e-9), "law 2"
    for group in ranks:
        twin.prune(group.name, range(group.width))
    assert torch.equal(twin.model(x), before), "law 3"


@generated
@given(networks())
def test_replayed_and_loaded_it_is_the_same_bit_for_bit(net: Net) -> None:
    fresh = copy.deepcopy(net).double()
    editor, _ = factorised(net)
    rank = next(g for g in editor.editable if g.name.endswith((".first", ".core")))
    editor.resize(rank.name, [0, NEW])
    edits = [edit_from_json(edit.to_json()) for edit in editor.edits]
    again = StructuralEditor.replay(fresh, EXAMPLE, edits)
    fresh.load_state_dict(editor.model.state_dict(), strict=True)
    x = images().double()
    assert torch.equal(fresh.eval()(x), editor.model.eval()(x))
    assert (again.widths, again.edits) == (editor.widths, editor.edits)


def test_costs_are_counted_anew() -> None:
    model, _ = build_model("resnet8", num_classes=10)
    example = torch.zeros(2, 3, 32, 32)
    editor = StructuralEditor(model, example)
    costs = CostModel(editor, example)
    editor.factorise(eligible(model))
    for group in editor.editable:
        editor.prune(group.name, range(max(1, group.width // 2)))
    now = measure(model, example)
    macs, params = costs.predict(editor.widths)
    assert (round(macs), round(params)) == (now.macs, now.params)


def test_followers_follow() -> None:
    torch.manual_seed(0)
    model, _ = build_model("resnet8", num_classes=10)
    editor = StructuralEditor(model, torch.zeros(2, 3, 32, 32))
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    groups.append({"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    average = AveragedModel(model)
    editor.follow(optimizer, average)
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)

    step()
    model.layers[1][0].conv1.weight.requires_grad_(False)
    kept = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters() if "bn" in n}
    edits = [
        Factorise("layers.0.0.conv1", "tucker", (5, 6)),
        Factorise("layers.1.0.conv1", "cp", (7,)),
        Factorise("fc", "svd", (3,)),
    ]
    bias = model.fc.bias
    editor.factorise(edits)
    live = {id(p) for p in model.parameters()}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == live and len(listed) == len(live)
    assert all(
        (p.dim() > 1) == (group["weight_decay"] > 0) for group in optimizer.param_groups for p in group["params"]
    )
    assert model.fc.last.bias is bias and set(optimizer.state) <= set(listed)
    assert not any(p.requires_grad for p in model.layers[1][0].conv1.parameters()), "what was frozen stays so"
    for name, value in kept.items():
        assert torch.equal(optimizer.state[model.get_parameter(name)]["momentum_buffer"], value)
    inner = dict(average.module.named_parameters())
    assert {n: p.shape for n, p in inner.items()} == {n: p.shape for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


class Peeking(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x).relu()
        x = self.two(x) * (1.0 if self.change == "no" else self.two.weight.mean())
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([Factorise("three", "tucker", (2, 2))], "there is no layer 'three'"),
        ([Factorise("two", "tuker", (2, 2))], "kind='tuker' does not exist; did you mean 'tucker'"),
        ([Factorise("two", "svd", (2,))], "use 'tucker' or 'cp'"),
        ([Factorise("fc", "cp", (2,))], "use 'svd'"),
        ([Factorise("two", "tucker", (2,))], "tucker has 2"),
        ([Factorise("two", "tucker", (9, 2))], r"must lie between 1 and \[8, 8\]"),
        ([Factorise("two", "cp", (2,)), Factorise("two", "cp", (2,))], "named twice"),
        ([*[Factorise("two", "cp", (2,))] * 2, Factorise("three", "cp", (2,))], "no layer 'three'(.|\n)*named twice"),
        ([Factorise("two", "cp", 4)], "two: ranks=4: give a tuple"),  # type: ignore[arg-type]
        ([Factorise("two", ["cp"], (4,))], "layer and kind are names"),  # type: ignore[arg-type]
        ([("two", "cp", (4,))], "give Factorise"),
        ([Factorise("", "cp", (2,))], "a Peeking is not factorised"),
    ],
)
def test_refusals_change_nothing(edits: list[Factorise], said: str) -> None:
    editor = StructuralEditor(Peeking("no"), torch.zeros(2, 3, 9, 9))
    before = copy.deepcopy(editor.model.state_dict())
    with pytest.raises(InputError, match=said):
        editor.factorise(edits)
    assert editor.edits == () and editor.model.state_dict().keys() == before.keys()
    editor.factorise([Factorise("two", "cp", (2,))])
    with pytest.raises(InputError, match="two: it was factorised already"):
        editor.factorise([Factorise("two", "cp", (2,))])


def test_a_model_that_reads_the_weights_itself_is_refused() -> None:
    editor = StructuralEditor(Peeking("yes"), torch.zeros(2, 3, 9, 9))
    with pytest.raises(InputError, match="does not run with it"):
        editor.factorise([Factorise("two", "tucker", (2, 2))])
    assert isinstance(editor.model.two, nn.Conv2d)


@pytest.mark.parametrize("ranks", [[], [1, 2, 3], [0], [True], [1 << 40], ["3"], "3", None])
def test_records_that_nobody_wrote_are_refused(ranks: object) -> None:
    with pytest.raises(ValueError, match="rank"):
        edit_from_json({"factorise": "conv", "kind": "cp", "ranks": ranks})


def test_factors_of_factors_are_replayed() -> None:
    model, _ = build_model("resnet8", num_classes=10, stem_stride=4)
    editor = StructuralEditor(model.eval(), EXAMPLE)
    editor.factorise([Factorise("layers.0.0.conv2", "tucker", (4, 4)), Factorise("fc", "svd", (3,))])
    editor.factorise([Factorise("layers.0.0.conv2.first", "svd", (2,))])
    fresh, _ = build_model("resnet8", num_classes=10, stem_stride=4)
    again = StructuralEditor.replay(fresh, EXAMPLE, editor.edits)
    assert again.edits == editor.edits
    again.model.load_state_dict(editor.model.state_dict(), strict=True)
    assert torch.equal(again.model.eval()(EXAMPLE), editor.model(EXAMPLE))


def test_what_factors_add_counts_against_the_bound() -> None:
    model, _ = build_model("resnet8", num_classes=10, stem_stride=4)
    editor = StructuralEditor(copy.deepcopy(model).eval(), EXAMPLE)
    editor.factorise([Factorise("layers.0.0.conv2", "cp", (largest_ranks(model.layers[0][0].conv2, "cp")[0],))])
    numbers = [sum(p.numel() for p in net.parameters()) for net in (model, editor.model)]
    assert numbers[0] < numbers[1]
    StructuralEditor.replay(copy.deepcopy(model), EXAMPLE, editor.edits, most=numbers[1])
    with pytest.raises(InputError, match=f"would hold {numbers[1]} numbers; at most {numbers[1] - 1} are believed"):
        StructuralEditor.replay(copy.deepcopy(model), EXAMPLE, editor.edits, most=numbers[1] - 1)
