from __future__ import annotations

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.robust import AttackResult, AutoAttackConfig, ThreatModel, attack_by_name, evaluate
from robustcompress.robust.sanity import flag_model, flag_order

LABELS = torch.zeros(24, dtype=torch.int64)


class Wrapped(nn.Module):
    def __init__(self, model, after=lambda logits: logits, before=lambda x: x):
        super().__init__()
        self.model, self.after, self.before = model, after, before

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def result(name, correct, **more):
    return AttackResult(name=name, correct=torch.tensor(correct, dtype=torch.bool), seconds=0.0, **more)


def order(**correct):
    names = [name.replace("_", "-") for name in correct]
    return flag_order(
        [result(name, flags) for name, flags in zip(names, correct.values(), strict=True)],
        [attack_by_name(name) for name in names],
    )


def test_a_sane_model_raises_no_flag(mlp, images):
    assert flag_model(mlp(4), images, LABELS) == []


@pytest.mark.parametrize(
    ("after", "before", "word"),
    [
        (lambda z: z.softmax(1), lambda x: x, "probabilities"),
        (lambda z: z + 0.1 * torch.randn_like(z), lambda x: x, "random"),
        (lambda z: z, lambda x: (8 * x).round() / 8, "gradient is exactly zero on 24 of 24"),
        (lambda z: 1e4 * torch.tensor([1.0, 0, 0, 0]) + z, lambda x: x, "gradient is exactly zero"),
    ],
    ids=["probabilities", "random", "rounded", "saturated"],
)
def test_each_bad_model_raises_its_flag_alone(mlp, images, after, before, word):
    (flag,) = flag_model(Wrapped(mlp(4), after, before), images, LABELS)
    assert word in flag


def test_flags_reach_the_report(mlp, images):
    masked = Wrapped(mlp(4), before=lambda x: (8 * x).round() / 8).eval()
    report = evaluate(masked, (images, LABELS), attacks=("fgsm",), device="cpu")
    assert any("exactly zero" in warning for warning in report.warnings)
    assert "warning: the gradient is exactly zero" in str(report)


def test_training_mode_is_said_and_given_back(convnet, images):
    convnet.train()
    report = evaluate(convnet, (images, LABELS), attacks=("fgsm",), device="cpu")
    assert any("training mode" in warning for warning in report.warnings)
    assert convnet.training and convnet[1].training
    assert int(convnet[1].num_batches_tracked) == 0
    assert evaluate(convnet.eval(), (images, LABELS), device="cpu").warnings == ()


def test_stronger_attacks_that_do_worse_are_flagged_beyond_noise():
    many = 100
    assert order(fgsm=[0] * many, pgd_20=[1] * many)[0].startswith("pgd-20 does worse than the weaker fgsm")
    assert order(fgsm=[1] * many, pgd_20=[0] * many) == []
    assert order(fgsm=[0, 0, 0, 1, 1, 1], pgd_20=[1, 1, 1, 1, 1, 1]) == []  # three images are noise
    assert len(order(pgd_10=[0] * many, pgd_50=[1] * many)) == 1
    assert len(order(pgd_10=[0] * many, pgd_10x3=[1] * many)) == 1
    assert order(pgd_10=[0] * many, pgd_20_margin=[1] * many) == []  # another loss: neither is the stronger


def test_autoattack_that_misses_what_pgd_breaks_is_flagged_for_each_image():
    (flag,) = order(pgd_20=[1, 0, 1, 0], autoattack=[1, 1, 0])
    assert flag.startswith("pgd-20 breaks 1 of 3 images that AutoAttack does not")
    assert order(pgd_20=[1, 0, 1, 1], autoattack=[1, 0, 0]) == []


def test_square_that_finds_what_gradients_missed_is_flagged():
    spec = [attack_by_name("autoattack")]
    flags = [0] * 10 + [1] * 90
    (flag,) = flag_order([result("autoattack", flags, broken_by={"apgd-ce": 6, "square": 4})], spec)
    assert "Square" in flag and "4 of 100" in flag
    assert flag_order([result("autoattack", flags, broken_by={"apgd-ce": 9, "square": 1})], spec) == []


def test_square_breaks_a_masked_model_and_it_is_said(linear, images):
    # Steps as fine as 1/64 carry the signal and no gradient: only Square, which needs none, gets through.
    torch.manual_seed(0)
    model = Wrapped(linear(torch.ones(3, 8, 8), bias=-96.0), before=lambda x: (64 * x).round() / 64).eval()
    y = model(images).argmax(1)
    config = AutoAttackConfig(apgd_iterations=5, fab_iterations=5, square_queries=300)
    threat = ThreatModel("linf", 0.2)
    report = evaluate(model, (images, y), threat, attacks="autoattack", device="cpu", autoattack_config=config)
    attack = report.result("autoattack")
    assert attack.broken_by["square"] > 1
    assert attack.broken_by["fab-t"] == 0  # its 0/0 is no success
    assert sum(attack.broken_by.values()) == 24 - int(attack.correct.sum())
    assert any("Square" in warning for warning in report.warnings)


def bad_float(x):
    return torch.cat([x[:-1], x[-1:] * float("nan")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x, y: (m, x * 255, y), "divide by 255"),
        (lambda m, x, y: (m, x * 2 - 1, y), "normalise inside the model"),
        (lambda m, x, y: (m, bad_float(x), y), "NaN"),
        (lambda m, x, y: (m, x.permute(0, 2, 3, 1), y), "channels second"),
        (lambda m, x, y: (m, x[:, :1], y), "shape"),
        (lambda m, x, y: (m, (x * 255).long(), y), "torch.int64: give uint8"),
        (lambda m, x, y: (m, x, y + 4), "label 4 but the model has 4 logits"),
        (lambda m, x, y: (m, x, y - 1), "label -1"),
        (lambda m, x, y: (m, x, y.float()), "give integers"),
        (lambda m, x, y: (m, x, y[:-1]), "24 images but 23 labels"),
        (lambda m, x, y: (m, x[:0], y[:0]), "no images"),
        (lambda m, x, y: (m.half(), x, y), "torch.float16: evaluate it in single precision"),
        (lambda m, x, y: (m.double(), x, y), "torch.float64"),
        (lambda m, x, y: (m, x[..., :4], y), "does not take images of shape"),
        (lambda m, x, y: (Wrapped(m, lambda z: (z, z)), x, y), "returns tuple"),
        (lambda m, x, y: (Wrapped(m, lambda z: z[:, 0]), x, y), r"returns \(2,\)"),
        (lambda m, x, y: (Wrapped(m, lambda z: z[:, :1]), x, y), "2 or more classes"),
        (lambda m, x, y: (Wrapped(m, lambda z: z / 0), x, y), "not finite"),
        (lambda m, x, y: (Wrapped(m, lambda z: z.detach()), x, y), "no gradient reaches"),
        (lambda m, x, y: (Wrapped(m, before=lambda x: x.detach()), x, y), "no gradient reaches"),
    ],
)
def test_bad_input_is_refused_before_any_attack(mlp, images, change, message):
    model, x, y = change(mlp(4), images, LABELS)
    with pytest.raises(InputError, match=message):
        evaluate(model, (x, y), device="cpu")


def test_all_of_it_is_said_at_once(mlp, images):
    with pytest.raises(InputError) as error:
        evaluate(
            mlp(4).half(),
            (images * 255, LABELS - 1),
            ThreatModel("l2", 100.0),
            attacks=("pgd20", "fgsm"),
            batch_size=0,
            device="cpu",
            max_images=-1,
            autoattack_images=5,
            time_limit_s=-1.0,
        )
    for part in (
        "float16",
        "divide by 255",
        "label -1",
        "eps=100 in l2",
        "'pgd20' is unknown",
        "batch_size=0",
        "max_images=-1",
        "autoattack_images=5",
        "time_limit_s=-1.0",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": "gpu"}, "device='gpu'"),
        ({"attacks": (3,)}, "attack 3 is unknown"),
        ({"attacks": "autoattack", "threat": ThreatModel(bounds=(0.0, 2.0))}, r"images in \[0, 1\] only"),
    ],
)
def test_bad_options(mlp, images, kwargs, message):
    with pytest.raises(InputError, match=message):
        evaluate(mlp(4), (images, LABELS), **{"device": "cpu", **kwargs})


def test_data_of_another_kind(mlp, images):
    for data in (images, [images, LABELS], (images,), {"x": images}):
        with pytest.raises(InputError, match="give Images"):
            evaluate(mlp(4), data, device="cpu")
