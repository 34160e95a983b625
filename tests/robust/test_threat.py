from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.errors import InputError
from robustcompress.robust import ThreatModel

threats = st.builds(ThreatModel, st.sampled_from(["linf", "l2"]), st.floats(1e-3, 0.999), st.just((0.0, 1.0)))
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])


def draw(shape, seed, low=0.0, high=1.0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(shape).uniform_(low, high, generator=generator)
    return x.contiguous(memory_format=layout)


def assert_allowed(threat, x_adv, x):
    assert x_adv.min() >= threat.bounds[0]
    assert x_adv.max() <= threat.bounds[1]
    assert (threat.size(x_adv, x) <= threat.limit).all()


@given(threats, shapes, st.integers(0, 9), layouts)
@settings(deadline=None, max_examples=60)
def test_projection_lands_in_ball_and_bounds_and_stays(threat, shape, seed, layout):
    x, far = draw(shape, seed, layout=layout), draw(shape, seed + 10, -2, 3, layout)
    once = threat.project(far, x)
    assert_allowed(threat, once, x)
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=1e-6)
    assert once.stride() == far.stride()


@given(threats, shapes, st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_projection_leaves_alone_what_is_allowed(threat, shape, seed):
    x = draw(shape, seed)
    inside = threat.project(x + 0.3 * (threat.random_start(x, torch.Generator().manual_seed(seed)) - x), x)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-6)


@given(threats, shapes, st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_random_start_is_allowed_and_one_seed_is_one_start_in_any_layout(threat, shape, seed):
    x = draw(shape, seed)
    starts = [
        threat.random_start(x.contiguous(memory_format=layout), torch.Generator().manual_seed(seed))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert_allowed(threat, starts[0], x)
    assert torch.equal(*starts)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_over_the_ball(norm):
    # Far from the bounds the radius of a uniform point, divided by eps, is distributed as u**(1/d).
    threat = ThreatModel(norm, 0.01)
    x = torch.full((4000, 1, 2, 2), 0.5)
    radius = threat.size(threat.random_start(x, torch.Generator().manual_seed(0)), x) / threat.eps
    uniform = radius.pow(4).sort().values
    ideal = torch.linspace(0, 1, 4000, dtype=torch.float64)
    assert (uniform - ideal).abs().max() < 0.03  # Kolmogorov-Smirnov: 1.95/sqrt(4000) is p = 0.001


def test_a_step_has_its_length_and_the_steepest_direction():
    x, grad = torch.full((3, 2, 4, 4), 0.5), draw((3, 2, 4, 4), 0, -1, 1)
    for norm in ("linf", "l2"):
        threat = ThreatModel(norm, 0.25)
        moved = threat.ascend(x, grad, 0.1)
        torch.testing.assert_close(threat.size(moved, x), torch.full((3,), 0.1).double(), rtol=1e-4, atol=0)
        gain = ((moved - x) * grad).flatten(1).sum(1)
        for seed in range(20):  # no direction of that length gains more
            other = ThreatModel(norm, 0.1).random_start(x, torch.Generator().manual_seed(seed))
            assert (((other - x) * grad).flatten(1).sum(1) <= gain + 1e-5).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_moves_nothing(norm):
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(ThreatModel(norm, 0.1).ascend(x, torch.zeros_like(x), 0.1), x)


@given(threats)
def test_json_round_trip(threat):
    assert ThreatModel.from_json(json.loads(json.dumps(threat.to_json()))) == threat


@pytest.mark.parametrize(
    ("threat", "label"),
    [
        (ThreatModel(), "linf 8/255"),
        (ThreatModel("linf", 4 / 255), "linf 4/255"),
        (ThreatModel("l2", 0.5), "l2 0.5"),
        (ThreatModel("l2", 128 / 255), "l2 128/255"),
        (ThreatModel("linf", 0.3), "linf 0.3"),
        (ThreatModel("linf", 0.031), "linf 0.031"),
        (ThreatModel("l2", 1.0), "l2 1"),
    ],
)
def test_label(threat, label):
    assert threat.label() == label


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": 0}, "must be positive"),
        ({"eps": -1.0}, "must be positive"),
        ({"eps": 8}, "probably meant 8/255"),
        ({"eps": math.nan}, "finite"),
        ({"eps": "8/255"}, "finite number"),
        ({"eps": True}, "finite number"),
        ({"norm": "linff"}, "did you mean 'linf'"),
        ({"bounds": (1.0, 0.0)}, "lowest first"),
        ({"bounds": (0.0, math.inf)}, "finite"),
    ],
)
def test_bad_threats(kwargs, message):
    with pytest.raises(InputError, match=message):
        ThreatModel(**kwargs)


def test_all_problems_are_named_at_once():
    with pytest.raises(InputError) as error:
        ThreatModel("l3", -1.0, (2.0, 1.0))
    assert all(word in str(error.value) for word in ("norm='l3'", "eps=-1.0", "bounds=(2.0, 1.0)"))


@pytest.mark.parametrize("change", [{"extra": 1}, {"norm": None}, {"eps": 8.0}])
def test_bad_json(change):
    with pytest.raises(InputError):
        ThreatModel.from_json({**ThreatModel().to_json(), **change})
