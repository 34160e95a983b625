"""What single searchers are for: evolution ages, the rule rules, Optuna is optional, all but random learn."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections import Counter

import pytest

from robustcompress.errors import InputError
from robustcompress.search.choices import mutated, seeded
from robustcompress.search.domain import Config
from robustcompress.search.evolution import Evolution
from robustcompress.search.random_search import RandomSearch
from robustcompress.search.rule import Rule
from robustcompress.search.searchers import make_searcher
from tests.search.domains import staged, uneven

GOAL = (7, 2, 6, 3, 1, 2)


def closeness(config: Config) -> float:
    return -statistics.fmean((a - b) ** 2 for a, b in zip(config, GOAL, strict=True)) / 64


def test_random_search_is_uniform() -> None:
    searcher = RandomSearch(uneven(), 0)
    counts = Counter(searcher.ask() for _ in range(4800))
    assert len(counts) == 2 * 3 * 1 * 4
    assert all(140 < count < 260 for count in counts.values())  # 200 expected; 14 is one standard deviation


@pytest.mark.parametrize("name", ["reinforce", "evolution", "optuna"])
def test_what_learns_beats_random(name: str) -> None:
    if name == "optuna":
        pytest.importorskip("optuna")

    def late(which: str, seed: int) -> float:
        """The mean reward of the last 30 of 150 proposals."""
        searcher = make_searcher(which, staged(), seed)
        rewards = []
        for _ in range(150):
            config = searcher.ask()
            rewards.append(closeness(config))
            searcher.tell(config, rewards[-1])
        return statistics.fmean(rewards[-30:])

    ours, random = ([late(which, seed) for seed in range(5)] for which in (name, "random"))
    assert statistics.fmean(random) == pytest.approx(-0.19, abs=0.03), "the mean of all configurations"
    assert max(ours) < 0 and min(ours) > -0.09


def test_mutations_change_one_coordinate() -> None:
    domain, generator = uneven(), seeded(0)
    near = 0
    for _ in range(500):
        child = mutated(domain, (1, 1, 0, 2), generator)
        changed = [i for i, (a, b) in enumerate(zip(child, (1, 1, 0, 2), strict=True)) if a != b]
        assert len(changed) == 1 and changed != [2] and child[changed[0]] in range(domain.sizes[changed[0]])
        near += abs(child[changed[0]] - (1, 1, 0, 2)[changed[0]]) == 1
    assert near < 500
    single = staged(1, options=(1.0,))
    assert mutated(single, (0, 0), generator) == (0, 0)


def test_in_evolution_the_old_die_however_good() -> None:
    searcher = Evolution(staged(), 0, population=3, sample=30)
    for _ in range(3):
        searcher.ask()
    best = (8,) * 6
    searcher.tell(best, 1.0)
    assert sum(a != b for a, b in zip(searcher.ask(), best, strict=True)) == 1, "the best of the living is the parent"
    young = (0,) * 6
    for _ in range(3):
        searcher.tell(young, -0.5)
    assert sum(a != b for a, b in zip(searcher.ask(), young, strict=True)) == 1


def test_the_rule_keeps_the_depth_and_narrows_the_last_stage() -> None:
    domain = staged()
    shares = domain.shares(Rule(domain, 0).ask())
    assert shares.pop((2, "width")) == 0.375, "of the eighths the one nearest to 0.4"
    assert set(shares.values()) == {1.0}
    assert Rule(uneven(), 0).ask() == (1, 2, 0, 1)
    assert Rule(staged(1), 0).ask() == staged(1).whole, "in one stage there are no others to be compared with"


def test_without_optuna_its_searcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'robustcompress\[search\]'"):
        make_searcher("optuna", staged(), 0)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna")
def test_optuna_neither_talks_nor_changes_its_settings(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    searcher = make_searcher("optuna", staged(), 0)
    for _ in range(15):
        config = searcher.ask()
        searcher.tell(config, closeness(config))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
