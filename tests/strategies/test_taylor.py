"""Taylor: the scores are first-order costs of removal, against the sums of weights times gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import robustcompress as rc
from robustcompress.robust.attacks import eval_mode
from robustcompress.strategies.taylor import taylor_scores
from robustcompress.strategies.units import granular
from robustcompress.structure.kinds import slots_of
from robustcompress.structure.weights import maskable_weights
from tests.strategies.nets import build, make_session, same, state


def gradients(session: Any, batches: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for x, y in session.attacked(batches):
        with eval_mode(session.model):
            session.model.zero_grad()
            F.cross_entropy(session.model(x), y).backward()
        found.append({n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("net", ["chain", "residual", "joined", "imported"])
def test_a_channels_score_sums_weights_times_gradients_over_all_that_reads_it(net: str) -> None:
    session, twin = (make_session(build(net)) for _ in range(2))
    before = state(session.model)
    scores = taylor_scores(session, granular(session, granularity="channel"), batches=2)
    assert same(state(session.model), before)
    slopes = gradients(twin, 2)
    for group in twin.editor.editable:
        squares = torch.zeros(group.width)
        for batch in slopes:
            total = torch.zeros(group.width)
            for axis in group.readers:
                module = twin.model.get_submodule(axis.module)
                dim = dict(slots_of(module, axis.side))["weight"]
                product = module.get_parameter("weight").detach() * batch[f"{axis.module}.weight"]
                sums = product.movedim(dim, 0).flatten(1).sum(1)
                owners = twin.editor.layout.owners(axis, group.name, twin.editor.widths)
                total.index_add_(0, owners[owners >= 0], sums[owners >= 0])
            squares += total.square()
        assert torch.allclose(scores[group.name], (squares / 2).sqrt(), atol=1e-5), group.name


def test_a_weights_score_is_its_product_with_the_gradient() -> None:
    budget = rc.Budget(density=0.1)
    session, twin = (make_session(build("residual"), budget=budget) for _ in range(2))
    scores = taylor_scores(session, granular(session, granularity="weight"), batches=3)
    slopes = gradients(twin, 3)
    for name, weight in maskable_weights(twin.model).items():
        squares = torch.stack([(weight.detach() * batch[name]).square() for batch in slopes]).mean(0)
        assert torch.allclose(scores[name], squares.sqrt(), atol=1e-6), name


def test_channels_that_nothing_feels_go_first() -> None:
    session = make_session(build("chain"), pretrained=True, epochs=1.0)
    dead = {1, 4, 5}
    with torch.no_grad():
        for channel in dead:
            session.model.conv3.weight[:, channel] = 0  # what reads it ignores it
            session.model.conv2.weight[channel] *= 100  # by its norm it would stay
    rc.Taylor(pretrain=0.0).run(session)
    kept = next(edit.sources for edit in session.editor.edits if edit.group == "conv2")
    assert not dead & set(kept)
    assert session.history[0] == {"phase": "prune", "event": "scores", "scores": 8}


def test_bad_options_are_named() -> None:
    with pytest.raises(rc.InputError, match="score_batches=0"):
        rc.Taylor(score_batches=0)
