"""What every searcher does, by its mere being in SEARCHERS."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustcompress.errors import InputError
from robustcompress.search.domain import Config, Domain
from robustcompress.search.searcher import Searcher
from robustcompress.search.searchers import SEARCHERS, make_searcher
from tests.search.domains import staged, typed, uneven

OPTUNA = importlib.util.find_spec("optuna") is not None
every = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.skipif(n == "optuna" and not OPTUNA, reason="optuna")) for n in SEARCHERS],
)
shapes = pytest.mark.parametrize("make", [staged, uneven, typed], ids=["staged", "uneven", "typed"])


def reward(config: Config) -> float:
    return -sum((option - 1) ** 2 for option in config) / 100


def run(searcher: Searcher, steps: int, *, flying: int = 1, shuffle: int | None = None) -> list[Config]:
    """Ask and tell with so many asks in flight; told in order, or shuffled."""
    dice = None if shuffle is None else random.Random(shuffle)
    asked: list[Config] = []
    for _ in range(steps):
        batch = [searcher.ask() for _ in range(flying)]
        asked += batch
        for config in batch if dice is None else dice.sample(batch, len(batch)):
            searcher.tell(config, reward(config))
    return asked


def carried(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint carries a state: tensors by themselves, the rest through JSON."""
    tensors = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = json.dumps({key: value for key, value in state.items() if key not in tensors}, allow_nan=False)
    return {**tensors, **json.loads(plain)}


@every
@shapes
def test_proposals_are_of_the_domain(name: str, make: Callable[[], Domain]) -> None:
    domain = make()
    searcher = make_searcher(name, domain, 0)
    assert isinstance(searcher, Searcher)
    for config in run(searcher, 40):
        assert isinstance(config, tuple) and len(config) == len(domain.sizes)
        assert all(type(o) is int and 0 <= o < size for o, size in zip(config, domain.sizes, strict=True))


@every
def test_the_same_seed_proposes_the_same(name: str) -> None:
    before = torch.get_rng_state(), random.getstate()
    first, again, other = (run(make_searcher(name, staged(), seed), 40) for seed in (3, 3, 4))
    assert first == again
    assert (first == other) == (name == "rule")
    assert bool((torch.get_rng_state() == before[0]).all()) and random.getstate() == before[1]


@every
@shapes
@pytest.mark.parametrize("steps", [1, 7, 33])
def test_a_state_goes_on_bit_exactly(name: str, make: Callable[[], Domain], steps: int) -> None:
    whole = make_searcher(name, make(), 5)
    run(whole, steps, flying=2)
    flying = [whole.ask() for _ in range(3)]
    part = make_searcher(name, make(), 5)
    run(part, 3)  # whatever it did before is forgotten
    part.load_state_dict(carried(whole.state_dict()))
    for searcher in (whole, part):
        for config in reversed(flying):
            searcher.tell(config, reward(config))
    assert run(part, 25, flying=3, shuffle=1) == run(whole, 25, flying=3, shuffle=1)
    left, right = whole.state_dict(), part.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key], key


@every
def test_a_state_is_a_copy(name: str) -> None:
    searcher = make_searcher(name, staged(), 5)
    run(searcher, 12)
    state = searcher.state_dict()
    kept = carried(state)
    first = run(searcher, 12)
    searcher.load_state_dict(kept)
    assert run(searcher, 12) == first
    searcher.load_state_dict(carried(state))
    assert run(searcher, 12) == first


@every
@pytest.mark.parametrize("flying", [2, 8, 30])
def test_asks_may_be_in_flight_and_told_in_any_order(name: str, flying: int) -> None:
    run(make_searcher(name, staged(), 0), 5, flying=flying, shuffle=0)
    searcher = make_searcher(name, staged(), 0)
    lost = [searcher.ask() for _ in range(7)]  # never told
    assert len(lost) + len(run(searcher, 10)) == 17


@every
def test_it_takes_what_it_did_not_propose_and_what_is_not_possible(name: str) -> None:
    searcher = make_searcher(name, staged(), 0)
    searcher.tell(staged().whole, -1.0)
    searcher.tell(staged().whole, 0.5)
    for _ in range(12):
        searcher.tell(searcher.ask(), -1.0)


@every
def test_nonsense_is_refused(name: str) -> None:
    searcher = make_searcher(name, staged(), 0)
    config = searcher.ask()
    with pytest.raises(InputError, match=r"reward=nan: must be finite"):
        searcher.tell(config, math.nan)
    with pytest.raises(InputError, match="has 2 options; the domain has 6"):
        searcher.tell((0, 0), 0.5)
    with pytest.raises(InputError, match=r"config\[5\]=9: that coordinate has options 0 to 8(.|\n)*reward=inf"):
        searcher.tell((0, 0, 0, 0, 0, 9), math.inf)
    with pytest.raises(InputError, match=r"config\[0\]=-1"):
        searcher.tell((-1, 0, 0, 0, 0, 0), 0.5)


def test_names_and_options_are_checked_at_once() -> None:
    with pytest.raises(InputError, match="did you mean 'evolution'"):
        make_searcher("evolutoin", staged(), 0)
    with pytest.raises(InputError, match=r"evolution has no option 'populations'; did you mean 'population'"):
        make_searcher("evolution", staged(), 0, populations=3)
    empty = Domain((), (), staged().task)
    with pytest.raises(InputError, match=r"random has no option 'x'; it has none(.|\n)*nothing to choose"):
        make_searcher("random", empty, 0, x=3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("evolution", {"population": 0, "sample": 0}, r"population=0: must be at least 1(.|\n)*sample=0"),
        ("reinforce", {"update_every": 0}, "update_every=0: must be at least 1"),
        ("reinforce", {"lr": -1.0, "entropy": math.nan}, r"lr=-1.0(.|\n)*entropy=nan"),
        ("reinforce", {"stall": "restrat", "baseline": 1.0}, r"did you mean 'restart'(.|\n)*baseline=1.0: must be in"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_searcher(name, staged(), 0, **options)
