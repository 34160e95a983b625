"""What hangs on one group or block alone, against networks that are silenced, or rebuilt, by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.cuts import Sensitivity
from robustcompress.robust.attacks import fgsm
from robustcompress.robust.objectives import PGDAT
from tests.strategies.nets import SIZE, Chain, build, same, small_data, state

EPS = 0.03
IMAGES = 40


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A residual network that knows the digits somewhat, so that there is something to lose."""
    recipe = rc.Recipe(batch_size=32, val_images=0, lr=0.05)
    result = rc.compress(
        rc.ModelSpec("resnet8", {"num_classes": 10, "stem_stride": 2}),
        "none",
        data=small_data(),
        threat=EPS,
        objective=PGDAT(steps=1),
        epochs=25,
        recipe=recipe,
        attacks=(),
        progress=False,
    )
    return result.model


def scan(model: Any, **options: Any) -> Sensitivity:
    given: dict[str, Any] = {"shares": (0.75, 0.25), "attack": "fgsm", "split": "test", "images": IMAGES}
    return rc.sensitivity(model, small_data(), EPS, progress=False, **(given | options))


def judged(model: nn.Module) -> tuple[float, float]:
    """Clean and FGSM accuracy by a loop of our own; an image that is wrong without an attack stays wrong."""
    images = small_data().test
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    x, y = images.as_float()[order], images.labels[order]
    model.eval()
    right = model(x).argmax(1) == y
    still = right & (model(fgsm(model, x, y, rc.ThreatModel("linf", EPS))).argmax(1) == y)
    return float(right.float().mean()), float(still.float().mean())


def test_each_number_is_that_of_a_network_silenced_by_hand(trained: nn.Module) -> None:
    found = scan(trained)
    clean, robust = judged(copy.deepcopy(trained))
    assert clean > 0.4 and robust > 0.2, "there is something to lose"
    assert (found.clean, found.robust, found.n) == (pytest.approx(clean), pytest.approx(robust), IMAGES)
    assert found.groups == tuple(g.name for g in rc.StructuralEditor(trained, torch.zeros(2, 3, SIZE, SIZE)).editable)
    for cut in found.cuts:
        if cut.share is None:
            continue
        twin = copy.deepcopy(trained)
        editor = rc.StructuralEditor(twin, torch.zeros(2, 3, SIZE, SIZE))
        keep = largest(twin, editor, cut.part, cut.kept)
        with editor.gates({cut.part: keep}):  # law 6: a closed gate is a removed channel
            mine = judged(twin)
        assert cut.clean == pytest.approx(mine[0], abs=1.01 / IMAGES) and cut.kept == round(cut.share * cut.width)
        assert cut.robust == pytest.approx(mine[1], abs=1.01 / IMAGES)
        assert cut.loss == pytest.approx(found.robust - cut.robust) and cut.low <= cut.loss <= cut.high
        assert cut.clean_loss == pytest.approx(found.clean - cut.clean)


def largest(model: nn.Module, editor: rc.StructuralEditor, group: str, kept: int) -> torch.Tensor:
    """1 for the channels whose weights are largest, all sides of the group together."""
    total = torch.zeros(editor.groups[group].width, dtype=torch.float64)
    for axis in editor.groups[group].members:
        module = model.get_submodule(axis.module)
        weight = module.get_parameter("weight").detach().double()
        if axis.side == "in":
            weight = weight.movedim(1, 0)
        total += weight.reshape(len(total), -1).square().sum(1)
    chosen = torch.zeros(len(total))
    chosen[total.argsort(descending=True)[:kept]] = 1
    return chosen


def test_the_model_is_left_bit_for_bit_as_it_was(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    model.train()
    model.fc.weight.requires_grad_(False)  # type: ignore[union-attr]
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)  # type: ignore[union-attr, arg-type]
    before, printed = copy.deepcopy(state(model)), repr(model)
    generator = torch.get_rng_state()
    scan(model, recalibrate=True)
    assert same(state(model), before) and repr(model) == printed and all(m.training for m in model.modules())
    assert not model.fc.weight.requires_grad and bool((model.conv1.weight.grad == 1).all())  # type: ignore[union-attr, operator]
    assert torch.equal(torch.get_rng_state(), generator)


def test_it_is_the_same_every_time(trained: nn.Module) -> None:
    assert scan(trained, attack="pgd-2", images=20) == scan(trained, attack="pgd-2", images=20)


def test_a_block_alone_is_left_out(trained: nn.Module) -> None:
    found = scan(trained, groups=[], shares=(0.5,))
    assert found.groups == () and found.blocks == ("layers.0.0",)
    by_hand = copy.deepcopy(trained)
    by_hand.layers[0][0] = nn.Identity()  # type: ignore[union-attr, index, operator]
    cut = found.cut("layers.0.0")
    assert cut is not None and (cut.clean, cut.robust) == pytest.approx(judged(by_hand))
    assert cut.clean != found.clean and cut.robust > 0
    before, after = (rc.measure(net, torch.zeros(1, 3, SIZE, SIZE)).macs for net in (trained, by_hand))
    assert cut.macs == pytest.approx((before - after) / before, rel=1e-3)
    assert scan(trained, groups=[], shares=(0.5,), depth=False).cuts == ()


def test_recalibration_is_of_every_network(trained: nn.Module) -> None:
    shifted = copy.deepcopy(trained)
    for module in shifted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(3.0)  # type: ignore[union-attr]
    plain, anew = scan(shifted, groups=["conv1"]), scan(shifted, groups=["conv1"], recalibrate=True)
    assert anew.recalibrated and anew.clean > plain.clean + 0.1
    assert "estimated anew" in anew.title and "estimated anew" not in plain.title


def test_a_group_too_narrow_for_a_share_is_not_cut_twice() -> None:
    class Narrow(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2)
            self.conv2, self.bn2 = nn.Conv2d(2, 1, 3, stride=2, padding=1), nn.BatchNorm2d(1)
            self.conv3 = nn.Conv2d(1, 16, 3, padding=1, bias=False)

    found = scan(Narrow(), shares=(0.9, 0.5, 0.1))
    assert [cut.kept for cut in found.cuts if cut.part == "conv1"] == [1, 1, 1]
    assert "conv2" not in found.groups and found.cut("conv2", 0.5) is None


def test_ranking_table_and_json_agree(trained: nn.Module) -> None:
    found = scan(trained)
    mean = {g: sum(c.loss for c in found.cuts if c.part == g) for g in found.groups}
    assert [mean[g] for g in found.ranked()] == sorted(mean.values(), reverse=True)
    assert [row[0] for row in found.rows()] == list(found.ranked())
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["ranked"] == list(found.ranked()) and len(record["cuts"]) == len(found.cuts)
    assert record["attack"] == "fgsm" and "fgsm accuracy" in str(found)


def test_an_untrained_network_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    found = rc.sensitivity(build("residual"), small_data(), 0.1, shares=(0.5,), attack="fgsm", groups=["conv1"])
    assert any("not above chance (10 %)" in warning for warning in found.warnings)
    said = capsys.readouterr().err
    assert "not above chance" in said and "1 networks, each attacked by fgsm on 13 images: about" in said


def test_a_network_that_was_not_trained_to_withstand_it_is_warned_of(trained: nn.Module) -> None:
    found = rc.sensitivity(
        trained, small_data(), 0.9, shares=(0.5,), attack="pgd-5", groups=["conv1"], split="test", progress=False
    )
    assert any("hardly anything to lose" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": (0.5, 1.5)}, "1.5 must lie between 0 and 1"),
        ({"shares": ()}, "shares is empty"),
        ({"attack": "clean"}, "give 'fgsm' or 'pgd-10'"),
        ({"attack": "fgms"}, "did you mean 'fgsm'"),
        ({"images": 0}, "images=0"),
        ({"split": "train"}, "split='train' does not exist"),
        ({"groups": ["conv11"]}, "did you mean 'conv"),
        ({"groups": ["fc"]}, "cannot be edited"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(rc.InputError, match=said):
        scan(build("residual"), **options)


def test_a_result_is_judged_on_data_and_threat_of_its_own(tmp_path: Path) -> None:
    digits = rc.load_data("digits", train_limit=100, test_limit=20)
    result = rc.compress(
        "resnet8", "none", data=digits, threat=0.07, objective="natural", epochs=1, attacks=(), progress=False
    )
    options: dict[str, Any] = {"groups": ["conv1"], "depth": False, "attack": "fgsm", "images": 10, "progress": False}
    found = rc.sensitivity(result, **options)
    assert found.threat == rc.ThreatModel("linf", 0.07) and found.data == "digits"
    with pytest.raises(rc.InputError, match="other classes or another image size"):
        rc.sensitivity(result, small_data(), **options)
    elsewhere = dataclasses.replace(result, data={**result.data, "name": "photos"})
    with pytest.raises(rc.InputError, match="trained on 'photos'"):
        rc.sensitivity(elsewhere, **options)


def test_the_picture_holds_every_number(trained: nn.Module, tmp_path: Path, figures: list[Any]) -> None:
    found = scan(trained)
    rc.plot_sensitivity(found, tmp_path / "s.png")
    maps = [axes for axes in figures[0].axes if axes.images]
    assert [axes.get_title()[:14] for axes in maps[:2]] == ["lost under FGS", "lost clean (of"]
    for axes, value in zip(maps[:2], ("loss", "clean_loss"), strict=True):
        shown = axes.images[0].get_array()
        for i, group in enumerate(found.groups):
            for j, share in enumerate(found.shares):
                cut = found.cut(group, share)
                assert cut is not None and shown[i, j] == pytest.approx(100 * getattr(cut, value))
    with pytest.raises(rc.InputError, match="nothing to draw"):
        rc.plot_sensitivity(scan(trained, groups=[], depth=False), tmp_path / "t.png")
