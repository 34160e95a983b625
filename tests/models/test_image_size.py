"""The image size that a network was made for, and the refusal of another where it cannot do with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustcompress.errors import InputError
from robustcompress.models import ImageSize, build_model, check_image_size, image_size


@pytest.mark.parametrize(
    ("name", "kwargs", "wanted"),
    [
        ("resnet18", {}, ImageSize(32, 32)),
        ("torchvision:resnet18", {}, ImageSize(224, 224)),
        ("torchvision:inception_v3", {}, ImageSize(299, 299)),
        ("torchvision:vit_b_16", {"image_size": 64}, ImageSize(64, 64, "image_size")),
        ("timm:inception_v3", {}, ImageSize(299, 299)),
        ("timm:efficientnet_b3", {}, ImageSize(288, 288)),
        ("timm:vit_tiny_patch16_224", {}, ImageSize(224, 224, "img_size")),
        ("timm:vit_tiny_patch16_224", {"img_size": (32, 64)}, ImageSize(32, 64, "img_size")),
        ("timm:swin_tiny_patch4_window7_224", {}, ImageSize(224, 224, "img_size")),
        ("timm:levit_128s", {}, ImageSize(224, 224, "img_size")),
    ],
)
def test_the_size_that_a_network_was_made_for(name: str, kwargs: dict[str, Any], wanted: ImageSize) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        model, _ = build_model(name, **kwargs)
    assert image_size(model) == wanted


def test_only_what_does_not_run_is_refused() -> None:
    convolutional, _ = build_model("torchvision:squeezenet1_1")
    transformer, _ = build_model("torchvision:vit_b_16", image_size=32, num_classes=3)
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    check_image_size(convolutional, 64, 64)
    check_image_size(transformer, 32, 32)
    with pytest.raises(InputError, match=r"built for images of 32x32 .* 64x64: build it with image_size=64"):
        check_image_size(transformer, 64, 64)
    assert transformer.training and all(torch.equal(v, state[k]) for k, v in transformer.state_dict().items())


def test_what_timm_scales_to_the_image_is_left_alone() -> None:
    pytest.importorskip("timm")
    model, _ = build_model("timm:test_vit")
    assert image_size(model).argument == "img_size"
    check_image_size(model, 64, 64)
