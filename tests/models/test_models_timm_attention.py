"""Opened attention against timm's own; skipped where timm is not installed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from robustcompress.models import open_attention
from robustcompress.structure import ChannelGroup, StructuralEditor
from tests.models.attention_cases import gathered, scaled, shaken
from tests.models.test_models_windows import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations
    timm = pytest.importorskip("timm")

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NETWORKS: dict[str, tuple[str, dict[str, object]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", SWIN),
    "beit": ("beit_base_patch16_224", PLAIN),
    "beit, one bias for all layers": (
        "beit_base_patch16_224",
        PLAIN | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "eva": ("eva_large_patch14_196", PLAIN),
    "eva-02, fused": ("eva02_tiny_patch14_224", PLAIN),
    "eva-02, apart": ("eva02_tiny_patch14_224", PLAIN | {"qkv_fused": False}),
    "eva-02, norm over the heads": ("eva02_tiny_patch14_224", PLAIN | {"scale_attn_inner": True}),
    "dinov3": ("vit_small_patch16_dinov3", PLAIN),
}
OPEN = [name for name in NETWORKS if "all" not in name and "over" not in name]


def network(name: str, **options: object) -> nn.Module:
    factory, settings = NETWORKS[name]
    return shaken(timm.create_model(factory, num_classes=5, **settings | options), scale=0.2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_timm_networks_are_the_same_under_the_same_names(name: str, training: bool) -> None:
    original = network(name).double().train(training)
    model, noise = copy.deepcopy(original), torch.random.get_rng_state()
    open_attention(model.requires_grad_(False))
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert list(model.state_dict()) == list(original.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training is training for module in model.modules())
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    wanted = original(x)
    torch.manual_seed(1)
    assert_close(model(x), wanted)
    loaded = open_attention(network(name)).train(training).double()
    loaded.load_state_dict(original.state_dict(), strict=True)
    torch.manual_seed(1)
    assert_close(loaded(x), wanted)


@pytest.mark.parametrize("name", ["swin v2", "beit", "eva-02, fused"])
def test_dropout_is_kept(name: str) -> None:
    model = open_attention(network(name, attn_drop_rate=0.5)).train()
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", [name for name in OPEN if name not in ("swin", "eva", "dinov3", "eva-02, apart")])
def test_without_heads_it_computes_what_silent_heads_leave(name: str) -> None:
    module = (
        open_attention(network(name))
        .double()
        .get_submodule("layers.0.blocks.0.attn" if "swin" in name else "blocks.0.attn")
    )
    x = torch.randn(4, 16 if "swin" in name else 17, 24, dtype=torch.float64)
    for keep in ([1], [2, 0]):
        silent = scaled(module, [float(head in keep) for head in range(3)])
        assert_close(gathered(module, keep)(x), silent(x))
    more = scaled(gathered(module, [0, 1, 2, 1]), [1, 0.5, 1, 0.5])
    assert_close(more(x), module(x))


@pytest.mark.parametrize("name", OPEN)
def test_heads_are_found_and_leave_exactly(name: str) -> None:
    model = open_attention(network(name)).double().eval()
    editor = StructuralEditor(model, torch.zeros(2, 3, 32, 32))
    heads = [group for group in editor.editable if group.kind == "heads"]
    assert [group.width for group in heads] == ([3, 3, 6, 6] if "swin" in name else [3, 3])
    x, silent = torch.rand(2, 3, 32, 32, dtype=torch.float64), copy.deepcopy(model)
    before = model(x)
    for group in heads:
        reader = silent.get_submodule(group.readers[0].module)
        with torch.no_grad():
            reader.weight.unflatten(1, (group.width, -1))[:, 1:] = 0
        editor.prune(group.name, [0])
    assert_close(model(x), silent(x))
    assert not torch.allclose(model(x), before, rtol=1e-3)
    again = StructuralEditor(model, torch.zeros(2, 3, 32, 32))
    assert {name: again.widths[name] for name in (g.name for g in heads)} == dict.fromkeys((g.name for g in heads), 1)


def heads_of(name: str) -> list[ChannelGroup]:
    editor = StructuralEditor(open_attention(network(name)), torch.zeros(2, 3, 32, 32))
    return [g for g in editor.groups.values() if any(axis.module.endswith("attn.qkv") for axis in g.writers)]


def test_heads_under_one_bias_of_all_layers_come_and_go_together() -> None:
    (heads,) = heads_of("beit, one bias for all layers")
    assert heads.editable and len([axis for axis in heads.writers if axis.module.endswith("attn.qkv")]) > 1
    assert "rel_pos_bias.relative_position_bias_table" in [axis.module for axis in heads.passers]


def test_a_norm_over_the_heads_moves_with_them() -> None:
    for heads in heads_of("eva-02, norm over the heads"):
        assert heads.editable and not heads.exact
