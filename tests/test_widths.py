"""Channel groups as they are shown: shares against a count by hand, and the picture against what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.budget import measure
from robustcompress.width_plot import COLUMN, _labels, draw_widths, plot_widths
from robustcompress.widths import GroupWidth, Widths, widths_of


class Residual(nn.Module):
    """Convolutions and a linear layer alone, so that every multiply-add can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 8, 1)
        self.branch = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear((8 + 6) * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        logits: torch.Tensor = self.fc(torch.cat([x, self.branch(x)], 1).flatten(1))
        return logits


EXAMPLE = torch.zeros(2, 3, 4, 4)


def drawn(figures: list[Any], widths: Widths, path: Path) -> Any:
    """The figure, as matplotlib's own object."""
    assert draw_widths(widths, path, title="a network") == path and path.is_file()
    return figures[-1]


def group(name: str, width: int, *, before: int | None = None, kind: str = "hidden", reason: str = "") -> GroupWidth:
    return GroupWidth(
        name=name,
        kind=kind,
        width=width,
        head_dim=1,
        before=before,
        min_width=1,
        macs=1,
        share=0.1,
        macs_per_channel=1,
        params_per_channel=1,
        editable=not reason,
        reason=reason,
        members=(),
    )


def widths_with(*groups: GroupWidth) -> Widths:
    return Widths(groups=groups, image_shape=(3, 8, 8), cost=measure(Residual(), EXAMPLE), before=None)


def test_multiply_adds_belong_to_the_layers_that_write_a_group() -> None:
    found = widths_of(Residual(), EXAMPLE)
    by_name = {g.name: g for g in found.groups}
    pixels = 16
    wanted = {
        "stem": pixels * (3 * 8 * 9 + 5 * 8),  # two layers write the residual stream
        "inner": pixels * 8 * 5 * 9,
        "branch": pixels * 8 * 6,
        "fc": (8 + 6) * pixels * 4,
    }
    assert {name: g.macs for name, g in by_name.items()} == wanted
    assert sum(g.share for g in found.groups) == pytest.approx(1)
    assert by_name["inner"].macs_per_channel == pixels * (8 * 9 + 8)
    assert by_name["inner"].params_per_channel == 8 * 9 + 1 + 8
    assert [g.name for g in found.groups if not g.editable] == ["fc"] and by_name["fc"].reason
    assert found.image_shape == (3, 4, 4) and found.before is None and by_name["stem"].before is None


@pytest.mark.parametrize("name", ["resnet8", "densenet121", "mobilenet_v2", "vit_micro"])
def test_shares_add_up(name: str) -> None:
    options: dict[str, Any] = {} if name == "vit_micro" else {"width": 0.25}
    model, _ = rc.build_model(name, **options)
    found = widths_of(model)
    pooled_only = 1 - sum(g.share for g in found.groups)
    assert 0 <= pooled_only < 0.02
    if name == "vit_micro":
        assert {(g.width, g.head_dim) for g in found.groups if g.kind == "heads"} == {(6, 8)}


def test_bars_hold_what_was_found(tmp_path: Path, figures: list[Any]) -> None:
    found = widths_with(
        group("grown", 12, before=8, kind="residual"),
        group("pruned", 3, before=6),
        group("kept", 5, before=5),
        group("frozen", 7, reason="a layer norm"),
        group("logits", 1000, kind="output", reason="the output"),
    )
    figure = drawn(figures, found, tmp_path / "x.png")
    left, right = figure.axes
    filled = [bar.get_width() for bar in left.patches if bar.get_fill() and bar.get_x() == 0]
    assert filled == [12, 3, 5, 7, 12], "the logits are cut where the widest group ends"
    assert [bar.get_width() for bar in left.patches if not bar.get_fill()] == [8, 6]
    assert [text.get_text().strip() for text in left.texts] == ["8 → 12", "6 → 3", "5", "7", "1000"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([10] * 5)
    hatched = [bar.get_hatch() is not None for bar in left.patches if bar.get_fill() and bar.get_x() == 0]
    assert hatched == [False, False, False, True, True]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["grown", "pruned", "kept", "frozen", "logits"]
    assert left.get_ylim()[0] > left.get_ylim()[1], "the first layer stands on top"
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key == ["residual: several writers", "hidden: one writer", "keeps its width", "reference"]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (COLUMN, 1), (COLUMN + 1, 2), (201, 3)])
def test_many_groups_stand_in_columns(count: int, columns: int, tmp_path: Path, figures: list[Any]) -> None:
    found = widths_with(*(group(f"features.block{i}.with.a.very.long.path.conv{i}", i + 1) for i in range(count)))
    figure = drawn(figures, found, tmp_path / "x.png")
    assert len(figure.axes) == 2 * columns
    labels = [tick.get_text() for axes in figure.axes[::2] for tick in axes.get_yticklabels()]
    assert len(labels) == len(set(labels)) == count, "shortened names still tell groups apart"
    assert max(len(label) for label in labels) <= 34


def test_long_names_are_told_apart_by_their_ends_where_those_differ() -> None:
    within = ["features.denseblock1.denselayer1.conv1", "features.denseblock1.denselayer2.conv1", "classifier"]
    assert _labels(within) == ["…denseblock1.denselayer1.conv1", "…denseblock1.denselayer2.conv1", "classifier"]
    alike = [f"{part}.blocks.attention.projections.output.linear" for part in ("encoder", "decoder")]
    assert len(set(_labels(alike))) == 2 and max(map(len, _labels(alike))) <= 34
    assert len(_labels(["a" * 50])[0]) == 34


def test_a_path_is_refused_before_the_network_is_traced(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no" / "x.png", "create it first"), (tmp_path / "x.doc", ".png")):
        with pytest.raises(rc.InputError, match=said):
            plot_widths(nn.GroupNorm(1, 3), path)
    with pytest.raises(rc.UnsupportedModelError):
        plot_widths(nn.Sequential(nn.Flatten(), nn.Bilinear(3, 3, 3)), tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    model = Residual().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert rc.plot_widths(model, tmp_path / "x.svg", example=EXAMPLE) == tmp_path / "x.svg"
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_results_stand_beside_their_reference(tmp_path: Path) -> None:
    data = rc.load_data("digits", train_limit=200, test_limit=20)
    reference, _ = rc.build_model("resnet8", stem_stride=4)
    options: dict[str, Any] = {"epochs": 0.1, "attacks": (), "progress": False, "pretrained": True}
    result = rc.compress(reference, data=data, strategy="magnitude", **options)
    found = widths_of(result)
    assert found.before == result.before and found.cost.macs == result.after.macs
    for g in found.groups:
        assert g.before == len(reference.get_parameter(f"{g.name}.weight"))
        assert g.width == len(result.model.get_parameter(f"{g.name}.weight"))
    other = widths_of(result, torch.zeros(2, 3, 64, 64))
    assert other.before is not None and other.before.macs == measure(reference, torch.zeros(1, 3, 64, 64)).macs
    nameless = widths_of(replace(result, spec=None))
    assert all(g.before is None for g in nameless.groups) and nameless.before == result.before
    assert plot_widths(result, tmp_path / "x.png").stat().st_size > 10_000
