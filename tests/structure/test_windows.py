"""Heads of attention within windows as a group: what holds them, and edits of whole networks against an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.models import open_attention
from robustcompress.structure import AttentionKind, Axis, Segment, StructuralEditor, attention
from robustcompress.structure.attention import find_heads
from tests.models.attention_cases import gathered, shaken
from tests.models.test_models_windows import MODULES, WHOLE
from tests.structure.test_attention import HEAD_DIM, HEADS, Counted, editor_of, taught

__all__ = ["taught"]  # a fixture

EXAMPLE = torch.zeros(2, 3, 32, 32)


def whole(name: str) -> nn.Module:
    return open_attention(shaken(WHOLE[name](), scale=0.2)).double().eval()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "reader", "held", "params"),
    [
        ("v1", "proj", {("qkv", "out"): [3] * 3, ("relative_position_bias_table", "param"): [1]}, {"table": 1}),
        (
            "v2",
            "proj",
            {("qkv", "out"): [3] * 3, ("cpb_mlp.2", "out"): [1], ("logit_scale", "param"): [1]},
            {"logit_scale": 0},
        ),
        ("maxvit", "merge", {("to_qkv", "out"): [3] * 3, ("relative_position_bias_table", "param"): [1]}, {"table": 1}),
    ],
)
def test_what_holds_heads(
    name: str, reader: str, held: dict[tuple[str, str], list[int]], params: dict[str, int]
) -> None:
    model = open_attention(nn.Sequential(MODULES[name]()))
    (heads,) = find_heads(model)
    writer = next(iter(held))[0]
    assert (heads.module, heads.group, heads.width) == ("0", f"0.{writer}", 4)
    wanted = {(reader, "in"): [3]} | held
    assert heads.axes == {
        Axis(f"0.{path}", side): tuple(Segment(heads.group, n) for n in copies)  # type: ignore[arg-type]
        for (path, side), copies in wanted.items()
    }
    assert heads.param_dims == {
        f"0.{key.replace('table', 'relative_position_bias_table')}": d for key, d in params.items()
    }


@pytest.mark.parametrize("name", MODULES)
def test_attention_that_is_not_opened_has_no_heads_to_remove(name: str) -> None:
    found = list(find_heads(nn.Sequential(MODULES[name]())))
    assert found == [] or name == "maxvit", "MaxViT's says how wide its heads are; the proof finds that they must stay"


@pytest.mark.parametrize("name", WHOLE)
def test_heads_of_a_whole_network_leave_and_come(name: str) -> None:
    model = whole(name)
    editor, x = StructuralEditor(model, EXAMPLE, seed=3), images()
    heads = [group for group in editor.groups.values() if group.kind == "heads"]
    assert [group.width for group in heads] == ([4, 4, 8, 8] if name == "maxvit" else [3, 3, 6, 6])
    assert all(group.editable and group.min_width == 1 for group in heads), [group.reason for group in heads]
    by_hand = copy.deepcopy(model)
    for number, group in enumerate(heads):
        keep = [[1], [0, 2], [2, 3], [0, 1, 2, 5]][number]
        owner, _, attribute = editor.layout.attention[group.name].rpartition(".")
        module = getattr(by_hand.get_submodule(owner), attribute)
        setattr(by_hand.get_submodule(owner), attribute, gathered(module, keep))
        editor.prune(group.name, keep)
    assert list(model.state_dict()) == list(by_hand.state_dict())
    for key, value in by_hand.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    pruned = model(x)
    torch.testing.assert_close(pruned, by_hand(x), rtol=1e-12, atol=0)
    again = StructuralEditor(model, EXAMPLE)
    assert {g.name: again.groups[g.name].width for g in heads} == {g.name: editor.widths[g.name] for g in heads}
    for init in ("pair", "zero_out", "clone"):
        for group in heads:
            editor.grow(group.name, 3, init=init)
        torch.testing.assert_close(model(x), pruned, rtol=1e-6, atol=1e-9)  # a clone's thirds are float32
    model.train()(x).sum().backward()


@pytest.mark.parametrize("name", WHOLE)
def test_edits_are_replayed(name: str) -> None:
    model = whole(name)
    editor = StructuralEditor(model, EXAMPLE)
    for group in [group for group in editor.groups.values() if group.kind == "heads"]:
        editor.prune(group.name, [0, group.width - 1])
    again = open_attention(WHOLE[name]()).double().eval()
    StructuralEditor.replay(again, EXAMPLE, editor.edits)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images()), model(images()))


class Tabled(Counted):
    """With a bias a head, under a name that no built-in kind knows."""

    def __init__(self, table: Callable[[], nn.Module | nn.Parameter]) -> None:
        super().__init__()
        self.slopes = table()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[1]
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        slopes = self.slopes if isinstance(self.slopes, nn.Parameter) else self.slopes(x.new_ones(1, 2)).flatten()
        far = torch.arange(t, dtype=x.dtype)[None, :] - torch.arange(t, dtype=x.dtype)[:, None]
        weights = (q @ k.transpose(-2, -1) - slopes[:, None, None] * far.abs()).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_further_parameters_and_layers_are_taught(taught: None) -> None:
    attention.teach_attention(Tabled, AttentionKind(params=(("slopes", 0),), rows=("slopes",)))
    for table in (lambda: nn.Parameter(torch.rand(HEADS)), lambda: nn.Linear(2, HEADS)):
        editor = editor_of(Tabled(table))
        assert [(g.name, g.width) for g in editor.editable if g.exact] == [("attn.qkv", HEADS)]
        editor.resize("attn.qkv", [2, 0])
        slopes = editor.model.attn.slopes
        assert len(slopes if isinstance(slopes, nn.Parameter) else slopes.weight) == 2


def test_parameters_that_do_not_fit_what_is_taught_are_said(taught: None) -> None:
    attention.teach_attention(Tabled, AttentionKind(params=(("slopes", 0),)))
    with pytest.raises(InputError, match=r"'slopes' of shape \[5\] does not hold 4 heads along dimension 0"):
        list(find_heads(Tabled(lambda: nn.Parameter(torch.rand(5)))))
    attention.teach_attention(Tabled, AttentionKind(params=(("slopes", 2),)))
    with pytest.raises(InputError, match=r"'slopes' of shape \[4\] does not hold 4 heads along dimension 2"):
        list(find_heads(Tabled(lambda: nn.Parameter(torch.rand(4)))))
    with pytest.raises(InputError, match="count dimensions from the first"):
        AttentionKind(params=(("slopes", -1),))


def test_what_merely_has_such_a_name_is_passed_over() -> None:
    module = Counted()
    module.logit_scale = nn.Parameter(torch.ones(1))
    (heads,) = find_heads(module)
    assert heads.param_dims == {} and Axis("logit_scale", "param") not in heads.axes


def test_what_is_taught_names_all_that_holds_heads(taught: None) -> None:
    attention.teach_attention(Counted, AttentionKind())
    module = Counted()
    module.logit_scale = nn.Parameter(torch.ones(1))  # for all heads together, and not named
    (heads,) = find_heads(module)
    assert heads.param_dims == {}
