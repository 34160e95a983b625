"""Costs against counts by hand, and predictions against measurements."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robustcompress import Budget, Cost, InputError, StructuralEditor, measure
from robustcompress.budget import CostModel, human
from robustcompress.models import resnet8, resnet18, resnet20
from robustcompress.robust.attacks import eval_mode
from tests.strategies.nets import NETS, SIZE, build
from tests.structure.networks import networks

EXAMPLE = torch.zeros(2, 3, SIZE, SIZE)


def conv_and_linear_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Counted from the shapes that really pass."""
    total = 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            raise AssertionError
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output[0].numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with eval_mode(model), torch.no_grad():
        model(example[:1])
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("make", "macs", "params"),
    [(resnet18, 555.4e6, 11.174e6), (resnet20, 40.81e6 + 2 * 131_072, 0.27e6)],
    ids=["resnet18", "resnet20"],
)
def test_known_networks_have_the_published_cost(make: Any, macs: float, params: float) -> None:
    """He et al. 2016, section 4.2 (and two projections), and the CIFAR ResNet-18 of the field."""
    model, example = make(), torch.zeros(1, 3, 32, 32)
    assert conv_and_linear_macs(model, example) == pytest.approx(macs, rel=0.01)
    cost = measure(model, example)
    assert cost.macs == pytest.approx(macs, rel=0.015)  # thop adds batch norms and pooling
    assert cost.params == sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.02)
    assert cost.note == "" and cost.latency_ms is None


@pytest.mark.parametrize("net", NETS)
def test_macs_are_those_of_the_layers_up_to_batch_norm_and_pooling(net: str) -> None:
    model = build(net)
    counted = conv_and_linear_macs(model, EXAMPLE)
    assert counted <= measure(model, EXAMPLE).macs <= 1.1 * counted


def test_measuring_touches_nothing() -> None:
    model = build("residual").train()
    model.bn2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys, modes = set(dict(model.named_buffers())), [m.training for m in model.modules()]
    measure(model, EXAMPLE, latency=True)
    assert set(dict(model.named_buffers())) == keys, "thop's counters"
    assert not any(hasattr(m, "total_ops") or hasattr(m, "total_params") for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_measuring_is_silent_also_where_warnings_are_errors(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import torch
from robustcompress import measure
from robustcompress.models import resnet8
measure(resnet8(width=0.25), torch.zeros(1, 3, 16, 16))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_parameters_that_layers_hand_on_are_no_hindrance() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.mix, self.head = nn.Parameter(torch.ones(1, 4)), nn.Identity(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            token = self.mix((self.token.expand(len(x), -1), x))[0]
            out: torch.Tensor = self.head(token + x.mean((1, 2, 3))[:, None])
            return out

    model = Token()
    assert measure(model, torch.rand(1, 3, 8, 8)).macs == 8
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_batch_of_the_example_does_not_matter() -> None:
    model = build("chain")
    assert measure(model, torch.zeros(7, 3, SIZE, SIZE)) == measure(model, torch.zeros(1, 3, SIZE, SIZE))


def test_size_counts_bytes_and_latency_is_positive() -> None:
    cost = measure(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), torch.zeros(1, 3, 4, 4), latency=True)
    assert cost.size == 4 * (480 + 10)
    assert cost.latency_ms is not None and 0 < cost.latency_ms < 1000


def test_operations_that_one_counter_misses_are_said() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.zeros(8, 3, 3, 3)), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.conv2d(x, self.weight).mean((2, 3)))

    note = measure(Functional(), EXAMPLE).note
    assert "thop counts 80 MACs" in note
    assert human(8 * 27 * 14 * 14 + 80) in note


@pytest.mark.parametrize("net", NETS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_predictions_agree_with_measurements(net: str, data: st.DataObject) -> None:
    check(build(net, num_classes=10), EXAMPLE, data)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=networks(), data=st.data())
def test_predictions_agree_for_every_join(net: nn.Module, data: st.DataObject) -> None:
    check(net, torch.zeros(2, 3, 8, 8, dtype=torch.float64), data)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_predictions_agree_for_a_built_in(data: st.DataObject) -> None:
    check(resnet8(width=0.5), EXAMPLE, data, narrowest=0.5)


class Pooled(nn.Module):
    """Poolings that thop counts, behind a hidden group and behind a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool1 = nn.Conv2d(3, 8, 1), nn.AvgPool2d(2)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pool2, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.conv2(x)
        return self.fc(self.pool2(F.relu(x + self.conv3(F.relu(x)))).flatten(1))


def test_a_prediction_is_never_below_the_measured_cost() -> None:
    """Otherwise a network that was planned within the budget ends above it, after all the training."""
    model = Pooled()
    editor = StructuralEditor(model, EXAMPLE)
    cost_model = CostModel(editor, EXAMPLE)
    for name in ("conv1", "conv2"):
        editor.grow(name, 24)
        assert cost_model.predict(editor.widths)[0] >= measure(model, EXAMPLE).macs, name


def check(model: nn.Module, example: torch.Tensor, data: st.DataObject, *, narrowest: float = 0.0) -> None:
    editor = StructuralEditor(model, example)
    cost_model = CostModel(editor, example)
    widths = {}
    for group in editor.editable:
        low = max(group.min_width, int(narrowest * group.width))
        widths[group.name] = data.draw(st.integers(low, 2 * group.width), label=group.name)
    macs, params = cost_model.predict(widths)
    for name, width in widths.items():
        now = editor.widths[name]
        if width < now:
            editor.prune(name, range(width))
        elif width > now:
            editor.grow(name, width - now)
    cost = measure(model, example)
    assert params == pytest.approx(cost.params, abs=1e-3)
    assert macs == pytest.approx(cost.macs, rel=0.005)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"macs": 0}, "macs=0: must be a positive number"),
        ({"macs": -0.5}, "macs=-0.5"),
        ({"params": float("nan")}, "params=nan"),
        ({"max_macs": float("inf")}, "max_macs=inf"),
        ({"macs": "0.5"}, "macs='0.5'"),
        ({"macs": True}, "macs=True"),
        ({"macs": 50}, "for 50 % write 0.5"),
        ({"params": 1e6}, "use max_params"),
        ({}, r"no limit is given.*Budget(macs=0.5)"),
    ],
    ids=str,
)
def test_a_bad_budget_says_the_value_and_the_remedy(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget(**limits)
    for part in said.split(".*"):
        assert part in str(caught.value)


def test_all_bad_limits_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)macs=-1.*params=0.*max_params=-2"):
        Budget(macs=-1, params=0, max_params=-2)


@given(
    st.builds(
        dict,
        macs=st.one_of(st.none(), st.floats(0.01, 4)),
        params=st.one_of(st.none(), st.floats(0.01, 4)),
        max_macs=st.one_of(st.none(), st.integers(1, 10**9)),
        max_params=st.one_of(st.none(), st.integers(1, 10**9)),
    )
)
def test_every_limit_given_must_hold(limits: dict[str, Any]) -> None:
    reference = Cost(macs=1_000_000, params=10_000, size=1)
    if all(value is None for value in limits.values()):
        return
    budget = Budget(**limits)
    macs, params = budget.limits(reference)
    assert macs == min([limits[k] * f for k, f in (("macs", 1e6), ("max_macs", 1)) if limits[k]], default=math.inf)
    assert params == min(
        [limits[k] * f for k, f in (("params", 1e4), ("max_params", 1)) if limits[k]], default=math.inf
    )
    inside = Cost(int(min(macs, 1e15)), int(min(params, 1e15)), 1)
    assert budget.allows(inside, reference)
    if macs < math.inf:
        assert not budget.allows(Cost(inside.macs + 1, inside.params, 1), reference)
    if params < math.inf:
        assert not budget.allows(Cost(inside.macs, inside.params + 1, 1), reference)
    assert Budget(**budget.to_json()) == budget


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (999, "999"), (8100, "8.1k"), (11_173_962, "11.17M"), (555_422_720, "555.4M"), (1.8e9, "1.8G")],
)
def test_counts_are_readable(value: float, said: str) -> None:
    assert human(value) == said


@given(st.floats(1, 1e12))
def test_a_readable_count_is_right_to_four_digits(value: float) -> None:
    text = human(value)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1.0)
    assert float(text.rstrip("kMG")) * scale == pytest.approx(value, rel=1e-3)
