"""Practice on real tasks: what a task rewards is what the strategy rewards, and a policy learns from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.practice import SearchTask
from robustcompress.search.policy import Policy

SETTINGS: dict[str, Any] = {
    "data": rc.load_data("digits", image_size=16, train_limit=200),
    "recipe": rc.Recipe(batch_size=32, val_images=20),
    "objective": "fgsm-rs",
    "epochs": 2,
    "progress": False,
}
MODEL = rc.ModelSpec("resnet8", {"stem_stride": 2, "width": 0.5})
FEW = rc.RCNAS(evaluations=6, finalists=1, recovery_steps=1, searcher="random")


@pytest.fixture(scope="module")
def task() -> SearchTask:
    return rc.search_task(MODEL, FEW, budget=0.5, **SETTINGS)


def test_it_rewards_what_the_strategy_rewards(task: SearchTask) -> None:
    """A run of the strategy with the same settings looks at the same teacher's networks."""
    result = rc.compress(MODEL, FEW, budget=0.5, attacks=(), **SETTINGS)
    found = [record for record in result.history if record.get("event") == "candidate"]
    twin = rc.search_task(MODEL, FEW, budget=0.5, **SETTINGS)
    assert len(found) == 6
    assert [twin.reward(tuple(record["config"])) for record in found] == [record["reward"] for record in found]


def test_a_network_is_evaluated_once(task: SearchTask) -> None:
    config = task.domain.whole
    before = len(task.outcomes)
    assert task.reward(config) == task.reward(config)
    assert len(task.outcomes) == before + 1


def test_a_policy_learns_is_written_and_begins_a_search(task: SearchTask, tmp_path: Path) -> None:
    drawn = torch.get_rng_state()
    path = tmp_path / "policy.safetensors"
    policy = rc.train_policy({"only": task}, rounds=3, choices=2, seed=4, out=path)
    assert torch.equal(drawn, torch.get_rng_state())
    loaded = Policy.load(path)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))
    again = rc.train_policy({"only": task}, rounds=3, choices=2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    assert not torch.equal(policy.width.bias, Policy(seed=4).width.bias)
    further = rc.train_policy({"only": task}, rounds=1, start=path)
    assert not torch.equal(further.width.bias, policy.width.bias)
    result = rc.compress(MODEL, rc.RCNAS(evaluations=3, recovery_steps=1, policy=path), attacks=(), **SETTINGS)
    assert result.after.macs <= result.before.macs / 2


def test_it_learns_what_is_rewarded(task: SearchTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle: where narrow first stages alone are rewarded, the trained policy proposes them."""
    place = next(i for i, c in enumerate(task.domain.coordinates) if c.kind == "width")
    monkeypatch.setattr(SearchTask, "reward", lambda self, config: -float(config[place]))
    policy = rc.train_policy({"only": task}, rounds=150)
    with torch.no_grad():
        options = policy(task.domain)[place].exp()
    assert float(options[:3].sum()) > 0.6


def test_nonsense_is_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(rc.InputError) as refused:
        rc.train_policy({"a": 3}, rounds=0, choices=True, out=tmp_path / "no" / "p.safetensors")  # type: ignore[dict-item]
    for word in ("tasks['a'] is a int", "rounds=0", "choices=True", "there is no directory"):
        assert word in str(refused.value)
    with pytest.raises(rc.InputError, match="tasks is empty"):
        rc.train_policy({})
    with pytest.raises(rc.InputError, match="give an RCNAS"):
        rc.search_task(MODEL, rc.Hydra(), **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(rc.InputError, match=r"(?s)penalties change.*latency cannot be limited"):
        rc.search_task(MODEL, rc.RCNAS(feasibility="penalty"), budget=rc.Budget(latency=0.5), **SETTINGS)
    with pytest.raises(rc.InputError, match="is a directory"):
        rc.train_policy({}, out=tmp_path)
