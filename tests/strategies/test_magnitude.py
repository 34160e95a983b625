"""The honest baseline: norms against a sum by hand, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.shapes import fill_budget, floor_widths, rounded, uniform_widths
from robustcompress.structure.magnitudes import group_norms
from tests.strategies.nets import build, make_session


def test_the_norm_of_a_group_takes_rows_columns_and_scales_of_every_layer() -> None:
    session = make_session(build("joined"))
    model = session.model
    for module in (model.bn0, model.bn2):
        torch.nn.init.uniform_(module.weight, 0.5, 2.0)

    def squares(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.detach().double().square().movedim(dim, 0).flatten(1).sum(1)

    expected = squares(model.stem.weight, 0) + model.bn0.weight.detach().double().square()
    expected += squares(model.side.weight, 1)
    expected += squares(model.depth.weight, 0)[:10] + model.bn2.weight.detach().double().square()[:10]
    expected += squares(model.point.weight, 1)[:10]
    assert torch.allclose(group_norms(session.editor)["stem"], expected.sqrt())


def test_the_norm_sums_all_positions_of_a_flattened_channel() -> None:
    session = make_session(build("imported"), epochs=0.1)
    model = session.model
    expected = model.features[3].weight.detach().double().square().flatten(1).sum(1)
    expected += model.classifier[1].weight.detach().double().square().view(24, 12, 4).sum((0, 2))
    assert torch.allclose(group_norms(session.editor)["features.3"], expected.sqrt())


def test_the_channels_with_the_largest_norms_stay_in_their_order() -> None:
    session = make_session(build("chain"), pretrained=True, epochs=0.1)
    with torch.no_grad():
        for weight, dim in ((session.model.conv2.weight, 0), (session.model.conv3.weight, 1)):
            weight.movedim(dim, 0)[[1, 5, 6]] *= 20
    norms = group_norms(session.editor)["conv2"]
    rc.Magnitude().run(session)
    edit = next(edit for edit in session.editor.edits if edit.group == "conv2")
    width = session.editor.widths["conv2"]
    assert edit.sources == tuple(norms.argsort(descending=True)[:width].sort().values.tolist())
    assert {1, 5, 6} <= set(edit.sources)


def test_every_group_keeps_about_the_same_share() -> None:
    session = make_session(build("residual"))
    full, uniform = session.editor.widths, uniform_widths(session)
    assert session.fits(uniform)
    shares = [uniform[name] / full[name] for name in uniform]
    assert max(shares) - min(shares) < 0.2
    for name in uniform:
        wider = {**uniform, name: uniform[name] + 1}
        assert uniform[name] == full[name] or not session.fits(wider), "rounding's leftover is spent"


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
def test_uniform_widths_are_multiples_within_bounds(round_to: int) -> None:
    session = make_session(build("residual"), round_to=round_to, budget=rc.Budget(macs=0.7))
    floor, uniform = floor_widths(session.editor, round_to), uniform_widths(session)
    for group in session.editor.editable:
        width = uniform[group.name]
        assert floor[group.name] <= width <= group.width
        assert width % round_to == 0 or width == group.width


def test_the_whole_budget_changes_nothing() -> None:
    session = make_session(build("residual"), budget=rc.Budget(macs=1.0))
    assert uniform_widths(session) == {g.name: g.width for g in session.editor.editable}


def test_leftovers_go_where_they_are_wanted_most() -> None:
    session = make_session(build("residual"))
    start = {g.name: 2 for g in session.editor.editable}
    caps = {g.name: g.width for g in session.editor.editable}
    order = sorted(start, reverse=True)
    filled = fill_budget(session, start, caps, order=order)
    assert session.fits(filled)
    assert filled[order[0]] == caps[order[0]], "the most wanted group is served first"
    assert filled[order[0]] / caps[order[0]] > filled[order[-1]] / caps[order[-1]]


def test_rounding_is_to_the_nearest_multiple_within_bounds() -> None:
    assert [rounded(w, 4, 4, 16) for w in (0.0, 5.9, 6.1, 15.0, 40.0)] == [4, 4, 8, 16, 16]
    assert rounded(12.0, 8, 8, 12) == 12


@pytest.mark.parametrize(
    "wrong",
    [{"pretrain": 1.0}, {"pretrain": -0.1}, {"pretrain": float("nan")}, {"pretrain": "a"}, {"finetune_lr": 0.0}],
    ids=str,
)
def test_bad_options_are_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError, match=f"{name}={value!r}"):
        rc.Magnitude(**wrong)


def test_the_cut_comes_where_the_options_say() -> None:
    session = make_session(build("chain"), epochs=4.0)
    rc.Magnitude(pretrain=0.25).run(session)
    phases = [(r["phase"], r.get("steps")) for r in session.history if r.get("event") or r["phase"] != "pretrain"]
    assert phases[0] == ("prune", None)
    assert sum(r["steps"] for r in session.history if r["phase"] == "pretrain") == 3
    assert max(r["steps"] for r in session.history if r["phase"] == "finetune") == 9
