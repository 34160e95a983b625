"""The mixed tangent kernel against Jacobians taken image by image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustcompress.robust.tangent import draw_direction, relative_square, tangent_kernel, trained_parameters
from tests.strategies.nets import NETS, SIZE, build


def make(net: str, seed: int) -> nn.Module:
    """A network in double precision and train mode, whose batch norms have seen something."""
    model = build(net, seed=seed, num_classes=5).double().train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model(torch.rand(6, 3, SIZE, SIZE, dtype=torch.float64))
    return model


def images(seed: int, n: int) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobian(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """[N, P], row by row, by ordinary autograd."""
    modes = [m.training for m in model.modules()]
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [  # what auxiliary classifiers hold moves no logit
        torch.autograd.grad(
            (model(image[None])[0] * direction).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        for image in x
    ]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("net", sorted(NETS))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 4), m=st.integers(1, 4), frozen=st.booleans())
def test_it_is_the_product_of_two_jacobians(net: str, seed: int, n: int, m: int, frozen: bool) -> None:
    model, x, x_adv = make(net, seed), images(seed, n), images(seed + 1, m)
    next(model.parameters()).requires_grad_(not frozen)
    direction = draw_direction(5, device=torch.device("cpu"), generator=torch.Generator().manual_seed(seed)).double()
    wanted = jacobian(model, x, direction) @ jacobian(model, x_adv, direction).T
    with torch.no_grad():
        found = tangent_kernel(model, x, x_adv, direction, trained_parameters(model))
    assert found.shape == (n, m)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_network_is_as_it_was_and_autocast_costs_no_digits() -> None:
    model = build("residual", num_classes=5).train()
    model.bn1.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes, x = [m.training for m in model.modules()], images(0, 3).float()
    kernel = tangent_kernel(model, x, x, torch.ones(5), trained_parameters(model))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tangent_kernel(model, x, x, torch.ones(5), trained_parameters(model)), kernel)
    assert torch.allclose(kernel, kernel.T) and bool((torch.linalg.eigvalsh(kernel) > 0).all()), "at x~ = x, the NTK"


def test_directions_are_unit_vectors_that_the_generator_decides() -> None:
    cpu = torch.device("cpu")
    drawn = [draw_direction(7, device=cpu, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert all(float(d.norm()) == pytest.approx(1) for d in drawn)
    many = torch.stack([draw_direction(3, device=cpu, generator=g) for g in [torch.Generator().manual_seed(3)] * 3000])
    assert torch.allclose(many.T @ many / 3000, torch.eye(3) / 3, atol=0.03), "no direction is favoured"


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_distances_do_not_depend_on_the_scale(seed: int, scale: float) -> None:
    a, b = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert float(relative_square(a * scale, b * scale)) == pytest.approx(float(relative_square(a, b)))
    assert float(relative_square(b, b)) == 0 and float(relative_square(0 * b, b)) == pytest.approx(1)
    assert float(relative_square(0 * b, 0 * b)) == 0, "nothing is not far from nothing"
