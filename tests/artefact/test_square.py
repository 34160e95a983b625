from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import robustcompress as rc
from robustcompress.artefact import square
from robustcompress.artefact.rounding import check_visible, seen, within
from robustcompress.errors import InputError
from tests.artefact.nets import Linear, linear_data

EPS = 8 / 255


def scores_of(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    def scores(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    return scores


def fitted() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A small network that tells bright spots apart, and images of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    x = 0.35 + 0.3 * torch.rand(96, 3, 15, 15, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        x[i, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 0.04 + 0.12 * i / 96
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(3),
        torch.nn.Flatten(),
        torch.nn.Linear(200, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), x, labels


def test_on_a_linear_network_it_breaks_what_can_be_broken_and_nothing_else() -> None:
    pixels, labels, safe = linear_data(40, EPS)
    x = pixels.float() / 255
    found = square(scores_of(Linear()), x, labels, rc.ThreatModel("linf", EPS), queries=1500)
    assert bool(found.correct[safe].all())
    assert 10 <= int(safe.sum()) <= 30
    assert int(found.correct[~safe].sum()) <= 3  # those at the very edge need every pixel
    assert int((found.queries[safe] == 1500).sum()) == int(safe.sum())
    assert int(found.queries[~safe].min()) < 10


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 2.8)])
def test_it_finds_what_autoattacks_square_finds(norm: str, eps: float) -> None:
    from pyautoattack.square import SquareAttack

    model, x, y = fitted()
    with torch.no_grad():
        clean = float((model(x).argmax(1) == y).double().mean())
    x, y = x[::2], y[::2]
    ours, theirs = [], []
    for seed in range(3):
        found = square(scores_of(model), x, y, rc.ThreatModel(norm, eps), queries=100, seed=seed)
        ours.append(float(found.correct.double().mean()))
        attack = SquareAttack(
            lambda images: model(images).detach().clone(),
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=eps,
            n_queries=100,
            seed=seed,
            resc_schedule=True,
            device="cpu",
        )
        with torch.random.fork_rng(), torch.no_grad():
            theirs.append(float((model(attack.perturb(x.clone(), y)).argmax(1) == y).double().mean()))
    mean_ours, mean_theirs = sum(ours) / 3, sum(theirs) / 3
    assert clean > 0.9 and 0.1 < mean_theirs < 0.8  # neither hopeless nor won: a comparison that can fail
    assert abs(mean_ours - mean_theirs) < 0.15  # of theirs, all images share their squares: seeds differ by 0.1


def test_an_image_meets_the_same_attack_in_any_batch() -> None:
    model, x, y = fitted()
    threat = rc.ThreatModel("linf", 0.03)
    together = square(scores_of(model), x[:6], y[:6], threat, queries=40, indices=torch.arange(6))
    alone = square(scores_of(model), x[4:5], y[4:5], threat, queries=40, indices=torch.tensor([4]))
    torch.testing.assert_close(alone.x_adv[0], together.x_adv[4])
    assert int(alone.queries[0]) == int(together.queries[4])
    other = square(scores_of(model), x[4:5], y[4:5], threat, queries=40, indices=torch.tensor([5]))
    assert not torch.equal(other.x_adv, alone.x_adv)
    later = square(scores_of(model), x[4:5], y[4:5], threat, queries=40, indices=torch.tensor([4]), seed=1)
    assert not torch.equal(later.x_adv, alone.x_adv)


def test_no_image_costs_more_than_its_budget_and_global_randomness_is_left_alone() -> None:
    model, x, y = fitted()
    asked = 0

    def counting(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return scores_of(model)(images)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = square(counting, x, y, rc.ThreatModel("linf", 0.02), queries=25)
    assert torch.equal(torch.get_rng_state(), before)
    assert int(found.queries.max()) <= 25 and asked == int(found.queries.sum())
    assert square(counting, x[:0], y[:0], rc.ThreatModel("l2", 0.5)).correct.shape == (0,)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0.006, 0.4),
    kind=st.sampled_from(["float32", "float16", "uint8"]),
    seed=st.integers(0, 2**20),
    far=st.floats(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_what_the_file_sees_lies_in_the_ball(norm: str, eps: float, kind: str, seed: int, far: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    threat = rc.ThreatModel(norm, eps)  # type: ignore[arg-type]
    x = seen(torch.rand(4, 3, 6, 5, generator=generator), kind)  # type: ignore[arg-type]
    wild = x + far * torch.randn(x.shape, generator=generator)
    wild[0, 0, 0, 0] = float("nan")
    x_adv = within(wild, x, threat, kind)  # type: ignore[arg-type]
    assert torch.equal(seen(x_adv, kind), x_adv)  # type: ignore[arg-type] # fed to the file, it is not changed
    assert float(threat.size(x_adv, x).max()) <= threat.limit
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


def test_a_whole_radius_in_bytes_is_used_to_its_edge() -> None:
    x = torch.full((1, 3, 4, 4), 100 / 255)
    for steps in (1, 2, 8, 16):
        threat = rc.ThreatModel("linf", steps / 255)
        assert torch.equal(within(x + 1, x, threat, "uint8").mul(255).round(), torch.full_like(x, 100 + steps))
    half = within(x + 1, x, rc.ThreatModel("linf", 2.5 / 255), "uint8")
    assert torch.equal(half.mul(255).round(), torch.full_like(x, 102))
    with pytest.raises(InputError, match="reads bytes"):
        check_visible(rc.ThreatModel("linf", 0.5 / 255), "uint8")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 5), (33, 20)])
def test_images_of_any_size_can_be_attacked(norm: str, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    threat = rc.ThreatModel(norm, 0.1)  # type: ignore[arg-type]
    first = torch.zeros(2, dtype=torch.int64)

    def certain(images: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    found = square(certain, x, first, threat, queries=30)
    assert bool(found.correct.all()) and float(threat.size(found.x_adv, x).max()) <= threat.limit
    if norm == "l2":  # of what the bounds leave, the whole budget is spent
        inner = square(certain, x * 0.2 + 0.4, first, threat, queries=30)
        torch.testing.assert_close(
            threat.size(inner.x_adv, x * 0.2 + 0.4), torch.full((2,), 0.1).double(), rtol=1e-3, atol=0
        )
