"""A candidate is what the editor cuts out of the teacher, and what is said of it is what an attack finds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustcompress as rc
from robustcompress.data import Batches
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.probe import accuracies
from robustcompress.search.evaluate import Evaluator, Job, local_lipschitz
from robustcompress.search.recovery import distilled
from robustcompress.search.space import Architecture, Space
from robustcompress.search.stages import discover
from robustcompress.session import Session
from robustcompress.shapes import uniform_widths
from robustcompress.strategies.base import prune_to
from robustcompress.structure.magnitudes import group_norms
from tests.search.domains import task
from tests.strategies.nets import build, make_session, same, state


@pytest.fixture(scope="module")
def session() -> Session:
    made = make_session(build("residual"), epochs=4.0)
    made.train("teacher", share=1.0)
    made.settle()
    return made


def evaluator(session: Session, workers: int = 1, lr: float = 0.05) -> Evaluator:
    return Evaluator(session, recovery="distill", lr=lr, workers=workers)


def whole(session: Session) -> Architecture:
    return Architecture((), {group.name: group.width for group in session.editor.editable})


def test_without_recovery_it_is_the_cut_teacher_with_new_statistics(session: Session) -> None:
    widths = uniform_widths(session)
    outcome = evaluator(session).evaluate(Job(Architecture((), widths), 0, 10, 7))
    twin = make_session(copy.deepcopy(session.model))
    prune_to(twin, widths, group_norms(twin.editor))
    goal = session.goal
    batches = Batches(
        goal.data.train, 32, augment="crop-flip", drop_last=True, generator=torch.Generator().manual_seed(7)
    )
    layers = [m for m in twin.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    twin.model.train()
    with torch.no_grad():
        for count, (x, _) in enumerate(batches):
            if count < 20:
                twin.model(x)
    for layer in layers:
        layer.momentum = 0.1
    held_out = Batches(goal.data.val.first(goal.recipe.val_images), 32)
    generator = torch.Generator().manual_seed(7)
    clean, robust = accuracies(twin.model, held_out, goal.threat, generator=generator)
    assert (outcome.clean, outcome.robust) == (clean, robust)
    cost = rc.measure(twin.model, torch.zeros(1, *goal.data.image_shape))
    assert (round(outcome.macs), round(outcome.params)) == (cost.macs, cost.params)


def test_looking_changes_nothing_of_the_session(session: Session) -> None:
    before, edits, drawn = state(session.model), session.editor.edits, torch.get_rng_state()
    batches, history = session._batches.epoch, len(session.history)
    evaluator(session).evaluate(Job(Architecture((), uniform_widths(session)), 2, 2, 1))
    assert same(state(session.model), before) and session.editor.edits == edits
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (session._batches.epoch, len(session.history)) == (batches, history)
    assert all(p.requires_grad for p in session.model.parameters())


def test_recovery_recovers(session: Session) -> None:
    architecture = Architecture((), uniform_widths(session))
    judge = evaluator(session)
    losses = []
    for steps in (0, 40):
        network = judge._inherit(architecture)
        batches = Batches(session.goal.data.train, 32, drop_last=True, generator=torch.Generator().manual_seed(0))
        if steps:
            judge._recover(network, batches, steps, torch.Generator().manual_seed(0))
        x, y = session.goal.data.train.as_float(), session.goal.data.train.labels
        with eval_mode(network), torch.no_grad():
            losses.append(float(F.cross_entropy(network(x), y)))
    assert losses[1] < losses[0]


def test_a_candidate_that_diverges_is_worth_nothing_and_ends_no_search(session: Session) -> None:
    outcome = evaluator(session, lr=1e30).evaluate(Job(whole(session), 6, 2, 0))
    assert (outcome.clean, outcome.robust) == (0.0, 0.0) and math.isfinite(outcome.macs)


def test_how_many_are_looked_at_at_a_time_changes_nothing() -> None:
    net = rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0]
    session = make_session(net)
    space = Space(session, discover(session, session.editor.bypassable), session.editor.bypassable, task())
    configs = [space.domain.whole, (0, *space.domain.whole[1:]), (0,) * len(space.domain.whole)]
    jobs = [Job(space.project(config), 2, 2, number) for number, config in enumerate(configs)]
    one, several = evaluator(session).run(jobs), evaluator(session, workers=3).run(jobs)
    assert one == several
    assert len({outcome.params for outcome in one}) == 3


def test_distillation_pulls_the_attacked_student_to_the_clean_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = build("chain", seed=1).eval(), build("chain", seed=2).eval()
    x = torch.rand(6, 3, 16, 16, generator=generator)
    y = torch.randint(10, (6,), generator=generator)
    objective = distilled(teacher, rc.ThreatModel())
    x_adv = objective.attack(student, x, y, rc.ThreatModel(), generator=generator)
    assert 0 < float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    step = objective.loss_on(student, x, x_adv, y)
    with torch.no_grad():
        wanted = teacher(x).softmax(1)
        kl = (wanted * (wanted.log() - student(x_adv).log_softmax(1))).sum(1).mean()
    assert float(step.loss.detach()) == pytest.approx(float(kl), rel=1e-5)
    step.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert float(objective.loss_on(teacher, x, x, y).loss.detach()) == pytest.approx(0, abs=1e-6)


def test_the_lipschitz_constant_of_a_linear_map_is_found() -> None:
    """For f(x) = w x, |f(x') - f(x)| / |x' - x|_inf under an attack that moves all pixels by eps is |w|_1."""

    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 2, bias=False)
            with torch.no_grad():
                self.fc.weight[1] = -self.fc.weight[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))

    net = Map().requires_grad_(False)
    x, y = torch.full((5, 3, 2, 2), 0.5), torch.zeros(5, dtype=torch.long)
    found = local_lipschitz(net, x, y, rc.ThreatModel(), torch.Generator().manual_seed(0))
    assert found == pytest.approx(2 * float(net.fc.weight[0].abs().sum()), rel=1e-4)
    moved = pgd(net, x, y, rc.ThreatModel(norm="l2", eps=0.5), steps=10, generator=torch.Generator().manual_seed(0))
    ratio = ((net(moved) - net(x)).abs().sum(1) / (moved - x).flatten(1).norm(dim=1)).mean()
    found = local_lipschitz(net, x, y, rc.ThreatModel(norm="l2", eps=0.5), torch.Generator().manual_seed(0))
    assert found == pytest.approx(float(ratio), rel=1e-4)
