"""Networks that nobody prepared: traced, cut, grown, trained, replayed; and what the check itself must not miss.

A dozen small ones in each run. All built-in networks, all of torchvision's classifiers and the sweep's list of timm's
are marked slow; a new one enrols by being listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import conformance
from benchmarks.conformance import Row, choose_size, examine, shake
from benchmarks.model_names import AUXILIARY, build_named, names_of, parameters_of
from robustcompress import StructuralEditor, build_model
from robustcompress.budget import CostModel
from robustcompress.models import open_attention

Build = Callable[[], nn.Module]


def named(name: str, **kwargs: Any) -> Build:
    def build() -> nn.Module:
        if name.startswith("timm:"):
            pytest.importorskip("timm")
        model, _ = build_model(name, num_classes=10, **kwargs)
        return model

    return build


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model: nn.Module = ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=10)
    return model


def swin(version: int) -> Build:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as swins

        sizes: dict[str, Any] = {"patch_size": [4, 4], "window_size": [4, 4], "num_classes": 10}
        sizes |= {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6]}
        if version == 2:
            sizes |= {"block": swins.SwinTransformerBlockV2, "downsample_layer": swins.PatchMergingV2}
        return open_attention(swins.SwinTransformer(**sizes))

    return build


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    sizes: dict[str, Any] = {"input_size": (64, 64), "stem_channels": 8, "partition_size": 4, "head_dim": 4}
    sizes |= {"block_channels": [8, 16], "block_layers": [1, 1], "stochastic_depth_prob": 0.0}
    return open_attention(MaxVit(**sizes, num_classes=10))


# Each with its image size and the fewest groups that must be editable: a network may not be refused more and more.
FEW: dict[str, tuple[Build, int, int]] = {
    "regnet": (named("torchvision:regnet_x_400mf"), 64, 27),
    "shufflenet": (named("torchvision:shufflenet_v2_x0_5"), 64, 18),
    "mobilenet": (named("torchvision:mobilenet_v3_small"), 64, 27),
    "efficientnet": (named("torchvision:efficientnet_b0"), 64, 40),
    "googlenet": (named("torchvision:googlenet"), 64, 57),
    "googlenet-aux": (named("torchvision:googlenet", aux_logits=True, dropout=0.0, dropout_aux=0.0), 64, 61),
    "densenet": (named("torchvision:densenet121"), 64, 120),
    "convnext": (convnext, 64, 4),
    "swin": (swin(1), 32, 8),
    "swin-v2": (swin(2), 32, 12),
    "maxvit": (maxvit, 64, 15),
    "timm-resnet": (named("timm:resnet26t"), 64, 23),
    "timm-resnext": (named("timm:resnext26ts"), 64, 15),
    "timm-convnext": (named("timm:convnext_atto"), 64, 12),
    "timm-vit": (named("timm:vit_tiny_patch16_224", img_size=64, depth=3), 64, 6),
    "timm-mixer": (named("timm:mixer_s32_224", img_size=64), 64, 16),
}
EXPORTED = ("regnet", "swin", "googlenet-aux")


@pytest.mark.parametrize("name", FEW)
def test_a_few_networks_pass_every_step(name: str) -> None:
    build, size, fewest = FEW[name]
    row = examine(build, (size, size), export=name in EXPORTED)
    assert row["failures"] == [] and "refused" not in row
    assert row["editable"] >= fewest, row["reasons"]
    assert row["half"] and row["macs"] <= 0.5 and row["ratio"] < 1
    assert row["law1"] <= 1e-4 and row["growth_break"] <= 1e-4 and row["no_gradient"] == []
    assert ("parity" in row) is (name in EXPORTED)


EVERY = names_of(("built-in", "torchvision", "timm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_network_passes_every_step_or_is_refused(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    if parameters_of(name) > 120e6:
        pytest.skip("too large for one machine's tests")
    row = examine(lambda: build_named(name), export=False)
    assert row["failures"] == []
    assert "refused" in row or row["macs"] < 1 or not row["editable"]


def test_the_lists_name_networks_that_exist() -> None:
    assert len(EVERY) == len(set(EVERY)) > 180
    timm = pytest.importorskip("timm")
    known = set(timm.list_models())
    assert [name for name in EVERY if name.startswith("timm:") and name[5:] not in known] == []
    assert set(AUXILIARY) < set(EVERY) and build_named(AUXILIARY[0]).aux1 is not None
    assert names_of(["timm:resnet26", "timm:resnet26"]) == ["timm:resnet26"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))
        return out


def small(build: Build = Small, **options: Any) -> Row:
    return examine(build, (12, 12), **{"export": False, **options})


def test_a_row_says_what_was_found() -> None:
    seen: list[str] = []
    row = small(save=lambda row: seen.append(row["step"]), export=True)
    assert row["failures"] == [] and (row["groups"], row["editable"]) == (3, 2)
    assert seen == list(row["seconds"]) and seen[-2:] == ["replay", "export"] and "step" not in row
    assert row["reasons"] == {"holds the model's output": 1} and row["params"] == 8 * 27 + 8 + 16 + 584 + 36
    assert row["file_mb"] > 0 and row["parity"] < 1e-5


def test_a_cut_that_is_no_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "silence_readers", lambda *args: None)
    (failure,) = small()["failures"]
    assert failure.startswith("law 1: the cut is not the network whose readers are silent")


def test_a_cut_that_shows_nothing_is_seen() -> None:
    class Deaf(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1e-6 + self.head.bias

    (failure,) = small(Deaf)["failures"]
    assert failure.startswith("law 1: shows nothing")


def test_growth_that_is_heard_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = StructuralEditor.grow
    monkeypatch.setattr(StructuralEditor, "grow", lambda self, name, extra: grow(self, name, extra, init="kaiming"))
    row = small()
    (failure,) = row["failures"]
    assert failure.startswith("law 2: growth changes the output") and row["growth_break"] > 1e-3


def test_growth_that_touches_old_channels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = StructuralEditor.grow

    def careless(self: StructuralEditor, name: str, extra: int) -> object:
        edit = grow(self, name, extra)
        with torch.no_grad():
            self.model.get_parameter("norm.weight")[0].add_(1e-7)  # law 2 cannot see so little
        return edit

    monkeypatch.setattr(StructuralEditor, "grow", careless)
    (failure,) = small()["failures"]
    assert failure == "undo: 1 tensors are not what they were before growth, first norm.weight"


def test_a_loss_that_is_not_finite_is_seen() -> None:
    class Torn(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (float("nan") if self.training else 1.0)

    row = small(Torn)
    assert [failure.partition(":")[0] for failure in row["failures"]] == ["training"] and row["loss"] == "nan"


def test_parameters_without_a_gradient_are_listed() -> None:
    class Idle(Small):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(3))

    assert small(Idle)["no_gradient"] == ["idle"]


def test_a_replay_that_gives_another_network_is_seen() -> None:
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(Small())
        if len(built) > 1:
            built[-1].norm = nn.BatchNorm2d(8, eps=1e-2)
        return built[-1]

    assert small(build)["failures"] == ["replay: other logits than the network that was edited"]


def test_a_step_that_raises_is_noted_and_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("no\nreason at all")

    monkeypatch.setattr(conformance, "measure", torn)
    row = small()
    assert row["failures"] == ["prune: ZeroDivisionError: no reason at all"] and "replay" not in row["seconds"]
    monkeypatch.undo()
    monkeypatch.setattr(conformance, "difference", torn)
    row = small()
    assert [failure.partition(":")[0] for failure in row["failures"]] == ["law 1", "law 2"]
    assert row["seconds"].keys() >= {"undo", "training", "replay"}


def test_a_wrong_prediction_of_the_cost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = CostModel.predict

    def cheap(self: CostModel, widths: dict[str, int]) -> tuple[float, float]:
        macs, params = predict(self, widths)
        return (0.9 * macs, params) if widths else (macs, params)

    monkeypatch.setattr(CostModel, "predict", cheap)
    assert [failure.partition(":")[0] for failure in small()["failures"]] == ["cost"]


def test_a_refused_network_is_no_failure() -> None:
    class Recurrent(Small):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 3)

    row = small(Recurrent)
    assert row["failures"] == [] and "recurrent layers cannot be edited" in row["refused"] and "editable" not in row


def test_a_network_that_runs_and_is_said_not_to_is_a_failure() -> None:
    class Picky(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if any(module._forward_hooks for module in self.modules()):
                raise TypeError("watched")
            return super().forward(x)

    row = small(Picky)
    assert row["failures"][0].startswith("trace: it does run, and is refused") and "watched" in row["refused"]


def test_a_network_that_cannot_be_built_is_a_failure() -> None:
    def build() -> nn.Module:
        raise ValueError("no such thing")

    assert small(build)["failures"] == ["build: ValueError: no such thing"]


def test_what_cannot_reach_half_goes_as_far_as_it_can() -> None:
    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.hidden, self.head = nn.Conv2d(3, 32, 5), nn.Linear(32, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.wide(x).reshape(len(x), 32, -1).mean(2)  # dear, and of no other width
            out: torch.Tensor = self.head(self.hidden(seen).relu())
            return out

    row = small(Heavy)
    assert row["failures"] == [] and not row["half"] and 0.5 < row["macs"] < 1 and row["editable"] == 1


def test_shaking_leaves_nothing_constant_and_statistics_near_the_images() -> None:
    model, images = Small().eval(), torch.rand(4, 3, 12, 12)
    nn.init.zeros_(model.second.weight)
    shake(model, images, torch.Generator().manual_seed(0))
    assert all(parameter.std() > 0 for parameter in model.parameters())
    with torch.no_grad():
        seen = model.first(images).var((0, 2, 3))
    assert bool((model.norm.running_var / seen).log2().abs().lt(1.01).all())
    assert not model.norm.training and model.norm.momentum == 0.1


def test_sizes_are_small_where_the_network_takes_any() -> None:
    assert choose_size(build_model("torchvision:squeezenet1_1")[0]) == (96, 96)
    assert choose_size(build_model("torchvision:vit_b_32")[0]) == (224, 224)
    assert choose_size(build_model("resnet8")[0]) == (32, 32)
