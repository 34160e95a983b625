"""The smallest network that stays robust: the search against curves that are known, and the whole of it on digits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import robustcompress as rc
from robustcompress import calibration, smallest
from robustcompress.min_robust import CLOSE, MinRobust, Trial, images_needed, lines_of, propose, smallest_of, trials_of
from robustcompress.resolve import Request, resolve
from robustcompress.robust import AttackResult, RobustReport
from robustcompress.robust.objectives import PGDAT
from robustcompress.train import Progress
from tests.latency.fake import Clockwork
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state

Curve = Callable[[float], float]
N = 400
"""Images that the made-up evaluations are of."""


def lower(accuracy: float, n: int = N) -> float:
    """Wilson's lower end, by the textbook's formula (Agresti and Coull 1998)."""
    z = 1.959963984540054
    p = round(accuracy * n) / n
    return (p + z * z / (2 * n) - z * math.sqrt((p * (1 - p) + z * z / (4 * n)) / n)) / (1 + z * z / n)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Accuracy by size: a step function of a few random heights, in no order."""
    edges = sorted(draw(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6, unique=True)))
    heights = draw(st.lists(st.floats(0.0, 1.0), min_size=len(edges) + 1, max_size=len(edges) + 1))
    return lambda size: heights[sum(size > edge for edge in edges)] if size < 1 else 1.0


def search(curve: Curve, demanded: float, *, floor: float, ceiling: float, trials: int) -> list[Trial]:
    demand, tried = MinRobust(demanded, trials=trials), list[Trial]()
    while (limit := propose(tried, floor=floor, ceiling=ceiling, trials=trials)) is not None:
        size = 0.97 * limit  # rounded widths never use all of it
        tried.append(demand.read(Trial(limit=limit, size=size, right=round(curve(size) * N), n=N)))
    return tried


@settings(max_examples=300, deadline=None)
@given(curves(), st.floats(0.05, 0.9), st.floats(0.001, 0.3), st.floats(0.35, 1.0), st.integers(1, 8))
def test_the_search_keeps_its_promises(curve: Curve, demand: float, floor: float, ceiling: float, trials: int) -> None:
    tried = search(curve, demand, floor=floor, ceiling=ceiling, trials=trials)
    assert len(tried) <= trials
    assert all(floor < trial.limit < ceiling for trial in tried)
    assert len({trial.limit for trial in tried}) == len(tried)
    holding = [trial.size for trial in tried if lower(curve(trial.size or 0)) >= demand]
    found = smallest_of(tried)
    assert (found.size if found else None) == (min(holding) if holding else None)  # type: ignore[type-var]


@settings(max_examples=300, deadline=None)
@given(st.floats(0.002, 0.95), st.floats(0.001, 0.3), st.integers(1, 9))
def test_where_accuracy_rises_with_size_the_threshold_is_closed_in_on(edge: float, floor: float, trials: int) -> None:
    tried = search(lambda size: 0.9 if size >= edge else 0.1, 0.5, floor=floor, ceiling=1.0, trials=trials)
    high = min((t.size for t in tried if t.holds and t.size), default=1.0)
    low = max((t.limit for t in tried if not t.holds), default=floor)
    halved = (1 / floor) ** (0.5 ** len(tried))
    assert high / low <= halved * 1.0001, "every trial halves what is left, in ratios"
    assert len(tried) == trials or high / low <= CLOSE
    assert edge <= high <= 1


def test_a_wide_interval_does_not_hold() -> None:
    demand = MinRobust(0.5)
    assert not demand.read(Trial(limit=0.5, size=0.5, right=55, n=100)).holds
    assert demand.read(Trial(limit=0.5, size=0.5, right=550, n=1000)).holds
    assert lower(0.55, 100) < 0.5 < lower(0.55, 1000)
    needed = images_needed(0.55, 0.5)
    assert needed is not None and lower(0.55, needed) >= 0.5 > lower(0.55, needed // 2)
    assert images_needed(0.5, 0.5) is None and images_needed(0.5000001, 0.5) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (45, "for 45 % write 0.45"),
        (True, "between 0 and 1"),
        ({"accuracy": 0.4, "axes": "macs"}, "did you mean 'axis'"),
        ({"attack": "pgd-20"}, "says no accuracy"),
        ({"accuracy": 0.4, "axis": "mac"}, "did you mean 'macs'"),
        ({"accuracy": 0.4, "attack": "clean", "trials": 0, "images": 0}, "trials=0"),
        ({"accuracy": 0.4, "attack": "pgdd"}, "'pgdd' is unknown"),
    ],
)
def test_a_demand_that_makes_no_sense_is_refused(value: Any, said: str) -> None:
    with pytest.raises(rc.InputError, match=said):
        rc.Budget(min_robust=value)


def test_a_budget_with_a_demand_is_plain_json_and_back() -> None:
    budget = rc.Budget(min_robust=MinRobust(0.4, "params", attack="PGD-10"), max_macs=1e6)
    assert rc.Budget(**json.loads(json.dumps(budget.to_json()))) == budget
    assert budget.demand == MinRobust(0.4, "params", attack="pgd-10")
    assert "pgd-10 accuracy >= 40 %" in str(budget) and "macs <= 1M" in str(budget)
    assert rc.Budget(macs=0.5).to_json() == {"macs": 0.5}, "older checkpoints and results say no more"


def test_a_recipe_may_demand_it() -> None:
    plain = {"model": "resnet8", "strategy": "uniform", "budget": {"min_robust": {"accuracy": 0.4, "axis": "params"}}}
    recipe = rc.RunRecipe.from_mapping(plain)
    assert recipe.budget.demand == MinRobust(0.4, "params")
    assert rc.RunRecipe.from_mapping(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert rc.RunRecipe.from_mapping({**plain, "budget": {"min_robust": 0.4}}).budget == rc.Budget(min_robust=0.4)


# The whole loop, with networks that cost nothing.


class Killed(BaseException):
    """What no one catches."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Stands for a result, and for its network."""

    size: float
    history: tuple[Any, ...] = ()

    @property
    def model(self) -> Network:
        return self

    @property
    def before(self) -> SimpleNamespace:
        return SimpleNamespace(macs=100_000, params=100_000)

    @property
    def after(self) -> SimpleNamespace:
        return SimpleNamespace(macs=round(self.size * 100_000), params=round(self.size * 100_000))


@dataclasses.dataclass
class World:
    """Compressions and evaluations by a curve, which die at a given moment."""

    curve: Curve
    dies_at: int = 0
    moments: int = 0
    finished: Counter[str] = dataclasses.field(default_factory=Counter)

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.dies_at:
            raise Killed

    def compress_in(self, directory: Path, name: str, request: Request, *_: Any, **__: Any) -> Network:
        place = directory / name
        if not place.exists():
            self.moment()
            size = 1.0 if request.strategy.name == "none" else 0.98 * (request.budget.macs or 0)
            place.mkdir()
            (place / "size").write_text(repr(size))
            self.finished[name] += 1
            self.moment()
        return Network(float((place / "size").read_text()))

    def evaluate(self, network: Network, *_: Any, **__: Any) -> RobustReport:
        self.moment()
        flags = torch.arange(N) < round(self.curve(network.size) * N)
        attacks = tuple(AttackResult(name=name, correct=flags, seconds=0.0) for name in ("clean", "pgd-20"))
        self.moment()
        return RobustReport(
            threat=rc.ThreatModel(), n=N, seed=0, attacks=attacks, images_sha256="", indices=torch.arange(N)
        )


def asked(checkpoint: Path, demanded: float, **options: Any) -> Request:
    defaults: dict[str, Any] = {"threat": 0.1, "objective": None, "epochs": 1, "recipe": None, "round_to": None}
    defaults |= {"attacks": (), "test_images": None, "seed": 0, "device": "cpu", "out": None}
    return resolve(
        model=build("residual"),
        strategy="magnitude",
        data=small_data(),
        budget=rc.Budget(min_robust=MinRobust(demanded, **options)),
        checkpoint=checkpoint,
        **defaults,
    )


def run(world: World, request: Request, monkeypatch: pytest.MonkeyPatch) -> Network:
    assert request.checkpoint is not None
    write = smallest.write_json

    def written(path: Path, value: Any) -> None:
        world.moment()
        write(path, value)
        world.moment()

    with monkeypatch.context() as patch:
        patch.setattr(smallest, "compress_in", world.compress_in)
        patch.setattr(smallest, "evaluate", world.evaluate)
        patch.setattr(smallest, "write_json", written)
        patch.setattr(smallest, "wilson", lambda *_: (1.0, 1.0))  # the data are few, the made-up images many
        patch.setattr("robustcompress.durable.os.fsync", lambda _: None)  # no test cuts the power
        patch.setattr(smallest._Search, "_look", lambda self: (0.02, {"macs": 100_000, "params": 100_000}))
        with smallest.workplace(request.checkpoint) as place:
            return smallest.find_smallest(request, place, None, Progress(False), 0.0)  # type: ignore[arg-type, return-value]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(curve=curves(), demanded=st.floats(0.1, 0.8))
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(
    curve: Curve, demanded: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("search") / "c"
    request = asked(place, demanded)

    def whole(world: World) -> Network | str:
        try:
            return run(world, request, monkeypatch)
        except rc.BudgetError as error:
            return str(error)

    def removed() -> None:
        if place.exists():
            import shutil

            shutil.rmtree(place)

    untouched = World(curve)
    expected = whole(untouched)
    assert place.exists() == isinstance(expected, str), "nothing is left of a search that found something"
    assert sum(untouched.finished.values()) <= 6
    removed()
    for moment in range(1, untouched.moments + 1):
        world = World(curve, dies_at=moment)
        with pytest.raises(Killed):
            whole(world)
        assert whole(world) == expected
        assert set(world.finished.values()) <= {1}, "nothing finished was made again"
        assert world.finished == untouched.finished
        removed()


def test_another_demand_reads_the_same_trials_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(lambda size: 0.3 + 0.4 * size)
    with pytest.raises(rc.BudgetError, match=r"(?s)only the reference.*allow more trials.*reference +1.000") as raised:
        run(World(lambda size: 0.9 if size == 1 else 0.2), asked(tmp_path / "a", 0.5), monkeypatch)
    assert str(raised.value).count("  no") == 5
    with pytest.raises(rc.BudgetError, match="the reference itself does not reach"):
        run(world, asked(tmp_path / "c", 0.68), monkeypatch)
    found = run(world, asked(tmp_path / "c", 0.45, trials=3), monkeypatch)
    assert world.finished["reference"] == 1 and sum(world.finished.values()) == 4
    tried = trials_of(found.history)
    assert tried[0].limit == 1 and tried[0].holds and len(tried) == 4
    assert found.size == pytest.approx(min(t.size or 0 for t in tried if t.holds), rel=1e-4)
    assert len(lines_of(tried)) == 5


def test_a_directory_of_another_search_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        run(World(lambda size: size, dies_at=7), asked(tmp_path / "c", 0.4), monkeypatch)
    with pytest.raises(rc.InputError, match="is of another run"):
        run(World(lambda size: size), dataclasses.replace(asked(tmp_path / "c", 0.4), seed=1), monkeypatch)
    with pytest.raises(rc.InputError, match="is of another run"):
        run(World(lambda size: size), asked(tmp_path / "c", 0.4, attack="pgd-10"), monkeypatch)
    (tmp_path / "c" / "search.json").write_text('{"format": 1}')
    with pytest.raises(rc.CheckpointError, match="damaged"):
        run(World(lambda size: size), asked(tmp_path / "c", 0.4), monkeypatch)


# With real networks.


def data() -> rc.DataSplits:
    """As `small_data`, with 200 images to choose on."""
    more = rc.load_data("digits", image_size=16)
    return dataclasses.replace(small_data(), val=more.train.first(200))


QUICK: dict[str, Any] = {
    "threat": 0.001,
    "epochs": 1.0,
    "objective": PGDAT(steps=1),
    "recipe": QUICK_RECIPE,
    "progress": False,
}


def quick(demand: MinRobust, strategy: Any = "magnitude", **options: Any) -> rc.CompressResult:
    given: dict[str, Any] = {"data": data(), "attacks": ("clean",), **QUICK}
    return rc.compress(build("residual"), strategy, budget=rc.Budget(min_robust=demand), **(given | options))


EASY = MinRobust(0.0005, attack="fgsm", trials=2)


def test_what_is_found_is_what_compress_makes_of_that_budget(tmp_path: Path) -> None:
    result = quick(EASY, out=tmp_path / "out")
    tried = trials_of(result.history)
    assert [trial.limit for trial in tried[:1]] == [1.0] and len(tried) == 3
    best = smallest_of(tried[1:])
    assert best is not None
    plain = rc.compress(
        build("residual"), "magnitude", budget=rc.Budget(macs=best.limit), data=data(), attacks=(), **QUICK
    )
    assert same(state(result.model), state(plain.model)) and result.edits == plain.edits
    assert result.after.macs == plain.after.macs == best.macs
    assert result.report is not None and {a.name for a in result.report.attacks} == {"clean", "fgsm"}
    again = rc.load(tmp_path / "out", model=build("residual"))
    assert again.budget == result.budget == {"min_robust": EASY.to_json()}
    assert again.meets_budget == result.meets_budget and trials_of(again.history) == tried
    assert json.loads((tmp_path / "out" / "result.json").read_text())["format"] == 3
    assert "networks tried" in str(again)


def test_the_test_images_have_the_last_word() -> None:
    result = quick(EASY)
    high = {"min_robust": MinRobust(0.999, attack="fgsm").to_json()}
    other = {"min_robust": MinRobust(0.0005, attack="pgd-20").to_json()}
    assert not dataclasses.replace(result, budget=high).meets_budget
    assert not dataclasses.replace(result, budget=other).meets_budget, "that attack was not run"
    assert not dataclasses.replace(result, report=None).meets_budget
    assert "misses its budget" in str(dataclasses.replace(result, budget=high))


def test_stopped_after_every_epoch_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, stops = quick(EASY, epochs=2.0), 0
    while True:
        try:
            kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
            resumed = quick(EASY, epochs=2.0, **kept)
            break
        except rc.OutOfTime:
            stops += 1
            assert stops < 20
    assert stops >= 5 and not (tmp_path / "c").exists()
    assert same(state(resumed.model), state(whole.model))
    assert trials_of(resumed.history) == trials_of(whole.history)
    assert resumed.report is not None and whole.report is not None
    assert all(
        torch.equal(a.correct, b.correct) for a, b in zip(resumed.report.attacks, whole.report.attacks, strict=True)
    )


@pytest.mark.parametrize(
    ("strategy", "demand", "axis"),
    [
        (rc.Magnitude(granularity="weight"), MinRobust(0.0005, "density", attack="fgsm", trials=1), "density"),
        ("uniform", MinRobust(0.0005, "params", attack="fgsm", trials=1), "params"),
        ("grape", MinRobust(0.0005, "latency", attack="fgsm", trials=1), "latency"),
    ],
    ids=lambda value: getattr(value, "axis", None) or str(value)[:9],
)
def test_other_sizes(strategy: Any, demand: MinRobust, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustcompress.api.Stopwatch", Clockwork)
    monkeypatch.setattr("robustcompress.reach.Stopwatch", Clockwork)
    monkeypatch.setattr(calibration, "_known", {})
    result = quick(demand, strategy)
    trial = trials_of(result.history)[1]
    before, after = result.before, result.after
    size = {
        "density": after.density,
        "params": after.params / before.params,
        "latency": (after.onnx_ms or 0) / (before.onnx_ms or 1),
    }[axis]
    assert trial.size == pytest.approx(size) and 0 < size <= 1.2 * trial.limit


def test_other_limits_hold_for_every_trial() -> None:
    whole = rc.measure(build("residual"), torch.zeros(1, 3, 16, 16))
    tight = rc.Budget(min_robust=EASY, max_macs=0.4 * whole.macs, params=0.6)
    given: dict[str, Any] = {"data": data(), "attacks": (), **QUICK}
    tried = trials_of(rc.compress(build("residual"), "uniform", budget=tight, **given).history)
    assert all(trial.limit < 0.4 and (trial.macs or 0) <= 0.4 * whole.macs for trial in tried[1:])
    assert all((trial.params or 0) <= 0.6 * whole.params for trial in tried[1:])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(rc.BudgetError, match="cannot be reached"):
        patch.setattr("robustcompress.session.train", lambda *_, **__: pytest.fail("it began to train"))
        rc.compress(build("residual"), "uniform", budget=rc.Budget(min_robust=EASY, macs=0.001), **given)


def test_what_is_the_callers_in_the_directory_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "c" / ".git").mkdir(parents=True)
    with pytest.raises(rc.InputError, match=r"also holds \.git"):
        quick(EASY, checkpoint=tmp_path / "c")
    assert (tmp_path / "c" / ".git").is_dir()


def test_a_pretrained_reference_is_not_trained() -> None:
    result = quick(EASY, pretrained=True)
    reference = trials_of(result.history)[0]
    report = rc.evaluate(build("residual"), data().val, rc.ThreatModel("linf", 0.001), attacks=("clean", "fgsm"))
    assert reference.right == int(report.result("fgsm").correct.sum()) and reference.macs == result.before.macs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "none"}, "none has but one"),
        ({"strategy": rc.Fixed(widths={})}, "fixed has but one"),
        ({"strategy": rc.Magnitude(granularity="weight")}, r"axis='density'\)"),
        ({"demand": MinRobust(0.1, "density")}, "axis='macs'"),
        ({"demand": MinRobust(0.99)}, "cannot be shown on 200 validation images"),
    ],
    ids=["none", "fixed", "weights", "channels", "few-images"],
)
def test_what_cannot_work_is_said_before_any_training(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustcompress.session.train", lambda *_, **__: pytest.fail("it began to train"))
    with pytest.raises(rc.InputError, match=said):
        quick(**({"demand": EASY} | options))


def test_data_without_validation_images_are_refused() -> None:
    splits = small_data()
    with pytest.raises(rc.InputError, match="chosen on validation images, and there are none"):
        quick(EASY, data=dataclasses.replace(splits, val=splits.val.first(0)))


def test_an_unreachable_demand_names_what_the_reference_has(tmp_path: Path) -> None:
    with pytest.raises(
        rc.BudgetError, match=r"the reference itself does not reach .* % \(.* n=200 validation images\)"
    ):
        quick(MinRobust(0.9, attack="fgsm", trials=1), checkpoint=tmp_path / "c")
    assert (tmp_path / "c" / "reference" / "result.json").is_file(), "the work of hours is not thrown away"
