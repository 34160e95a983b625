"""The policy runs on any domain, interpolates between shares, and its files are checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustcompress.errors import InputError, ResultError
from robustcompress.search.domain import Domain, Token
from robustcompress.search.policy import ATTACKS, Policy, task_vector
from tests.search.domains import EIGHTHS, staged, task, typed, uneven


def stirred(seed: int = 0) -> Policy:
    """A policy that is not uniform."""
    policy = Policy(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


def test_a_new_policy_is_small_uniform_and_seeded() -> None:
    before = torch.get_rng_state()
    policy = Policy(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert sum(p.numel() for p in policy.parameters()) < 40_000
    for log, size in zip(policy(uneven()), uneven().sizes, strict=True):
        assert torch.allclose(log.exp(), torch.full((size,), 1 / size))
    assert torch.equal(policy.mix.weight, Policy(seed=1).mix.weight)
    assert not torch.equal(policy.mix.weight, Policy(seed=2).mix.weight)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_it_runs_on_any_number_of_stages(stages: int) -> None:
    domain = staged(stages)
    with torch.no_grad():
        logs = stirred()(domain)
    assert [len(log) for log in logs] == [9] * (2 * stages)
    assert all(float(log.exp().sum()) == pytest.approx(1) for log in logs)


def test_an_option_takes_the_logit_at_its_share() -> None:
    policy = stirred()
    full = policy(staged())[3]
    shares = (0.0, 0.0625, 0.3, 0.75, 1.0)
    found = policy(staged(options=shares))[3]
    full_logits, where = full.tolist(), [share * 8 for share in shares]
    expected = [
        full_logits[math.floor(p)] + (p - math.floor(p)) * (full_logits[math.ceil(p)] - full_logits[math.floor(p)])
        for p in where
    ]
    assert torch.allclose(found, torch.tensor(expected).log_softmax(0), atol=1e-6)
    some = policy(staged(options=EIGHTHS[2:5]))[3]
    assert torch.allclose(some, full[2:5].log_softmax(0), atol=1e-6), "fewer options: the same odds among them"


def test_a_coordinate_left_out_changes_no_other() -> None:
    policy, domain = stirred(), staged()
    fewer = Domain(domain.coordinates[:2] + domain.coordinates[3:], domain.tokens, domain.task)
    logs = policy(domain)
    for ours, theirs in zip(policy(fewer), logs[:2] + logs[3:], strict=True):
        assert torch.equal(ours, theirs)


def test_every_stage_hears_of_every_other_and_of_the_task() -> None:
    policy, domain = stirred(), staged(4)
    before = policy(domain)
    for changed in range(4):
        tokens = list(domain.tokens)
        tokens[changed] = Token(2.0, 9.0, 77.0, 1.0)
        after = policy(Domain(domain.coordinates, tuple(tokens), domain.task))
        assert all(not torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))
    changes = {"budget": 0.1, "macs": 1e8, "classes": 100, "attack": "cw", "eps": 0.01, "clean": 0.5, "robust": 0.2}
    for name, value in (changes | {"lipschitz": 9.0}).items():
        after = policy(staged(4, about=task(**{name: value})))
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


def test_the_task_vector_is_of_unit_size() -> None:
    for attack in ATTACKS:
        for macs in (1e6, 4e10):
            vector = task_vector(task(attack=attack, macs=macs, classes=1000, budget=0.05))
            assert vector.shape == (11,) and float(vector.abs().max()) <= 3
            assert vector[2:7].tolist() == [float(attack == name) for name in ATTACKS]


def test_tasks_that_cannot_be_are_refused_all_at_once() -> None:
    with pytest.raises(InputError, match=r"budget=0(.|\n)*macs=nan(.|\n)*clean=85(.|\n)*did you mean 'fgsm'"):
        Policy()(staged(about=task(budget=0, macs=math.nan, clean=85, attack="fgms")))


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    policy = stirred()
    path = policy.save(tmp_path / "policy.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.safetensors"]
    found = Policy.load(path)
    assert all(torch.equal(a, b) for a, b in zip(found(uneven()), policy(uneven()), strict=True))
    small = Policy(hidden=8)
    assert Policy.load(small.save(path)).hidden == 8


def test_a_type_takes_its_own_logit() -> None:
    policy = stirred()
    logs = policy(typed())
    assert [len(log) for log in logs] == [3, 9, 3, 9, 2]
    everywhere = typed().coordinates[2]
    both = Domain((everywhere, dataclasses.replace(everywhere, stage=1)), typed().tokens, typed().task)
    whole = policy(both)
    assert torch.allclose(logs[2], whole[0]) and torch.allclose(logs[4], whole[1][1:].log_softmax(0), atol=1e-6)
    without = Domain(tuple(c for c in typed().coordinates if c.kind != "block"), typed().tokens, typed().task)
    assert all(torch.equal(a, b) for a, b in zip(policy(without), (logs[0], logs[1], logs[3]), strict=True))
    assert all(torch.allclose(log.exp(), torch.full_like(log, 1 / len(log))) for log in Policy()(typed()))


def test_a_file_from_before_there_were_types_is_neutral_about_them(tmp_path: Path) -> None:
    from safetensors import safe_open

    policy = stirred()
    with torch.no_grad():
        for parameter in policy.block.parameters():
            parameter.zero_()
    path = policy.save(tmp_path / "policy.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "1" and not [key for key in file.keys() if "block" in key]  # noqa: SIM118
    found = Policy.load(path)
    assert all(torch.equal(a, b) for a, b in zip(found(typed()), policy(typed()), strict=True))
    assert float(found(typed())[2].detach().exp().min()) == pytest.approx(1 / 3)
    stirred().save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "2"
    assert all(torch.equal(a, b) for a, b in zip(Policy.load(path)(typed()), stirred()(typed()), strict=True))


def rewritten(path: Path, **metadata: str | None) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, metadata={k: v for k, v in (old | metadata).items() if v is not None})


def infinite(path: Path) -> None:
    policy = Policy()
    with torch.no_grad():
        policy.width.bias[0] = math.inf
    policy.save(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "there is no policy"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "is damaged"),
        (lambda path: path.write_bytes(b"\xff" * 100), "is damaged"),
        (lambda path: rewritten(path, format=None), "holds no policy"),
        (lambda path: rewritten(path, version="3"), "has version 3; this version reads up to 2"),
        (lambda path: rewritten(path, version="new"), "does not say its sizes"),
        (lambda path: rewritten(path, hidden="16"), "other tensors than its sizes say"),
        (lambda path: rewritten(path, hidden="1000000"), "which no policy has"),
        (lambda path: rewritten(path, shares="11"), "11 shares, which no policy has"),
        (infinite, "not finite in width.bias"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    path = Policy().save(tmp_path / "policy.safetensors")
    damage(path)
    with pytest.raises(ResultError, match=said) as caught:
        Policy.load(path)
    assert "policy.safetensors" in str(caught.value)
