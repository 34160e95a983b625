"""Several compressions in one directory: the front against brute force, and runs that are killed and go on."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import robustcompress as rc
from robustcompress import api, calibration
from robustcompress.front import COSTS, Front, Point, undominated
from robustcompress.robust.objectives import PGDAT
from tests.latency.fake import Clockwork
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state

pareto = importlib.import_module("robustcompress.pareto")  # the package gives the function of that name
SMALL = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(SMALL, SMALL), max_size=12))
def test_the_front_is_what_brute_force_finds(things: list[tuple[float, float]]) -> None:
    def beaten(i: int) -> bool:
        cost, value = things[i]
        return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in things)

    found = undominated([cost for cost, _ in things], [value for _, value in things])
    assert sorted(found) == [i for i in range(len(things)) if not beaten(i)]
    assert [things[i][0] for i in found] == sorted(things[i][0] for i in found)


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (api, pareto):
        monkeypatch.setattr(place, "Stopwatch", Clockwork)
    monkeypatch.setattr(calibration, "_known", {})


QUICK: dict[str, Any] = {
    "threat": 0.001,
    "epochs": 1.0,
    "objective": PGDAT(steps=1),
    "recipe": QUICK_RECIPE,
    "progress": False,
}


def run(out: Path, strategies: Any = ("magnitude", "uniform"), **options: Any) -> Front:
    given: dict[str, Any] = {"data": small_data(), "budgets": (0.3, 1e-6), "attacks": ("clean", "fgsm"), **QUICK}
    return rc.pareto(build("residual"), strategies, out=out, **(given | options))


def count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from robustcompress import session

    seen: list[str] = []
    train = session.train

    def counted(*args: Any, **options: Any) -> None:
        seen.append(options["phase"])
        train(*args, **options)

    monkeypatch.setattr("robustcompress.session.train", counted)
    return seen


def test_networks_are_those_of_compress_and_failures_end_nothing(tmp_path: Path) -> None:
    front = run(tmp_path / "f")
    assert [point.label for point in front.points] == ["none", "magnitude", "magnitude", "uniform", "uniform"]
    assert [bool(point.failed) for point in front.points] == [False, False, True, False, True]
    assert "cannot be reached" in front.points[2].failed and "cannot be reached" in str(front)
    for point in front.made[1:]:
        alone = rc.compress(
            build("residual"), point.label, budget=rc.Budget(macs=0.3), data=small_data(), attacks=("fgsm",), **QUICK
        )
        kept = rc.load(tmp_path / "f" / point.name, model=build("residual"))
        assert same(state(kept.model), state(alone.model)) and kept.edits == alone.edits
        assert (point.macs, point.params, point.size) == (alone.after.macs, alone.after.params, alone.after.size)
        assert alone.report is not None and kept.report is not None
        assert point.accuracies["fgsm"]["accuracy"] == alone.report.result("fgsm").accuracy
        assert kept.report.result("fgsm").low == point.accuracies["fgsm"]["low"]
    record = json.loads((tmp_path / "f" / "pareto.json").read_text())
    assert Front.from_json(record) == front == rc.read_front(tmp_path / "f")
    assert (tmp_path / "f" / "pareto.png").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {"none", "magnitude-macs-0.3", "uniform-macs-0.3", "pareto.json", "pareto.png"}


class Killed(BaseException):
    """What no one catches."""


def test_killed_at_any_write_it_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, writes = run(tmp_path / "whole"), [0, 0]
    trained, write = count_trainings(monkeypatch), pareto.write_json

    def dying(path: Path, value: Any) -> None:
        writes[0] += 1
        if writes[0] == 1 + writes[1] // 2 and writes[1] % 2 == 0:
            raise Killed
        write(path, value)
        if writes[0] == 1 + writes[1] // 2:
            raise Killed

    monkeypatch.setattr(pareto, "write_json", dying)
    for stops in range(40):
        writes[:] = [0, stops % 4]
        try:
            resumed = run(tmp_path / "f")
            break
        except Killed:
            continue
    assert stops >= 5
    assert resumed == whole
    assert len(trained) == 4, "the reference, two phases of magnitude, uniform: each once"


def test_stopped_after_every_epoch_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, stops = run(tmp_path / "whole", "magnitude", epochs=2.0), 0
    while True:
        try:
            resumed = run(tmp_path / "f", "magnitude", epochs=2.0, checkpoint_every_s=0, deadline=0)
            break
        except rc.OutOfTime:
            stops += 1
            assert stops < 20
    assert stops >= 3 and resumed == whole
    for point in whole.made:
        first, second = (rc.load(tmp_path / d / point.name, model=build("residual")) for d in ("whole", "f"))
        assert same(state(first.model), state(second.model))


def test_more_is_added_and_nothing_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "f", "uniform", budgets=(0.3,))
    trained = count_trainings(monkeypatch)
    second = run(tmp_path / "f", ["uniform", rc.Magnitude(pretrain=0.0)], budgets=(0.3, rc.Budget(max_macs=2e5)))
    assert len(trained) == 3 and second.points[:2] == first.points
    third = run(tmp_path / "f", rc.Magnitude(pretrain=0.1), budgets=(0.3,), attacks=("clean", "fgsm", "pgd-2"))
    labels = [point.name for point in third.points]
    assert labels[-1] == "magnitude-2-macs-0.3" and third.points[2].name == "uniform-max_macs-200000"
    assert len(trained) == 5 and third.attack == "pgd-2"
    judged = [point.name for point in third.made]
    assert judged == ["none", "magnitude-2-macs-0.3"], "what was not asked for now keeps its figures"
    fourth = run(tmp_path / "f", "uniform", budgets=(0.3,), attacks=("clean", "fgsm", "pgd-2"))
    assert len(trained) == 5 and "uniform-macs-0.3" in {point.name for point in fourth.made}


def test_what_failed_is_tried_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pareto, "compress_in", lambda *args, **_: (_ for _ in ()).throw(rc.InputError("no luck")))
        with pytest.raises(rc.InputError, match="no luck"):
            run(tmp_path / "f", "uniform")  # without a reference there is no front
    real = pareto.compress_in

    def unlucky(directory: Path, name: str, *args: Any, **options: Any) -> rc.CompressResult:
        if name.startswith("uniform"):
            raise rc.InputError("no luck")
        return real(directory, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pareto, "compress_in", unlucky)
        assert run(tmp_path / "f", "uniform", budgets=(0.3,)).points[1].failed == "no luck"
    assert run(tmp_path / "f", "uniform", budgets=(0.3,)).points[1].failed == "no luck"
    assert not run(tmp_path / "f", "uniform", budgets=(0.3,), retry=True).points[1].failed


def test_a_pretrained_reference_is_judged_as_it_is(tmp_path: Path) -> None:
    front = run(tmp_path / "f", "magnitude", budgets=(0.3,), pretrained=True)
    report = rc.evaluate(build("residual"), small_data().test, rc.ThreatModel("linf", 0.001), attacks=("fgsm",))
    assert front.points[0].accuracies["fgsm"]["accuracy"] == report.result("fgsm").accuracy
    assert not (tmp_path / "f" / "none").exists()
    assert run(tmp_path / "f", "magnitude", budgets=(0.3,), pretrained=True) == front


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategies": ["unifrom"]}, "did you mean 'uniform'"),
        ({"budgets": (7,)}, "for 7 % write 0.07"),
        ({"budgets": ()}, "nothing to compress"),
        ({"budgets": (rc.Budget(min_robust=0.5),)}, "give it to compress"),
        ({"axis": "macks"}, "axis='macks' does not exist"),
        ({"axis": "density"}, "counts single zeros"),
        ({"picture": "front.tiff2"}, "name one of the formats"),
        ({"picture": "../front.png"}, "name a file"),
        ({"attacks": ("clean",)}, "no attack is named"),
        ({"deadline": -1}, "deadline=-1"),
        ({"threat": -1}, "eps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_at_once(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(rc.InputError, match=said) as raised:
        run(tmp_path / "f", **options)
    assert "pareto() cannot start" in str(raised.value) and not (tmp_path / "f").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").touch()
    with pytest.raises(rc.InputError, match="holds other things"):
        run(tmp_path / "f")
    with pytest.raises(rc.InputError, match="is no directory"):
        run(tmp_path / "f" / "thesis.tex" / "b")
    run(tmp_path / "g", "uniform", budgets=(0.3,))
    with pytest.raises(rc.InputError, match=r"of another run.*\n.*epochs: 1.0 there, 2.0 here|epochs: 1.0 there, 2.0"):
        run(tmp_path / "g", "uniform", epochs=2.0)
    with pytest.raises(rc.ResultError, match=r"holds no pareto\.json"):
        rc.read_front(tmp_path)


def point(name: str, macs: int, right: float, **options: Any) -> Point:
    accuracies = {
        a: {"accuracy": right, "low": right - 0.05, "high": right + 0.05, "n": 90, "suite": ""}
        for a in ("clean", "pgd-20")
    }
    kind = "none" if name == "none" else "uniform"
    return Point(
        name=name,
        label=kind,
        strategy={"name": kind},
        budget={} if name == "none" else {"macs": 0.5},
        macs=macs,
        params=macs,
        size=macs,
        onnx_ms=macs / 1e6,
        accuracies=accuracies,
        **options,
    )


def made_up(*points: Point) -> Front:
    return Front(points=points, attack="pgd-20", threat=rc.ThreatModel(), data="digits", seed=0)


def test_the_picture_shows_every_network_and_rings_the_front(tmp_path: Path, figures: list[Any]) -> None:
    front = made_up(point("none", 1000, 0.5), point("a", 500, 0.6), point("b", 100, 0.2), point("c", 90, 0.3))
    assert [p.name for p in front.front("macs")] == ["c", "a"]
    rc.plot_front(front, tmp_path / "f.svg")
    panels = figures[0].axes
    assert len(panels) == len(COSTS) == 3
    for axes in panels:
        drawn = sorted(round(float(y), 6) for container in axes.containers for y in container[0].get_ydata())
        assert drawn == [20, 30, 50, 60]
        rings = [c for c in axes.collections if len(c.get_offsets()) == 2 and c.get_sizes()[0] == 150]
        assert sorted(float(y) for _, y in rings[0].get_offsets()) == [30, 60]
        assert "PGD-20" in panels[0].get_ylabel()
    with pytest.raises(rc.InputError, match="nothing to draw"):
        rc.plot_front(made_up(dataclasses.replace(point("a", 1, 0.5), failed="no")), tmp_path / "g.png")
    with pytest.raises(rc.InputError, match="did you mean 'macs'"):
        front.front("macss")
    assert "autoattack" not in str(front).splitlines()[1] and "upper bound" in str(front)
