"""The controls: what each holds equal, so that a gain over it means what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.search.stages import find_stages
from robustcompress.session import Session
from robustcompress.shapes import uniform_widths
from tests.strategies.nets import QUICK_OBJECTIVE, QUICK_RECIPE, build, make_session, small_data, state


def test_random_differs_from_magnitude_in_the_channels_alone() -> None:
    ran: dict[str, Session] = {}
    for strategy in (rc.Magnitude(pretrain=0.25), rc.RandomChannels(pretrain=0.25)):
        ran[strategy.name] = make_session(build("residual"), epochs=4.0)
        strategy.run(ran[strategy.name])
    magnitude, random = ran["magnitude"], ran["random"]
    assert random.editor.widths == magnitude.editor.widths
    assert [e.sources for e in random.editor.edits] != [e.sources for e in magnitude.editor.edits]
    for key in ("phase", "steps", "lr"):
        assert [r.get(key) for r in random.history] == [r.get(key) for r in magnitude.history]
    before = [[r["loss"] for r in s.history if r["phase"] == "pretrain"] for s in (random, magnitude)]
    assert before[0] == before[1]


def test_random_channels_come_from_the_seed() -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(17 + seed)
        session = make_session(build("residual"), epochs=0.1, seed=seed, pretrained=True)
        rc.RandomChannels().run(session)
        return [edit.sources for edit in session.editor.edits]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("wrong", [{"pretrain": 1.0}, {"finetune_lr": 0.0}, {"pretrain": "half"}], ids=str)
def test_bad_options_of_random_are_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError, match=f"random cannot run: {name}={value!r}"):
        rc.RandomChannels(**wrong)


@pytest.mark.parametrize("pretrained", [False, True])
def test_uniform_is_narrow_before_it_trains_and_trains_all_epochs(pretrained: bool) -> None:
    session = make_session(build("residual"), epochs=3.0, pretrained=pretrained)
    target = uniform_widths(session)
    rc.Uniform().run(session)
    assert {g.name: g.width for g in session.editor.editable} == target
    assert [r["phase"] for r in session.history] == ["plant", "train", "train", "train"]
    assert session.history[-1]["steps"] == 9
    assert all(r["macs"] <= session.limits[0] for r in session.history)


def test_from_scratch_nothing_of_a_pretrained_reference_is_left() -> None:
    ends = []
    for gain in (1.0, 5.0):
        model = build("residual")
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(gain)
        session = make_session(model, epochs=0.3, pretrained=True)
        rc.Uniform().run(session)
        ends.append(state(session.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def scaled(session: Session, **options: Any) -> dict[str, int]:
    """The widths that `Scaling` trains."""
    rc.Scaling(**options).run(session)
    return {group.name: group.width for group in session.editor.editable}


def test_stages_are_the_resolutions_at_which_groups_are_written() -> None:
    assert find_stages(make_session(build("residual"))) == {"8x8": ["stem", "conv1"], "4x4": ["conv3", "conv4"]}
    assert find_stages(make_session(build("imported", num_classes=10))) == {
        "8x8": ["features.0"],
        "4x4": ["features.3"],
    }
    wide = find_stages(make_session(rc.build_model("wrn_16_4", num_classes=10, width=0.25)[0]))
    assert list(wide) == ["16x16", "8x8", "4x4"]
    assert sum(len(names) for names in wide.values()) == 10, "every group has one stage"


class Squeezed(nn.Module):
    """One resolution, a squeeze-and-excitation gate on one position, and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.hidden, self.fc = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu()).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(self.hidden(x.mean((2, 3))).relu())


def test_a_network_of_one_resolution_is_scaled_evenly_and_it_is_said() -> None:
    said: list[str] = []
    session = make_session(Squeezed(), epochs=0.1)
    session.say = said.append  # type: ignore[method-assign]
    target = uniform_widths(session)
    assert list(find_stages(session)) == ["16x16"], "squeezed and linear groups are no stage"
    assert scaled(session) == target
    assert [line for line in said if "no last stage" in line]


@pytest.mark.parametrize("last", [0.25, 0.4])
def test_the_last_stage_has_its_share_of_the_common_ratio(last: float) -> None:
    model = rc.build_model("wrn_16_4", num_classes=10, width=0.5)[0]
    session = make_session(model, epochs=0.1)
    full, stages = session.editor.widths, list(find_stages(session).values())
    widths = scaled(session, last=last)
    ratios = [sum(widths[n] for n in names) / sum(full[n] for n in names) for names in stages]
    assert ratios[0] == pytest.approx(ratios[1], abs=0.05)
    assert ratios[2] == pytest.approx(last * (ratios[0] + ratios[1]) / 2, abs=0.03)
    assert session.cost().macs > 0.97 * session.limits[0]
    assert [r["phase"] for r in session.history] == ["plant", "train"]


def test_the_last_stage_is_narrowed_first_and_alone_where_that_is_enough() -> None:
    session = make_session(build("residual"), budget=rc.Budget(macs=0.8), epochs=0.1)
    full, stages = session.editor.widths, find_stages(session)
    widths = scaled(session)
    assert all(widths[name] == full[name] for name in stages["8x8"])
    assert all(0.4 * full[name] <= widths[name] < full[name] for name in stages["4x4"])
    assert session.cost().macs <= session.limits[0]
    assert not any(session.fits({**widths, n: widths[n] + 1}) for n in stages["4x4"]), "rounding's leftover is spent"


def test_no_group_passes_the_reference_unless_the_cap_says_so() -> None:
    budget, ends = rc.Budget(macs=0.95), {}
    for cap in (1.0, 1.5):
        session = make_session(build("residual"), budget=budget, epochs=0.1)
        full = session.editor.widths
        ends[cap] = scaled(session, last=0.1, cap=cap)
        assert all(width <= cap * full[name] for name, width in ends[cap].items())
        assert session.cost().macs <= session.limits[0]
    assert ends[1.5]["conv1"] > full["conv1"]


def test_last_at_one_is_uniform_but_for_the_leftover() -> None:
    session = make_session(build("residual"), epochs=0.1)
    assert scaled(session, last=1.0) == uniform_widths(make_session(build("residual")))


@pytest.mark.parametrize("wrong", [{"last": 0.0}, {"last": 1.5}, {"cap": 0.9}, {"cap": "wide"}], ids=str)
def test_bad_options_of_scaling_are_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError, match=f"scaling cannot run: {name}={value!r}"):
        rc.Scaling(**wrong)


def test_fixed_takes_the_given_widths_and_trains_all_epochs() -> None:
    given = {"stem": 6, "conv1": 24, "conv3": 11, "conv4": 9}
    session = make_session(build("residual"), budget=rc.Budget(macs=0.7), epochs=3.0)
    rc.Fixed(widths=given).run(session)
    assert {g.name: g.width for g in session.editor.editable} == given
    assert session.model.conv1.weight.shape == (24, 6, 3, 3), "wider than the reference's 16"
    assert [r["phase"] for r in session.history] == ["plant", "train", "train", "train"]
    assert session.history[-1]["steps"] == 9


def test_groups_that_are_not_named_share_the_rest_of_the_budget() -> None:
    session = make_session(build("residual"), epochs=0.1)
    rc.Fixed(widths={"conv1": 4}).run(session)
    widths = session.editor.widths
    assert widths["conv1"] == 4
    full, uniform = {"stem": 12, "conv3": 20, "conv4": 16}, uniform_widths(make_session(build("residual")))
    shares = [widths[name] / width for name, width in full.items()]
    assert all(widths[name] >= uniform[name] for name in full) and widths != uniform, "what conv1 leaves is theirs"
    assert max(shares) - min(shares) < 0.15
    assert session.cost().macs > 0.9 * session.limits[0]


@pytest.mark.parametrize("strategy", [rc.Grape(cap=1.5, events=2), rc.Hydra()], ids=lambda s: s.name)
@pytest.mark.parametrize("net", ["residual", "imported"])
def test_the_architecture_of_a_saved_result_is_retrained(strategy: rc.Strategy, net: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": small_data(),
        "epochs": 0.5,
        "objective": QUICK_OBJECTIVE,
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
    }
    first = rc.compress(build(net), strategy, **settings)
    first.save(tmp_path / "first")
    found = rc.Fixed.of(rc.load(tmp_path / "first", model=build(net, seed=4)))
    assert found == rc.Fixed.of(first) and hash(found) == hash(rc.Fixed.of(first))
    assert not first.model.training
    second = rc.compress(build(net), found, **settings)
    shapes = [{n: p.shape for n, p in r.model.named_parameters()} for r in (first, second)]
    assert shapes[0] == shapes[1]
    assert second.after.macs == first.after.macs and second.meets_budget
    assert second.strategy == {"name": "fixed", "widths": dict(found.widths), "bypassed": (), "inserted": ()}


def test_an_architecture_over_the_budget_is_refused_before_training() -> None:
    session = make_session(build("residual"))
    with pytest.raises(rc.BudgetError, match=r"fixed: these widths cost .* over macs <= 0\.5 x reference"):
        rc.Fixed(widths={"stem": 12, "conv1": 16, "conv3": 20, "conv4": 16}).run(session)
    assert [r["phase"] for r in session.history] == ["plant"]


def test_everything_wrong_with_the_widths_is_said_at_once_before_anything_changes() -> None:
    session = make_session(build("joined"))
    wrong = {"stam": 6, "fc": 3, "side": 65, "stem": 1}
    with pytest.raises(rc.InputError) as caught:
        rc.Fixed(widths=wrong).run(session)
    said = str(caught.value)
    for part in (
        "'stam'",
        "did you mean 'stem'",
        "'fc'",
        "holds the model's output",
        "=65: must be in [",
        "['stem']=1:",
    ):
        assert part in said
    assert not session.editor.edits and not session.history


@pytest.mark.parametrize("wrong", [3, [("stem", 4)], {"stem": 0}, {"stem": 2.0}, {"stem": True}, {4: 4}], ids=str)
def test_widths_that_are_none_are_named(wrong: Any) -> None:
    with pytest.raises(rc.InputError, match="fixed cannot run: widths"):
        rc.Fixed(widths=wrong)


def test_fixed_keeps_its_own_copy_of_the_widths() -> None:
    given = {"stem": 4}
    strategy = rc.Fixed(widths=given)
    given["stem"] = 9
    assert strategy.widths == {"stem": 4}
