"""The predictor and its fit, against latencies that are known."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress import StructuralEditor
from robustcompress.latency import LatencyModel, Layer, Side, Term, fit, layers_of, sample_widths
from robustcompress.latency.fit import nonnegative
from robustcompress.shapes import floor_widths
from tests.latency.fake import clock
from tests.strategies.nets import EXAMPLE, NETS, SIZE, build

SHAPE = (3, SIZE, SIZE)


@functools.cache
def editor(net: str = "residual") -> StructuralEditor:
    return StructuralEditor(build(net), EXAMPLE)


@functools.cache
def layers(net: str = "residual") -> list[Layer]:
    return layers_of(editor(net), EXAMPLE)


def truth(net: str, constant: float, coefficients: list[float]) -> LatencyModel:
    """A network whose latency is a sum of the form that is fitted; one pair of coefficients a family."""
    families = list(dict.fromkeys(layer.family for layer in layers(net)))
    totals = {
        f: [sum(getattr(k, what) for k in layers(net) if k.family == f) for what in ("macs", "outputs")]
        for f in families
    }
    terms = []
    for layer in layers(net):
        index = 2 * families.index(layer.family)
        macs, outputs = totals[layer.family]
        terms.append(Term(coefficients[index] * layer.macs / macs, layer.sides))
        terms.append(Term(coefficients[index + 1] * layer.outputs / outputs, layer.written))
    return LatencyModel(
        reference_ms=1.0,
        narrowest_ms=0.0,
        constant=constant,
        terms=tuple(terms),
        widths=editor(net).widths,
        held_out=0.0,
        networks=0,
    )


def sampled(net: str, count: int = 24) -> list[dict[str, int]]:
    widths = editor(net).widths
    floor = widths | floor_widths(editor(net), 1)
    return sample_widths(
        widths, floor, {n: 2 * w for n, w in widths.items()} | {"fc": widths.get("fc", 10)}, steps={}, count=count
    )


def drawn(data: st.DataObject, net: str, label: str) -> dict[str, int]:
    return {g.name: data.draw(st.integers(1, 2 * g.width), label=f"{label} {g.name}") for g in editor(net).editable}


@settings(max_examples=40, deadline=None)
@given(net=st.sampled_from(["chain", "residual", "joined"]), data=st.data())
def test_the_fit_recovers_what_made_the_measurements(net: str, data: st.DataObject) -> None:
    families = len({layer.family for layer in layers(net)})
    coefficients = data.draw(st.lists(st.floats(0.05, 5.0), min_size=2 * families, max_size=2 * families))
    known = truth(net, data.draw(st.floats(0.01, 1.0)), coefficients)
    widths = sampled(net, 40)
    model = fit(layers(net), widths, [known.predict(w) for w in widths])
    assert model.held_out < 1e-6 and model.networks == len(widths)
    for _ in range(3):
        asked = drawn(data, net, "width of")
        assert model.predict(asked) == pytest.approx(known.predict(asked), rel=1e-6)


@pytest.mark.parametrize("net", sorted(NETS))
def test_layers_scale_as_the_network_does(net: str) -> None:
    """The shares of multiply-adds and outputs, against a network that was really resized."""
    found = layers(net)
    widths = sampled(net)[5]
    import copy

    from robustcompress.export.timing import Stopwatch

    resized = Stopwatch(copy.deepcopy(editor(net)), SHAPE).resized(widths)
    again = layers_of(StructuralEditor(resized, EXAMPLE), EXAMPLE)
    for before, after in zip(found, again, strict=True):
        assert before.family == after.family
        assert before.macs * np.prod([s.ratio(widths) for s in before.sides]) == pytest.approx(after.macs)
        assert before.outputs * np.prod([s.ratio(widths) for s in before.written]) == pytest.approx(after.outputs)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), noise=st.lists(st.floats(0.7, 1.4), min_size=24, max_size=24))
def test_a_prediction_never_falls_as_a_width_rises_however_noisy_the_measurements(
    data: st.DataObject, noise: list[float]
) -> None:
    widths = sampled("residual")
    times = [truth("residual", 0.1, [1.0] * 8).predict(w) * n for w, n in zip(widths, noise, strict=False)]
    model = fit(layers(), widths, times)
    assert model.constant >= 0 and all(term.ms >= 0 for term in model.terms)
    asked = drawn(data, "residual", "width of")
    group = data.draw(st.sampled_from(sorted(asked)))
    wider = {**asked, group: asked[group] + data.draw(st.integers(1, 8))}
    assert model.predict(wider) >= model.predict(asked) - 1e-12


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_tensors_are_predicted_as_numbers_are_and_carry_gradients(data: st.DataObject) -> None:
    model = truth("joined", 0.3, [0.5, 1.0] * len({k.family for k in layers("joined")}))
    asked = drawn(data, "joined", "width of")
    tensors = {n: torch.tensor(float(w), dtype=torch.float64, requires_grad=True) for n, w in asked.items()}
    predicted = model.predict(tensors)
    assert float(predicted.detach()) == pytest.approx(model.predict(asked), rel=1e-12)
    predicted.backward()
    for name, width in tensors.items():
        step = {**asked, name: asked[name] + 1e-6}
        slope = (model.predict(step) - model.predict(asked)) / 1e-6
        assert width.grad is not None and float(width.grad) == pytest.approx(slope, rel=1e-3)


def test_a_model_survives_json() -> None:
    model = fit(layers(), sampled("residual"), [clock_of(w) for w in sampled("residual")])
    assert LatencyModel.from_json(json.loads(json.dumps(model.to_json()))) == model


def clock_of(widths: dict[str, int]) -> float:
    from robustcompress.export.timing import Stopwatch

    return clock(Stopwatch(editor(), SHAPE).resized(widths), SHAPE)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 12),
    columns=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_least_squares_without_negative_coefficients_is_optimal(rows: int, columns: int, seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker, which only a minimum fulfils."""
    generator = np.random.default_rng(seed)
    design, target = generator.normal(size=(rows, columns)), generator.normal(size=rows)
    found = nonnegative(design, target)
    gradient = design.T @ (design @ found - target)
    assert found.min() >= 0
    assert gradient.min() >= -1e-7
    assert np.abs(gradient * found).max() <= 1e-7


def test_samples_lie_in_their_range_begin_with_the_reference_and_are_the_same_each_time() -> None:
    full, floor, most = {"a": 16, "b": 64, "fc": 10}, {"a": 2, "b": 2, "fc": 10}, {"a": 16, "b": 96, "fc": 10}
    found = sample_widths(full, floor, most, steps=dict.fromkeys(full, 2), count=24)
    assert found == sample_widths(full, floor, most, steps=dict.fromkeys(full, 2), count=24)
    assert found[:3] == [full, floor, most] and 20 <= len(found) <= 24
    assert all(floor[n] <= w <= most[n] and w % 2 == 0 for widths in found for n, w in widths.items())
    assert len({tuple(widths.values()) for widths in found}) == len(found)


def test_a_side_counts_what_belongs_to_no_group() -> None:
    side = Side((("a", 4), ("b", 1)), 3, 4 * 8 + 5 + 3)
    assert side.ratio({"a": 8, "b": 5}) == 1
    assert side.ratio({"a": 4, "b": 1}) == 20 / 40
