"""Before training: a limit on latency from measured networks, or a reason why there is none to be had."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from robustcompress.budget import NOISE, Budget, Cost
from robustcompress.checkpoint import fingerprint
from robustcompress.errors import BudgetError, Problems
from robustcompress.export.timing import Stopwatch
from robustcompress.latency import LatencyLimit, LatencyModel, Timing, fit, layers_of, sample_widths
from robustcompress.latency_table import LatencyTable
from robustcompress.session import Session
from robustcompress.shapes import Widths, steps_of
from robustcompress.strategies import Strategy
from robustcompress.structure import StructuralEditor
from robustcompress.train import Progress

NETWORKS = 20
"""How many networks the predictor is fitted to."""

SECONDS = 0.5
"""How long each of them is timed, about."""

PRECISION = 0.003
"""Standard error, relative, down to which the chosen network is timed, and the trained one again."""

WIDEST = 2
"""Networks wider than this multiple of the reference are not measured: the limit lies below."""

_known: dict[str, dict[str, Any]] = {}  # runs of one process over one reference share a table


def limit_latency(
    session: Session,
    strategy: Strategy,
    stopwatch: Stopwatch,
    example: torch.Tensor,
    device: LatencyTable | None = None,
) -> None:
    """Give a session its limit on latency, decided once in a run, where its budget has one and the strategy heeds it.

    Args:
        session: Nothing was edited yet.
        strategy: What it will run.
        stopwatch: Of its reference.
        example: One image batch of the right shape.
        device: What another device measured; then nothing is measured here, and its predictions count.

    Raises:
        InputError: That device measured another network.
        BudgetError: No widths take so little time, or the reference takes no more.
    """
    budget, editor, round_to = session.goal.budget, session.editor, session.goal.round_to
    if not budget.limits_latency or strategy.direction == "none":
        return
    full, largest = editor.widths, strategy.largest(editor.widths)
    floor = {**full, **strategy.narrowest(editor, round_to)}
    most = {**full, **{g.name: min(largest[g.name], WIDEST * g.width) for g in editor.editable}}

    def table() -> dict[str, Any]:
        if device is not None:
            return device.fitted(layers_of(editor, example), example.shape[1:]).to_json()
        return session.world.only_first(
            lambda: _table(editor, example, floor, most, round_to, stopwatch, session.progress)
        )

    def timed(widths: Mapping[str, int]) -> Timing:
        return Timing(**session.world.only_first(lambda: asdict(here(widths))))  # the others are still meanwhile

    def here(widths: Mapping[str, int]) -> Timing:
        if device is not None:  # it is elsewhere: what its table predicts is all there is
            return Timing(model.predict(widths, without=editor.bypassed), model.reference_ms)
        network = stopwatch.resized(widths, without=editor.bypassed)
        return stopwatch.time(network, seconds=2 * SECONDS, precision=PRECISION)

    model = LatencyModel.from_json(session.decide("latency table", table))
    limit = LatencyLimit(
        model,
        budget.latency_limit(model.reference_ms),
        timed,
        without=lambda: editor.bypassed,
        source="measured" if device is None else "predicted",
    )
    where = "one thread" if device is None else f"{device.device.get('cpu', 'another device')}, from its table"
    session.say(
        f"latency (onnxruntime, one image, {where}): the reference takes {model.reference_ms:.3g} ms; reachable: "
        f"{model.narrowest_ms:.3g} to {model.predict(most):.3g} ms; asked for at most {limit.limit:.3g} ms; predicted "
        f"from {model.networks} networks within {100 * model.held_out:.1f} % (held out)"
    )
    _check(strategy, limit, session.goal.budget, session.goal.reference, round_to)
    session.latency = limit


def _check(strategy: Strategy, limit: LatencyLimit, budget: Budget, reference: Cost, round_to: int) -> None:
    model, problems = limit.model, Problems("the budget cannot be used")
    if limit.limit < model.narrowest_ms:
        problems.add(
            f"a latency of {limit.limit:.3g} ms cannot be reached: with every group at its narrowest "
            f"{model.narrowest_ms:.3g} ms are left ({model.narrowest_ms / model.reference_ms:.3f} of the reference); "
            f"raise the budget, lower round_to={round_to}, or start from a smaller model"
        )
    meets = budget.allows(reference, reference) and limit.limit >= model.reference_ms
    if strategy.direction == "prune" and not strategy.given_shape and meets:
        problems.add(
            f"the model already meets {budget} ({model.reference_ms:.3g} ms); lower the budget, or use strategy='none' "
            "to train it as it is"
        )
    problems.raise_if_any(BudgetError)


def _table(
    editor: StructuralEditor,
    example: torch.Tensor,
    floor: Widths,
    most: Widths,
    round_to: int,
    stopwatch: Stopwatch,
    progress: Progress,
) -> dict[str, Any]:
    """The predictor, as JSON; from memory where this process has measured the same networks."""
    sampled = sample_widths(editor.widths, floor, most, steps=steps_of(editor, round_to), count=NETWORKS)
    structure = fingerprint(editor.model)["model structure"]
    layers = layers_of(editor, example)  # tell apart what has the same tensors and another forward()
    key = json.dumps([structure, repr(layers), list(example.shape[1:]), sampled], sort_keys=True)
    if key not in _known:
        progress.say(f"measuring the latency of {len(sampled)} networks")
        timings = [stopwatch.time(stopwatch.resized(widths), seconds=SECONDS) for widths in sampled]
        reference_ms = statistics.median(timing.reference_ms for timing in timings)
        ratios = [1.0, *(timing.ratio for timing in timings[1:])]
        _known[key] = fit(layers, sampled, [ratio * reference_ms for ratio in ratios]).to_json()
    return _known[key]


def final_latency(
    session: Session, stopwatch: Stopwatch | None, model: torch.nn.Module, device: LatencyTable | None = None
) -> tuple[float | None, float | None]:
    """Measure the trained network again, where there is a limit; a miss beyond noise is said and throws no run away.

    Args:
        session: At its end.
        stopwatch: Of its reference.
        model: The network.
        device: What another device measured: then its prediction stands, and it is said.

    Returns:
        Milliseconds of the reference and of the network, on the scale of the limit.
    """
    limit = session.latency
    if limit is None or stopwatch is None:
        return None, None
    reference_ms = limit.model.reference_ms
    if device is not None:
        ms = limit.model.predict(session.editor.widths, without=session.editor.bypassed)
        session.progress.say(
            f"the network is predicted to take {ms:.3g} ms on the device of the table, within "
            f"{100 * limit.model.held_out:.1f} % (held out); it was not measured: time it there"
        )
        return reference_ms, ms
    ms = reference_ms * session.world.only_first(
        lambda: stopwatch.time(model, seconds=4 * SECONDS, precision=PRECISION).ratio
    )
    if ms > limit.limit * (1 + NOISE):
        session.progress.say(
            f"warning: the network takes {ms:.3g} ms at the end, more than {100 * NOISE:.0f} % over the limit of "
            f"{limit.limit:.3g} ms; measure again on a quiet machine, or ask for less"
        )
    return reference_ms, ms
