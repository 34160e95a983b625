"""A search that looks at itself is the search that does not, bit for bit; and what it sees is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.data import Batches
from robustcompress.diagnostics import look_at_search
from robustcompress.diagnostics import search as module
from robustcompress.robust.objectives import PGDAT, TRADES
from robustcompress.structure.masks import TopK
from tests.strategies.nets import QUICK_RECIPE, build, make_session, same, small_data, state
from tests.strategies.test_resume import assert_equal, until_finished
from tests.train.test_ascent import Whole

SEEN = {"top_eigenvalue", "sharpness", "sharpness_gamma", "sharpness_flips", "mask_clean", "mask_robust"}
TIMED = {"images_per_s"}


def strategy(name: str, granularity: str, *, diagnose: bool) -> rc.Strategy:
    host = rc.Hydra(search=0.5, pretrain=0.25, score_lr=0.1, granularity=granularity, diagnose=diagnose)  # type: ignore[arg-type]
    return host if name == "hydra" else rc.S2AP(host=host, flips=0.05)


def compress(chosen: rc.Strategy, **settings: Any) -> rc.CompressResult:
    defaults: dict[str, Any] = {
        "data": small_data(),
        "epochs": 6.0,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "budget": rc.Budget(density=0.2) if chosen.granularity == "weight" else rc.Budget(macs=0.5),
        "attacks": (),
        "progress": False,
    }
    return rc.compress(build("imported"), chosen, **(defaults | settings))  # dropout: the global generator counts


def without(history: Iterable[Mapping[str, Any]], keys: set[str]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in keys} for record in history]


@pytest.mark.parametrize("name", ["hydra", "s2ap"])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("objective", [PGDAT(steps=1, attack_mode="train"), TRADES(steps=1)], ids=lambda o: o.name)
def test_looking_changes_nothing(name: str, granularity: str, objective: Any) -> None:
    blind, seeing = (
        compress(strategy(name, granularity, diagnose=diagnose), objective=objective) for diagnose in (False, True)
    )
    assert same(state(blind.model), state(seeing.model)) and blind.edits == seeing.edits
    assert without(blind.history, TIMED) == without(seeing.history, TIMED | SEEN)
    assert not any(SEEN & record.keys() for record in blind.history)
    searched = [record for record in seeing.history if record["phase"] == "search" and "epoch" in record]
    assert len(searched) == 3
    for record in searched:
        assert record.keys() >= SEEN
        assert all(math.isfinite(record[key]) for key in SEEN)
        assert 0 <= record["mask_robust"] <= 1 and 0 <= record["mask_clean"] <= 1
        assert record["sharpness_flips"] > 0
    assert len({record["top_eigenvalue"] for record in searched}) > 1


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_a_run_stopped_after_every_epoch_saw_what_one_that_was_not_saw(granularity: str, tmp_path: Path) -> None:
    chosen = strategy("s2ap", granularity, diagnose=True)
    whole = compress(chosen)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: compress(chosen, **kept), rc.OutOfTime)
    assert stops >= 5
    assert_equal(resumed, whole)


def test_it_looks_at_the_mask_that_is_there() -> None:
    """The accuracies are those of the network without the rejected channels, with statistics re-estimated for it."""
    session = make_session(build("residual"), epochs=8.0)
    session.train("before", share=1.0)
    session.settle()
    scores = {g.name: torch.rand(g.width) for g in session.editor.editable}
    half = TopK(lambda values: {name: len(s) // 2 for name, s in values.items()})
    session.model.bn1.eval()
    before, modes = state(session.model), [m.training for m in session.model.modules()]
    drawn = torch.get_rng_state()
    with session.editor.gates(scores, half) as gates:
        record = look_at_search(session, gates)
        again = look_at_search(session, gates)
        kept = gates.kept()
    assert record == again and record.keys() == SEEN
    assert same(before, state(session.model)) and torch.equal(drawn, torch.get_rng_state())
    assert modes == [m.training for m in session.model.modules()]
    for name, bits in kept.items():
        session.editor.prune(name, bits.nonzero().flatten().tolist())
    batches = Batches(
        session.goal.data.train, 32, augment="crop", generator=torch.Generator().manual_seed(0), drop_last=True
    )
    torch.optim.swa_utils.update_bn(batches, session.model)
    assert (record["mask_clean"], record["mask_robust"]) == session.validate()


def test_without_validation_images_there_is_no_accuracy() -> None:
    recipe = rc.Recipe(batch_size=32, val_images=0)
    session = make_session(build("chain"), recipe=recipe, pretrained=True, epochs=2.0)
    rc.Hydra(search=0.5, pretrain=0.0, diagnose=True).run(session)
    searched = next(record for record in session.history if record["phase"] == "search")
    assert {"mask_clean", "mask_robust"}.isdisjoint(searched) and "top_eigenvalue" in searched


def test_what_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.diagnostics import Eigenvalue

    monkeypatch.setattr(module, "top_eigenvalue", lambda *_, **__: Eigenvalue(value=math.nan, residual=0.0, steps=1))
    session = make_session(build("chain"), pretrained=True, epochs=2.0)
    rc.Hydra(search=0.5, pretrain=0.0, diagnose=True).run(session)
    searched = next(record for record in session.history if record["phase"] == "search")
    assert "top_eigenvalue" not in searched and "sharpness" in searched


def test_what_it_cannot_do_is_said_before_any_training() -> None:
    session = make_session(build("chain"), objective=Whole())
    with pytest.raises(rc.InputError, match=r"'whole' cannot be split.*diagnose"):
        rc.Hydra(diagnose=True).run(session)
    assert session.history == []
    with pytest.raises(rc.InputError, match="diagnose='yes'"):
        rc.Hydra(diagnose="yes")  # type: ignore[arg-type]
