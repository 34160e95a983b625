"""Searches on tables of measured networks: the strategy's own order of looks, and honest scores."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest
import torch

from benchmarks import search_policies, search_tasks
from benchmarks.search_meta import by_teacher
from benchmarks.search_policies import child, trained, unseen
from benchmarks.search_table import Task, best_so_far, by_rank, likeness, look, ranks, spread, standard, task_of
from robustcompress.search.policy import Policy
from robustcompress.search.searchers import make_searcher


def rows(seed: int = 0, *, budget: float = 0.5, flip: bool = False) -> dict[str, Any]:
    """A made-up table: 2 x 3 x 3 configurations, of which several are one network; narrow last stages are better."""
    dice = random.Random(seed)
    configs = [(a, b, c) for a in range(2) for b in range(3) for c in range(3)]
    shapes = [(a, b - c) for a, b, c in configs]  # widths count up to one factor
    networks = list(dict.fromkeys(shapes))
    worth = [0.5 + 0.05 * (-b if flip else b) + 0.02 * a for a, b in networks]
    first = [[0.9, value + dice.gauss(0, 0.005)] for value in worth]
    second = [[0.9, value] if value >= statistics.median(worth) else None for value in worth]
    return {
        "data": "digits",
        "network": "resnet8",
        "eps": 16,
        "budget": budget,
        "task": {
            "budget": budget,
            "macs": 1e6,
            "classes": 10,
            "attack": "pgd",
            "eps": 16 / 255,
            "clean": 0.95,
            "robust": 0.8,
            "lipschitz": 90.0,
        },
        "tokens": [{"stride": 1.0 + i, "depth": 2.0, "width": 16.0 * 2**i, "robust_block": 0.0} for i in range(2)],
        "coordinates": [
            {"stage": 0, "kind": "depth", "options": [0.0, 1.0]},
            {"stage": 0, "kind": "width", "options": [0.2, 0.6, 1.0]},
            {"stage": 1, "kind": "width", "options": [0.2, 0.6, 1.0]},
        ],
        "networks": [str(shape) for shape in networks],
        "configs": [networks.index(shape) for shape in shapes],
        "looks": [first, second],
    }


@pytest.fixture
def task() -> Task:
    return task_of(rows(), "pgd")


def test_the_reward_is_that_of_the_strategy(task: Task) -> None:
    clean, robust = rows()["looks"][0][3]
    assert task.first[3] == pytest.approx((robust / 0.8) ** 0.7 * (clean / 0.95) ** 0.3)
    assert task_of(rows(), "clean").first == pytest.approx([0.9 / 0.95] * len(task.first))


def test_configurations_lead_to_their_networks(task: Task) -> None:
    assert task.number((0, 0, 0)) == task.number((0, 2, 2)) == 0
    assert task.number((1, 2, 0)) == [str(s) for s in rows()["networks"]].index("(1, 2)")


@pytest.mark.parametrize("name", ["random", "evolution", "reinforce"])
def test_a_search_looks_at_uniform_and_the_rule_and_at_no_network_twice(task: Task, name: str) -> None:
    looked = look(task, make_searcher(name, task.domain, 1), 1, 8)
    assert len(looked) == len(set(looked)) == 8
    assert looked[:2] == [task.number(config) for config in task.starts]
    everything = look(task, make_searcher(name, task.domain, 1), 1, 15)
    assert sorted(everything) == list(range(len(task.first))), "ten networks, and no eleventh"


def test_the_best_is_chosen_by_the_first_look_and_valued_by_the_second(task: Task) -> None:
    looked = [4, 2, 0, 5, 1]
    found = best_so_far(task, looked, 7)
    for place in range(5):
        chosen = max(looked[: place + 1], key=lambda number: task.first[number])
        assert found[place] == task.value[chosen]
    assert found[5:] == [found[4]] * 2
    assert task.exhausted == task.value[task.first.index(max(task.first))]


def test_only_what_may_win_is_looked_at_twice() -> None:
    table = rows()
    assert search_tasks.missing(table, 0) == []
    table["looks"][1] = [None] * len(table["networks"])
    missing = search_tasks.missing(table, 1)
    worth = [search_tasks.reward(found, table["task"], 0.7) for found in table["looks"][0]]
    assert worth.index(max(worth)) in missing
    table["looks"][0][2] = None
    assert search_tasks.missing(table, 0) == [2] and search_tasks.missing(table, 1) == []


def test_spaces_are_designed_evenly() -> None:
    spaces = search_tasks.settings()
    assert len({s.name for s in spaces}) == len(spaces) == 15 and len({s.teacher for s in spaces}) == 10
    assert [sum(s.budget == budget for s in spaces) for budget in (0.5, 0.75)] == [10, 5]
    small, large = ([s for s in spaces if s.eps in radii] for radii in ((4, 16), (8, 32)))
    assert {s.network for s in small} == {s.network for s in large} and abs(len(small) - len(large)) == 1


def test_likeness_is_a_rank_correlation() -> None:
    same, other = (task_of(rows(flip=flip, budget=budget), "pgd") for flip, budget in ((False, 0.5), (True, 0.25)))
    found = likeness([same, other, task_of(rows(), "clean")])
    assert found["budget"]["pairs"] == 1 and found["budget"]["mean"] < -0.5
    assert likeness([same, task_of(rows(seed=1, budget=0.75), "pgd")])["budget"]["mean"] > 0.9
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert spread(same)["networks"] == 10 and spread(same)["noise"] < 1 < spread(same)["spread"]


def test_teachers_are_drawn_whole() -> None:
    """Two teachers of many equal tasks: the interval is that of two values, not of many."""
    values = {f"a{i}": 0.0 for i in range(50)} | {f"b{i}": 1.0 for i in range(50)}
    found = by_teacher(values, {name: name[0] for name in values})
    assert (found["mean"], found["low"], found["high"], found["n"]) == (0.5, 0.0, 1.0, 2)


def test_a_policy_learns_what_the_tables_reward_and_a_blind_one_sees_nothing(task: Task) -> None:
    policy = trained([task], 0, 80)
    with torch.no_grad():
        wide, narrow = (policy(task.domain)[place].exp() for place in (1, 2))
    assert float(wide[2]) > 0.5 > float(wide[0]) and float(narrow[0]) > 0.5 > float(narrow[2])
    other = task_of(rows(budget=0.25), "clean")
    assert unseen(task.domain) == unseen(other.domain) != task.domain


def test_pre_training_touches_the_encoder_alone(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_policies, "STEPS", 3)
    new, taught = Policy(seed=0), Policy(seed=0)
    search_policies.taught(taught, [task], 0)
    moved = {
        name.split(".")[0]
        for (name, a), b in zip(new.named_parameters(), taught.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {"encode", "lstm"}


def test_a_childs_tokens_are_its_own(task: Task) -> None:
    tokens = child(task.domain, (0, 1, 0)).tokens
    assert (tokens[0].depth, tokens[0].width, tokens[1].depth, tokens[1].width) == (1.0, 9.6, 2.0, pytest.approx(6.4))


def test_who_knows_the_other_tasks_looks_at_what_is_good_there(task: Task) -> None:
    """The same table with other noise: the best of it come first, after what always does."""
    twin = task_of(rows(seed=1), "pgd")
    looked = by_rank(task, [twin], 6)
    assert looked is not None and looked[: len(set(looked[:2]))] == list(dict.fromkeys(map(task.number, task.starts)))
    rest = [number for number in looked if number not in map(task.number, task.starts)]
    worth = [statistics.fmean(v for v, n in zip(standard(twin), task.numbers, strict=True) if n == r) for r in rest]
    assert worth == sorted(worth, reverse=True)
    assert by_rank(task, [], 6) is None


def test_what_a_uniform_policy_proposes_is_the_mean_of_the_configurations(task: Task) -> None:
    assert search_policies.proposed(Policy(), task) == pytest.approx(statistics.fmean(standard(task)))
    assert search_policies.proposed(trained([task], 0, 60), task) > statistics.fmean(standard(task)) + 0.5
