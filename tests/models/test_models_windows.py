"""Opened attention within windows against torchvision's own, and without heads against heads that say nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.maxvit import MaxVit, RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from robustcompress.errors import UnsupportedModelError
from robustcompress.export import export_onnx
from robustcompress.models import build_model, open_attention
from robustcompress.models.windows import CosineWindowAttention, PartitionAttention, WindowAttention
from tests.models.attention_cases import gathered, scaled, shaken

DIM = 12
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

# Window, shift, size of the feature maps: whole windows; padding on both sides; one window fills one direction; one
# window fills both; a shift in one direction only; a window larger than the map.
PLACES = [
    ((4, 4), (0, 0), (8, 8)),
    ((4, 4), (2, 2), (8, 12)),
    ((3, 4), (1, 2), (7, 9)),
    ((4, 4), (2, 2), (4, 9)),
    ((4, 4), (2, 2), (4, 4)),
    ((2, 3), (0, 1), (5, 5)),
    ((7, 7), (3, 3), (5, 5)),
]
BOTH = pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])


def opened(module: nn.Module) -> nn.Module:
    return open_attention(nn.Sequential(copy.deepcopy(module)))[0]


def swin(version: int = 1, **options: object) -> SwinTransformer:
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    settings = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": [4, 4]}
    return SwinTransformer(**settings | {"num_classes": 10} | second | options)  # type: ignore[arg-type]


def maxvit() -> MaxVit:
    sizes = {"input_size": (32, 32), "stem_channels": 8, "partition_size": 2, "head_dim": 4}
    return MaxVit(**sizes, block_channels=[16, 32], block_layers=[1, 1], stochastic_depth_prob=0.2, num_classes=10)


WHOLE = {"swin": swin, "swin v2": lambda: swin(2), "maxvit": maxvit}
whole = pytest.mark.parametrize("name", WHOLE)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().abs().max() / wanted.detach().abs().max()) <= TOLERANCE[wanted.dtype]


@BOTH
@pytest.mark.parametrize(("window", "shift", "size"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_shifted_windows_compute_what_torchvisions_do(
    kind: type[nn.Module],
    window: tuple[int, int],
    shift: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    training: bool,
) -> None:
    heads = 2 if training else 3
    original = kind(DIM, list(window), list(shift), heads, attention_dropout=0.2, dropout=0.1)
    original = shaken(original).to(dtype).train(training)
    module = opened(original)
    x = torch.randn(2, *size, DIM, dtype=dtype, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    wanted = original(x)
    torch.manual_seed(3)  # the same entries are dropped
    assert_close(module(x), wanted)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_torchvisions_and_that_of_the_keys_bias_is_zero(kind: type[nn.Module], bias: bool) -> None:
    original = kind(DIM, [3, 4], [1, 2], 3)
    if not bias:
        original.qkv.bias = original.proj.bias = None
    original, x = shaken(original).double(), torch.randn(2, 7, 9, DIM, dtype=torch.float64)
    module = opened(original)
    for net in (original, module):
        net(x).square().sum().backward()
    wanted = dict(original.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-8, atol=1e-8)
    if bias and kind is ShiftedWindowAttentionV2:
        assert float(module.qkv.bias.grad[DIM : 2 * DIM].abs().max()) == 0, "an optimizer that normalises would follow"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 4), (3, 16)])
def test_partitions_compute_what_torchvisions_do(dtype: torch.dtype, heads: int, tokens: int) -> None:
    original = shaken(RelativePositionalMultiHeadAttention(DIM, DIM // heads, tokens)).to(dtype)
    x = torch.randn(2, 5, tokens, DIM, dtype=dtype)
    assert_close(opened(original)(x), original(x))


@whole
@pytest.mark.parametrize("training", [False, True])
def test_whole_networks_are_the_same_under_the_same_names(name: str, training: bool) -> None:
    torch.manual_seed(0)
    original = shaken(WHOLE[name](), scale=0.15).double().train(training)
    model, noise = copy.deepcopy(original), torch.random.get_rng_state()
    model.requires_grad_(False)
    assert open_attention(model) is model
    assert torch.equal(torch.random.get_rng_state(), noise), "opening draws random numbers"
    assert all(module.training is training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters()), "opening thaws"
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(5)
    wanted = original(x)
    torch.manual_seed(5)
    assert_close(model(x), wanted)
    attention = (WindowAttention, CosineWindowAttention, PartitionAttention)
    assert sum(isinstance(module, attention) for module in model.modules()) == 4


@whole
def test_weights_saved_before_opening_are_loaded_after_it(name: str) -> None:
    original, model = shaken(WHOLE[name](), scale=0.15).eval(), open_attention(WHOLE[name]()).eval()
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    assert_close(model(x), original(x))
    again = WHOLE[name]().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(x), original(x))


@pytest.mark.parametrize("version", [1, 2])
def test_images_that_are_no_whole_windows(version: int) -> None:
    original = shaken(swin(version), scale=0.15).eval()
    x = torch.rand(2, 3, 44, 36)
    assert_close(open_attention(copy.deepcopy(original))(x), original(x))


def test_networks_by_name_come_opened() -> None:
    model, _ = build_model("torchvision:swin_t", num_classes=10)
    assert sum(isinstance(module, WindowAttention) for module in model.modules()) == 12
    assert not any(isinstance(module, ShiftedWindowAttention) for module in model.modules())
    before = list(model.modules())
    assert list(open_attention(model).modules()) == before, "what is open stays"


MODULES = {
    "v1": lambda: ShiftedWindowAttention(DIM, [3, 4], [1, 2], 4),
    "v2": lambda: ShiftedWindowAttentionV2(DIM, [3, 4], [1, 2], 4),
    "maxvit": lambda: RelativePositionalMultiHeadAttention(DIM, 3, 16),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("keep", [[0], [1, 3], [3, 0, 2], [0, 1, 2, 3]])
def test_without_heads_it_computes_what_silent_heads_leave(name: str, keep: list[int]) -> None:
    module = opened(shaken(MODULES[name]())).double()
    x = torch.randn(2, *((5, 16) if name == "maxvit" else (7, 9)), DIM, dtype=torch.float64)
    silent = scaled(module, [float(head in keep) for head in range(4)])
    assert_close(gathered(module, keep)(x), silent(x))


@pytest.mark.parametrize("name", MODULES)
def test_heads_that_are_there_twice_and_speak_half_as_loud_change_nothing(name: str) -> None:
    module = opened(shaken(MODULES[name]())).double()
    x = torch.randn(2, *((5, 16) if name == "maxvit" else (7, 9)), DIM, dtype=torch.float64)
    more = gathered(module, [0, 1, 2, 3, 1, 0])
    assert_close(scaled(more, [0.5, 0.5, 1, 1, 0.5, 0.5])(x), module(x))


@pytest.mark.parametrize(
    "name", ["swin v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "maxvit"))]
)
def test_networks_without_some_heads_are_exported(name: str, tmp_path: Path) -> None:
    model = open_attention(shaken(WHOLE[name](), scale=0.15)).eval()
    for path, module in list(model.named_modules()):
        if hasattr(module, "head_dim") and hasattr(module, "relative_position_index"):
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, gathered(module, [2, 0]))
    export_onnx(model, tmp_path / "model.onnx", image_shape=(3, 32, 32))  # compares before it writes
    assert (tmp_path / "model.onnx").exists()


def test_what_is_not_exactly_torchvisions_stays() -> None:
    class Own(ShiftedWindowAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = open_attention(nn.Sequential(Own(DIM, [4, 4], [0, 0], 3)))
    assert type(model[0]) is Own


@pytest.mark.parametrize("name", MODULES)
def test_the_model_itself_cannot_be_replaced(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="attention: it is the model itself"):
        open_attention(MODULES[name]())
