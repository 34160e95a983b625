from __future__ import annotations

import pytest
import torch
from torch import nn

from robustcompress.robust import AttackSpec, ThreatModel, compare, evaluate, fgsm, pgd
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import as_float, hash_of

THREAT = ThreatModel("linf", 0.02)


@pytest.fixture
def labels(mlp, images):
    y = mlp(4, gain=3.0)(images).argmax(1)
    y[::5] = (y[::5] + 1) % 4  # some the model gets wrong
    return y


def test_flags_are_what_the_attacks_do(mlp, images, labels):
    model = mlp(4, gain=3.0)
    report = evaluate(model, (images, labels), THREAT, attacks=("fgsm", "pgd-5"), device="cpu", batch_size=100)
    assert [result.name for result in report.attacks] == ["clean", "fgsm", "pgd-5"]
    x, y = images[report.indices], labels[report.indices]
    right = model(x).argmax(1) == y
    assert torch.equal(report.result("clean").correct, right)
    fooled = model(fgsm(model, x, y, THREAT)).argmax(1) != y
    assert torch.equal(report.result("fgsm").correct, right & ~fooled)
    x_adv = pgd(model, x[right], y[right], THREAT, steps=5, generator=torch.Generator().manual_seed(0))
    expected = right.clone()
    expected[right] = model(x_adv).argmax(1) == y[right]
    assert torch.equal(report.result("pgd-5").correct, expected)
    assert report.result("pgd-5").max_perturbation == pytest.approx(THREAT.eps, rel=1e-4)
    assert torch.equal(report.worst_case.correct, right & ~fooled & expected)


def test_on_a_linear_model_robust_accuracy_is_known(linear):
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 8)
    x = 0.2 + 0.6 * torch.rand(200, 3, 8, 8)
    model = linear(weight, bias=-float((0.5 * weight).sum())).eval()
    y = model(x).argmax(1)
    distance = model(x).detach()[:, 0].abs() / weight.abs().sum()
    threat = ThreatModel("linf", float(distance.median()))
    report = evaluate(model, (x, y), threat, attacks=("fgsm", "pgd-20"), device="cpu")
    expected = float((distance > threat.eps).float().mean())
    assert report.clean_accuracy == 1.0
    assert report.result("fgsm").accuracy == pytest.approx(expected, abs=0.006)
    assert report.result("pgd-20").accuracy == pytest.approx(expected, abs=0.006)
    low, high = report.result("fgsm").low, report.result("fgsm").high
    assert low < expected < high


def test_bytes_and_floats_are_the_same_images(mlp):
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    model, y = mlp(4), torch.zeros(12, dtype=torch.int32)
    for threat in (THREAT, ThreatModel("l2", 0.3)):
        reports = [evaluate(model, (x, y), threat, device="cpu") for x in (pixels, pixels / 255)]
        for name in ("clean", "fgsm", "pgd-20"):
            assert torch.equal(reports[0].result(name).correct, reports[1].result(name).correct)


def test_an_object_with_pixels_and_labels_will_do(mlp):
    class Images:
        pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
        labels = torch.zeros(12, dtype=torch.int64)

    pair = (Images.pixels, Images.labels)
    a, b = evaluate(mlp(4), Images(), device="cpu"), evaluate(mlp(4), pair, device="cpu")
    assert a.images_sha256 == b.images_sha256
    assert torch.equal(a.worst_case.correct, b.worst_case.correct)


def test_chosen_images_are_a_fair_prefix_of_one_order():
    everything = chosen_images(1000, None)
    assert everything.sort().values.tolist() == list(range(1000))
    assert torch.equal(chosen_images(1000, 100), everything[:100])
    assert torch.equal(chosen_images(1000, 5000), everything)
    # Of a data set sorted by ten classes a hundred images hold about ten of each.
    counts = torch.bincount(chosen_images(1000, 100) // 100, minlength=10)
    assert counts.min() >= 3


def test_two_models_are_paired_on_the_same_images(mlp, images, labels):
    reports = [evaluate(mlp(4, seed=s), (images, labels), THREAT, device="cpu", max_images=10, seed=s) for s in (0, 1)]
    assert reports[0].images_sha256 == reports[1].images_sha256
    assert compare(*reports, attack="pgd-20").n == 10


def test_same_seed_same_report(mlp, images, labels):
    options = {"attacks": ("pgd-3", "pgd-2x2-margin"), "device": "cpu", "batch_size": 7}
    a, b = (evaluate(mlp(4, gain=3.0), (images, labels), THREAT, **options) for _ in range(2))
    for left, right in zip(a.attacks, b.attacks, strict=True):
        assert torch.equal(left.correct, right.correct)
        assert left.max_perturbation == right.max_perturbation


def test_nothing_of_the_callers_changes(convnet, images):
    convnet.train()
    convnet[0].weight.requires_grad_(False)
    y = torch.zeros(24, dtype=torch.int64)
    weights = {key: value.clone() for key, value in convnet.state_dict().items()}
    x = images.clone()
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            evaluate(convnet, (x, y), attacks=("fgsm", "pgd-3x2"), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, images)
    assert convnet.training
    assert [p.requires_grad for p in convnet.parameters()] == [False, True, True, True, True]
    assert all(p.grad is None for p in convnet.parameters())
    assert all(torch.equal(weights[key], value) for key, value in convnet.state_dict().items())


def test_specs_names_and_repeats(mlp, images, labels):
    spec = AttackSpec(kind="pgd", steps=2)
    report = evaluate(mlp(4), (images, labels), THREAT, attacks=(spec, "pgd-2", "clean", "fgsm"), device="cpu")
    assert [result.name for result in report.attacks] == ["clean", "pgd-2", "fgsm"]
    assert len(evaluate(mlp(4), (images, labels), THREAT, attacks="fgsm", device="cpu").attacks) == 2
    alone = evaluate(mlp(4), (images, labels), THREAT, attacks=(), device="cpu")
    assert [row[0] for row in alone.rows()] == ["clean"]


def test_only_what_is_right_is_attacked(mlp, images, count):
    model = mlp(4)
    wrong = (model(images).argmax(1) + 1) % 4
    counter = count(model)
    report = evaluate(model, (images, wrong), THREAT, attacks=("pgd-20",), device="cpu")
    assert report.result("pgd-20").accuracy == 0.0
    assert counter.calls < 8  # checks, flags and the clean pass


def test_progress(mlp, images, labels):
    seen = []
    evaluate(mlp(4), (images, labels), THREAT, attacks=("fgsm",), device="cpu", batch_size=10, progress=seen.append)
    assert [(p.attack, p.done, p.total) for p in seen] == [
        (name, done, 24) for name in ("clean", "fgsm") for done in (10, 20, 24)
    ]
    assert all(0 <= p.accuracy <= 1 and p.seconds >= 0 for p in seen)


def test_an_attack_outside_the_ball_would_be_noticed(mlp, images, labels, monkeypatch):
    monkeypatch.setattr(ThreatModel, "project", lambda self, x_adv, x: x_adv)
    monkeypatch.setattr(AttackSpec, "perturb", lambda self, model, x, *_, **__: 1 - x)
    with pytest.raises(AssertionError, match="left the ball"):
        evaluate(mlp(4, gain=3.0), (images, labels), THREAT, attacks=("fgsm",), device="cpu")


def test_a_model_on_another_device_is_copied():
    from robustcompress.robust.evaluate import _on_device

    model = nn.Linear(2, 2)
    with _on_device(model, torch.device("meta")) as moved:
        assert moved is not model and moved.weight.device.type == "meta"
    assert model.weight.device.type == "cpu"
    with _on_device(model, torch.device("cpu")) as same:
        assert same is model


def test_hash_depends_on_values_and_not_on_layout():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert hash_of(x) == hash_of(x.contiguous(memory_format=torch.channels_last))
    assert len({hash_of(y) for y in (x, x + 1, x.view(1, 3, 2, 4), x.double(), x[:0])}) == 5


def test_as_float():
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_float(bytes_, torch.device("cpu")).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert bytes_.tolist() == [0, 51, 255]
    assert as_float(torch.ones(1, dtype=torch.float64), torch.device("cpu")).dtype == torch.float32
