"""A configuration is a shape; what it stands for keeps the budget, and is what the editor makes of it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import robustcompress as rc
from robustcompress.models.vit import Block
from robustcompress.robust.attacks import eval_mode
from robustcompress.search.dressed import Dressed
from robustcompress.search.evaluate import Evaluator, Job
from robustcompress.search.rule import Rule
from robustcompress.search.space import Architecture, Space
from robustcompress.search.stages import alive, block_influence, discover, find_stages
from robustcompress.session import Session
from robustcompress.shapes import uniform_widths
from tests.search.domains import task
from tests.strategies.nets import build, make_session

NAMES = ("residual", "joined", "transformer", "resnet", "wrn", "mobilenet", "vit")


def network(name: str) -> nn.Module:
    if name == "resnet":
        return rc.build_model("resnet8", num_classes=10, width=0.5)[0]
    if name == "wrn":
        return rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0]
    if name == "mobilenet":
        return rc.build_model("mobilenet_v2", num_classes=10, width=0.25)[0]
    if name == "vit":
        return rc.build_model("vit_micro", num_classes=10)[0]
    return build(name)


@functools.cache
def base(name: str) -> Session:
    return make_session(network(name))


def space_of(session: Session, **options: Any) -> Space:
    return Space(session, discover(session, session.editor.bypassable), session.editor.bypassable, task(), **options)


@functools.cache
def space(name: str) -> Space:
    return space_of(base(name))


def made(session: Session, architecture: Architecture) -> nn.Module:
    editor = session.editor.fork()
    for block in architecture.bypassed:
        editor.bypass(block)
    for name, width in architecture.widths.items():
        editor.resize(name, range(width))
    return editor.model


def configs(space: Space) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(0, len(coordinate.options) - 1) for coordinate in space.domain.coordinates))


@settings(max_examples=14, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(NAMES), share=st.floats(0.3, 0.95), data=st.data())
def test_whatever_is_asked_for_the_budget_is_kept_and_used(name: str, share: float, data: st.DataObject) -> None:
    known = base(name)
    session = make_session(known.model, budget=rc.Budget(macs=share))
    session.editor = known.editor  # traced once
    found = space_of(session)
    config = data.draw(configs(found))
    architecture = found.project(config)
    model = made(session, architecture)
    images = torch.zeros(2, *session.goal.data.image_shape)
    cost = rc.measure(model, images[:1])
    macs, params = session.cost_model.predict(architecture.widths, without=architecture.bypassed)
    assert cost.params == round(params) and cost.macs <= macs <= 1.01 * cost.macs  # what pools is counted as it was
    assert cost.macs <= share * rc.measure(session.model, images[:1]).macs
    with eval_mode(model), torch.no_grad():
        assert model(images).isfinite().all()
    full = session.editor.widths
    for group, width in architecture.widths.items():  # nothing fits beside it
        wider = {**architecture.widths, group: width + 1}
        if width < full[group] and session.editor.groups[group].kind != "heads":
            assert not session.fits(wider, without=architecture.bypassed)


@pytest.mark.parametrize("name", NAMES)
def test_all_blocks_at_equal_widths_are_uniform_scaling(name: str) -> None:
    found = space(name)
    architecture = found.project(found.domain.whole)
    assert architecture.bypassed == ()
    assert architecture.widths == uniform_widths(base(name))


@pytest.mark.parametrize("name", ["resnet", "wrn", "residual"])
def test_the_rule_is_that_of_the_scaling_strategy(name: str) -> None:
    session = make_session(network(name), epochs=0.1)
    found = space_of(session)
    assert found.staged
    ruled = found.project(Rule(found.domain, 0).ask())
    rc.Scaling().run(session)
    assert ruled.widths == {group.name: group.width for group in session.editor.editable}


def test_stages_are_resolutions_and_blocks_belong_to_theirs() -> None:
    stages = discover(base("wrn"), base("wrn").editor.bypassable)
    assert [stage.name for stage in stages] == ["16x16", "8x8", "4x4"]
    assert [stage.stride for stage in stages] == [1, 2, 2]
    assert [stage.blocks for stage in stages] == [("layers.0.1",), ("layers.1.1",), ("layers.2.1",)]
    assert [stage.depth for stage in stages] == [2, 2, 2]
    everything = {group.name for group in base("wrn").editor.editable}
    assert sorted(name for stage in stages for name in stage.groups) == sorted(everything)
    assert set(find_stages(base("wrn"))) == {stage.name for stage in stages}


def test_a_network_of_one_resolution_has_a_width_for_each_group_and_one_depth() -> None:
    stages = discover(base("vit"), base("vit").editor.bypassable)
    assert stages[0].groups == () and stages[0].blocks == base("vit").editor.bypassable
    assert [stage.groups for stage in stages[1:]] == [(group.name,) for group in base("vit").editor.editable]
    assert not space("vit").staged
    kinds = [coordinate.kind for coordinate in space("vit").domain.coordinates]
    assert kinds[0] == "depth" and set(kinds[1:]) == {"width"}


class Stemmed(nn.Module):
    """Attention behind a stem of convolutions of two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(16, 4, 6, 32), Block(16, 4, 6, 32))
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.conv1(x))).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(x)).mean(1))


def test_blocks_behind_a_stem_of_convolutions_can_leave_too() -> None:
    session = make_session(Stemmed())
    order = session.editor.bypassable
    stages = discover(session, order)
    assert sorted(name for stage in stages for name in stage.blocks) == ["blocks.0", "blocks.1"] == sorted(order)
    inner = [stage for stage in stages if stage.groups and stage.groups[0].startswith("blocks")]
    assert len(inner) == 4 and all(len(stage.groups) == 1 for stage in inner)
    found = Space(session, stages, order, task())
    assert not found.staged and sum(c.kind == "depth" for c in found.domain.coordinates) == 1


def test_equal_multipliers_are_one_network_whatever_they_are() -> None:
    found = space("wrn")
    widths = [i for i, coordinate in enumerate(found.domain.coordinates) if coordinate.kind == "width"]
    config = list(found.domain.whole)
    for level in range(9):
        for place in widths:
            config[place] = level
        assert found.project(tuple(config)).key == found.project(found.domain.whole).key


def test_blocks_leave_in_the_order_given_and_their_groups_with_them() -> None:
    session = make_session(network("wrn"), budget=rc.Budget(macs=0.2))
    order = session.editor.bypassable[::-1]
    found = Space(session, discover(session, order), order, task())
    none = tuple(0 if c.kind == "depth" else len(c.options) - 1 for c in found.domain.coordinates)
    architecture = found.project(none)
    assert set(architecture.bypassed) == set(order)
    inner = {group.name for group in session.editor.editable} - set(architecture.widths)
    assert inner and all(name.startswith(order) for name in inner)
    assert alive(session, inner, order) == [] and set(alive(session, inner, ())) == inner


@pytest.mark.parametrize(("share", "left"), [(0.95, 0), (0.7, 1), (0.2, 3)])
def test_blocks_come_back_where_the_budget_would_lie_idle(share: float, left: int) -> None:
    session = make_session(network("wrn"), budget=rc.Budget(macs=share))
    order = session.editor.bypassable[::-1]
    found = Space(session, discover(session, order), order, task())
    none = tuple(0 if c.kind == "depth" else len(c.options) - 1 for c in found.domain.coordinates)
    gone = found.project(none).bypassed
    assert len(gone) == left and sorted(gone) == sorted(order[:left]), "who left last comes back first"
    full = session.editor.widths
    assert not session.fits(full, without=gone)
    assert session.fits(full, without=order[: left + 1]) or left == len(order)


def test_multipliers_can_be_taken_as_they_are() -> None:
    found = space("wrn")
    full = base("wrn").editor.widths
    whole = found.literal(found.domain.whole)
    assert whole.widths == {group.name: full[group.name] for group in base("wrn").editor.editable}
    least = found.literal(tuple(0 if c.kind == "width" else 1 for c in found.domain.coordinates))
    for name, width in least.widths.items():
        assert width == max(base("wrn").editor.groups[name].min_width, round(0.2 * full[name]))


def test_influence_is_how_much_a_block_changes_its_input() -> None:
    session = base("wrn")
    blocks = session.editor.bypassable
    images = torch.rand(4, *session.goal.data.image_shape, generator=torch.Generator().manual_seed(0))
    found = block_influence(session.model, blocks, images)
    with eval_mode(session.model), torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = session.model.get_submodule(blocks[0]).register_forward_hook(
            lambda _, args, output: seen.extend([args[0].clone(), output.clone()])
        )
        session.model(images)
        handle.remove()
    before, after = seen
    wanted = torch.stack([(b - a).norm() / a.norm() for a, b in zip(before, after, strict=True)]).mean()
    assert found[blocks[0]] == pytest.approx(float(wanted), rel=1e-5)


KINDS = ("se", "rir")


@functools.cache
def dressed(name: str, share: float) -> tuple[Session, Dressed, Space]:
    session = make_session(network(name), budget=rc.Budget(macs=share))
    with torch.no_grad():
        network_ = Dressed(session, KINDS)
    order, sites = session.editor.bypassable, session.editor.insertable
    return session, network_, Space(network_, discover(network_, order, sites), order, task(), kinds=KINDS)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["resnet", "wrn"]), share=st.sampled_from([0.4, 0.7, 0.95]), data=st.data())
def test_with_types_the_budget_is_kept_and_what_is_looked_at_is_what_is_built(
    name: str, share: float, data: st.DataObject
) -> None:
    session, network_, found = dressed(name, share)
    config = data.draw(configs(found))
    architecture = found.project(config)
    kinds = {
        found.stages[c.stage].name: o
        for c, o in zip(found.domain.coordinates, config, strict=True)
        if c.kind == "block"
    }
    wanted = {
        (site, ("rir", "se")[kinds[stage.name]])
        for stage in found.stages
        for site in stage.sites
        if kinds[stage.name] < 2 and site not in architecture.bypassed
    }
    assert set(architecture.inserted) == wanted and found.fits(architecture)
    editor = session.editor.fork()
    for block in architecture.bypassed:
        editor.bypass(block)
    editor.insert_all(architecture.inserted)
    assert set(architecture.widths) == {group.name for group in editor.editable}
    for group, width in architecture.widths.items():
        editor.resize(group, range(width))
    images = torch.zeros(1, *session.goal.data.image_shape)
    cost = rc.measure(editor.model, images)
    without = (*architecture.bypassed, *network_.lacking(architecture.inserted))
    macs, params = network_.costs.predict(architecture.widths, without=without)
    assert cost.params == round(params) and cost.macs <= macs <= 1.01 * cost.macs
    assert cost.macs <= share * rc.measure(session.model, images).macs


def test_plain_blocks_are_the_space_without_types_and_types_are_options_like_others() -> None:
    session, _, found = dressed("wrn", 0.7)
    plain = space_of(session)
    assert [c.kind for c in found.domain.coordinates] == ["depth", "width", "block"] * 3
    assert [stage.sites for stage in found.stages] == [(f"layers.{i}.0", f"layers.{i}.1") for i in range(3)]
    for level in range(9):
        whole = (1, level, 1, 8, 0, 8)
        typed_ = tuple(option for i in range(3) for option in (*whole[2 * i : 2 * i + 2], 2))
        ours, theirs = found.project(typed_), plain.project(whole)
        assert ours == theirs and ours.key == theirs.key and ours.to_json() == theirs.to_json()
        assert found.literal(typed_) == plain.literal(whole)
    assert found.project(Rule(found.domain, 0).ask()) == plain.project(Rule(plain.domain, 0).ask())
    keys = {found.project((1, 8, a, 1, 8, b, 1, 8, c)).key for a in range(3) for b in range(3) for c in range(3)}
    assert len(keys) == 27
    assert found.share((1, 8, 1, 1, 8, 0, 1, 8, 2), 0) == "depth 1, width 1, block se"


def test_a_candidate_begins_as_the_teacher_whatever_its_types() -> None:
    session, network_, found = dressed("wrn", 0.95)
    evaluator = Evaluator(session, recovery="distill", lr=0.1, kinds=KINDS)
    images = torch.rand(4, *session.goal.data.image_shape, generator=torch.Generator().manual_seed(0))
    full = network_.editor.widths
    for inserted in ((), (("layers.0.1", "se"),), (("layers.2.0", "rir"), ("layers.1.1", "se"))):
        model = evaluator._inherit(Architecture((), {}, inserted))
        with torch.no_grad(), eval_mode(model), eval_mode(session.model):
            assert torch.equal(model(images), session.model(images))
        parts = [
            name
            for name, module in model.named_modules()
            if name.endswith((".se", ".rir")) and len(list(module.children()))
        ]
        assert parts == sorted(network_.parts[pick] for pick in inserted)
    architecture = found.project((0, 3, 1, 1, 5, 0, 1, 8, 2))
    assert "layers.0.1" in architecture.bypassed or ("layers.0.1", "se") in architecture.inserted
    outcome = evaluator.evaluate(Job(architecture, 1, 1, 0))
    assert (
        outcome.macs <= 0.95 * session.cost_model.predict(session.editor.widths)[0] and full == network_.editor.widths
    )
