"""Certificates by bounds, and what a report says of any of them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import robustcompress as rc
from robustcompress.certify import ABSTAINS, CertificateReport, certify, plot_certificates
from robustcompress.errors import InputError, ResultError, UnsupportedModelError


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.rand(48, 3, 4, 4)
    y = model(x).argmax(1)
    y[::4] = (y[::4] + 1) % 3  # some that it gets wrong
    return model, (x, y)


def test_certified_accuracy_is_never_above_accuracy_under_attack(
    small: tuple[nn.Module, tuple[Tensor, Tensor]],
) -> None:
    model, data = small
    for eps in (0.004, 0.02):
        attacked = rc.evaluate(model, data, rc.ThreatModel("linf", eps), attacks=["pgd-20", "autoattack"])
        shares = []
        for method in ("ibp", "crown-ibp"):
            report = certify(model, data, method=method, eps=eps)
            assert report.images_sha256 == attacked.images_sha256
            assert not (report.certified(eps) & ~attacked.worst_case.correct).any()
            assert report.accuracy == attacked.clean_accuracy
            shares.append(report.certified_accuracy(eps))
        assert shares[0] <= shares[1] <= attacked.worst_case.accuracy
        assert shares[1] > 0


def test_a_linear_network_is_certified_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x, eps = 0.25 + 0.5 * torch.rand(300, 3, 4, 4), 0.1
    w = (model[1].weight[0] - model[1].weight[1]).double()
    lead = x.flatten(1).double() @ w + (model[1].bias[0] - model[1].bias[1]).double()
    exact = lead.abs() > eps * w.abs().sum()
    for method in ("ibp", "crown-ibp"):
        report = certify(model, (x, (lead < 0).long()), method=method, eps=eps)
        assert torch.equal(report.certified(eps), exact[report.indices])
        assert 0.1 < report.certified_accuracy(eps) < 0.9


def test_the_model_is_left_as_it_was() -> None:
    model, _ = rc.build_model("resnet8", num_classes=10, stem_stride=4)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = rc.load_data("digits")
    for method, options in (("smoothing", {"n": 20}), ("ibp", {"eps": 0.01})):
        certify(model, data, method=method, max_images=2, **options)
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_without_rules_is_refused_by_name() -> None:
    model, _ = rc.build_model("vit_micro", num_classes=10)
    with pytest.raises(UnsupportedModelError, match=r"layer '.*' \(\w+\): .*method 'smoothing'"):
        certify(model, (torch.rand(2, 3, 32, 32), torch.tensor([0, 1])), method="ibp", eps=0.01)


def made(method: str = "smoothing", **changes: object) -> CertificateReport:
    settings = {"sigma": 0.25, "n0": 100.0, "n": 1000.0, "alpha": 0.001} if method == "smoothing" else {"eps": 0.1}
    radii = [0.3, 0.6, 0.0, 0.2] if method == "smoothing" else [0.1, 0.1, 0.0, 0.1]
    fields: dict[str, object] = {
        "method": method,
        "norm": "l2" if method == "smoothing" else "linf",
        "settings": settings,
        "predictions": torch.tensor([1, 2, ABSTAINS if method == "smoothing" else 0, 0]),
        "labels": torch.tensor([1, 2, 0, 3]),
        "radii": torch.tensor(radii, dtype=torch.float64),
        "images_sha256": "ab",
        "indices": torch.arange(4),
        "seed": 0,
        "seconds": 1.5,
    }
    return CertificateReport(**(fields | changes))  # type: ignore[arg-type]


def test_what_a_report_counts() -> None:
    report = made()
    assert report.abstained == 0.25 and report.accuracy == 0.5
    assert [report.certified_accuracy(r) for r in (0.0, 0.25, 0.3, 0.5, 0.6)] == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert report.mean_radius == pytest.approx(0.9 / 4) and report.name == "smoothing-0.25"
    bounds = made("ibp")
    assert bounds.accuracy == 0.75 and bounds.certified_accuracy(0.1) == 0.5 and bounds.certified_accuracy(0.11) == 0
    assert bounds.certified_accuracy(0.0) == 0.75  # an image that is only right is right at radius 0
    assert "lower bound" in str(report) and "50.0" in str(bounds)


@pytest.mark.parametrize("method", ["smoothing", "ibp"])
def test_json_round_trip_and_tampering(method: str) -> None:
    report = made(method)
    data = json.loads(json.dumps(report.to_json()))
    assert CertificateReport.from_json(data) == report
    for key, value in (
        ("format", 2),
        ("radii", [9.0] * 4),
        ("radii", [0.1]),
        ("method", "magic"),
        ("settings", {}),
        ("labels", None),
    ):
        with pytest.raises(ResultError):
            CertificateReport.from_json({**data, key: value})


def test_picture(tmp_path: object, figures: list[object]) -> None:
    path = tmp_path / "radii.png"  # type: ignore[operator]
    assert plot_certificates({"a": made(), "b": made(radii=torch.full((4,), 0.1, dtype=torch.float64))}, path) == path
    assert path.stat().st_size > 5000
    (axes,) = figures[0].axes  # type: ignore[attr-defined]
    line = axes.lines[0]
    shown = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
    assert all(share == 100 * made().certified_accuracy(radius) for radius, share in shown.items())
    with pytest.raises(InputError, match="one norm"):
        plot_certificates({"a": made(), "b": made("ibp")}, path)
