import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robustcompress.errors import InputError
from robustcompress.models import Normalize, build_model, list_models, resnet18, resnet20, vit_micro
from robustcompress.models.densenet import DenseLayer
from robustcompress.models.mobilenet import InvertedResidual
from robustcompress.models.resnet import BasicBlock, PreActBlock

# Parameters and multiply-adds of convolutions and linear layers at 32x32, 10 classes. ResNet-18, WRN-28-10,
# DenseNet-121 and MobileNetV2 (torchvision's layers with 10 classes) are the published counts; the rest follow
# from the papers' tables. For transformers the two products of attention are in them.
COUNTS = {
    "resnet8": (78_042, 12_501_632),
    "resnet20": (272_474, 40_813_184),
    "resnet32": (466_906, 69_124_736),
    "resnet44": (661_338, 97_436_288),
    "resnet56": (855_770, 125_747_840),
    "resnet18": (11_173_962, 555_422_720),
    "preact_resnet18": (11_172_170, 555_422_720),
    "wrn_16_4": (2_748_890, 392_612_352),
    "wrn_28_4": (5_849_050, 845_597_184),
    "wrn_28_10": (36_479_194, 5_243_328_768),
    "vgg16_bn": (14_724_042, 313_201_664),
    "mobilenet_v2": (2_236_682, 87_976_448),
    "densenet121": (6_956_298, 888_350_720),
    "vit_tiny": (2_693_194, 179_898_240),
    "vit_micro": (62_890, 4_866_528),
}
ALLOWED = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Linear,
    nn.LayerNorm,
    nn.GELU,
    Normalize,
)


@pytest.mark.parametrize("name", list_models())
def test_counts_are_those_of_the_literature(name: str) -> None:
    model = build_model(name)[0].eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.rand(1, 3, 32, 32))
    assert logits.shape == (1, 10)
    num_params = sum(p.numel() for p in model.parameters())
    assert (num_params, counter.get_total_flops() // 2) == COUNTS[name]


def test_resnet20_follows_the_closed_form_of_its_table() -> None:
    def block(c_in: int, c: int, side: int) -> tuple[int, int]:
        weights = 9 * c_in * c + 9 * c * c + (c_in * c if c_in != c else 0)
        norms = 4 * c + (2 * c if c_in != c else 0)
        return weights + norms, weights * side * side

    parts = [(3 * 16 * 9 + 2 * 16, 3 * 16 * 9 * 32 * 32), (64 * 10 + 10, 64 * 10)]
    for c_in, c, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        parts += [block(c_in, c, side), block(c, c, side), block(c, c, side)]
    assert tuple(map(sum, zip(*parts, strict=True))) == COUNTS["resnet20"]


@pytest.mark.parametrize("name", ["vit_tiny", "vit_micro"])
def test_transformers_follow_the_closed_form_of_their_table(name: str) -> None:
    depth, c, hidden, tokens = {"vit_tiny": (6, 192, 768, 64), "vit_micro": (3, 48, 96, 64)}[name]
    weights, biases = 4 * c * c + 2 * c * hidden, 5 * c + hidden
    params = depth * (weights + biases + 2 * 2 * c) + (48 * c + c) + tokens * c + 2 * c + (10 * c + 10)
    macs = depth * (tokens * weights + 2 * tokens * tokens * c) + tokens * 48 * c + 10 * c
    assert (params, macs) == COUNTS[name]


@pytest.mark.parametrize("name", list_models())
def test_trains_at_any_width_stride_and_number_of_classes(name: str) -> None:
    torch.manual_seed(0)
    model, _ = build_model(name, num_classes=7, width=0.125, stem_stride=2)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    logits = model.train()(x)
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
    # All widths of the full model times 0.125, never below 4.
    for small, full in zip(_channels(model), _channels(build_model(name)[0]), strict=True):
        assert small >= 4 and (small <= max(4, full // 4))


def _channels(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", list_models())
def test_only_editable_layers_and_a_clean_state_dict(name: str) -> None:
    with torch.device("meta"):
        model, _ = build_model(name)
    for key, module in model.named_modules():
        if not list(module.children()):
            assert isinstance(module, (*ALLOWED, nn.Sequential)), key
        if isinstance(module, nn.Conv2d):
            assert module.groups in (1, module.in_channels), key
    assert not [key for key in model.state_dict() if "mean" in key.split(".") or "std" in key.split(".")]


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_4", "vgg16_bn", "mobilenet_v2", "densenet121"])
def test_forward_knows_no_channel_number(name: str) -> None:
    """The classifier reads a flattened mean over space, and no forward holds a number other than an axis."""
    model = build_model(name, width=0.25)[0].eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[torch.Size] = []
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(torch.rand(2, 3, 32, 32))
    assert seen == [(2, last.in_features)]
    source = [type(m).forward.__code__.co_consts for m in model.modules() if type(m).__module__.startswith("robust")]
    assert all(c in (None, 0, 1, 2) or isinstance(c, str) for consts in source for c in consts)


def test_normalisation_is_inside() -> None:
    torch.manual_seed(0)
    inside = resnet20(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5)).eval()
    torch.manual_seed(0)
    identity = resnet20(mean=(0, 0, 0), std=(1, 1, 1)).eval()
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(inside(x), identity(by_hand))


def test_blocks_add_or_join_their_input() -> None:
    """With the last layer silenced, what is left of a block is its input."""
    x = torch.randn(2, 16, 8, 8)
    basic, preact = BasicBlock(16, 16, 1).eval(), PreActBlock(16, 16, 1).eval()
    inverted, dense = InvertedResidual(16, 16, 1, 6).eval(), DenseLayer(16, 8).eval()
    for layer in (basic.bn2, preact.conv2, inverted.layers[-1], dense.conv2):
        nn.init.zeros_(layer.weight)
    assert torch.equal(basic(x), x.relu())
    assert torch.equal(preact(x), x)
    assert torch.equal(inverted(x), x)
    assert torch.equal(dense(x), torch.cat([x, torch.zeros(2, 8, 8, 8)], 1))


def test_positions_follow_the_size_of_the_images() -> None:
    """Where every position is the same, how many there are makes no difference."""
    torch.manual_seed(0)
    small, large = vit_micro(image_size=16).eval(), vit_micro(image_size=32).eval()
    assert small.position.shape == (1, 48, 4, 4) and large.position.shape == (1, 48, 8, 8)
    x, same = torch.rand(2, 3, 16, 16), torch.randn(1, 48, 1, 1)
    large.load_state_dict({key: v for key, v in small.state_dict().items() if key != "position"}, strict=False)
    small.position.data, large.position.data = same.expand(1, 48, 4, 4), same.expand(1, 48, 8, 8)
    torch.testing.assert_close(large(x), small(x))
    large.position.data = torch.randn(1, 48, 8, 8) * 5
    shifted = large(x.roll(4, -1))
    assert not torch.allclose(shifted, large(x), atol=1e-3), "positions are not used"


def test_every_parameter_of_a_transformer_can_be_drawn_anew() -> None:
    model = vit_micro()
    for key, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            assert callable(getattr(module, "reset_parameters", None)), key
    before = model.position.detach().clone()
    model.reset_parameters()
    assert not torch.equal(model.position, before)
    assert model.position.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "kwargs", [{"depth": 0}, {"heads": 1.5}, {"dim": True}, {"patch": -4}, {"mlp_ratio": 0}, {"depth": 0, "heads": 0}]
)
def test_bad_arguments_of_transformers(kwargs: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        vit_micro(**kwargs)  # type: ignore[arg-type]
    assert all(f"{key}={value!r}: " in str(caught.value) for key, value in kwargs.items())


def test_weights_have_the_scale_of_he() -> None:
    torch.manual_seed(0)
    model = resnet18()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert not model.fc.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)


def test_initialisation_keeps_the_signal_and_the_first_loss_small() -> None:
    torch.manual_seed(0)
    model = resnet18(width=0.25)
    x = torch.rand(32, 3, 32, 32)
    loss = nn.functional.cross_entropy(model(x), torch.randint(10, (32,)))
    assert 1.5 < loss.item() < 5  # log(10) = 2.3 for an even guess


def test_channels_last_and_meta_give_the_same_model() -> None:
    model = resnet20(width=0.25).eval()
    x = torch.rand(2, 3, 32, 32)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)
    with torch.device("meta"):
        twin = resnet20(width=0.25).eval()
    twin.load_state_dict(model.state_dict(), assign=True)  # the normalisation was never lost
    torch.testing.assert_close(twin(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": 10.0}, "num_classes=10.0"),
        ({"width": 0}, "width=0"),
        ({"stem_stride": 0}, "stem_stride=0"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (1, 1, 0)}, "must be positive"),
        ({"width": -1, "mean": "grey"}, "mean='grey'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        resnet20(**kwargs)  # type: ignore[arg-type]
    assert all(f"{key}=" in str(caught.value) for key in kwargs)
