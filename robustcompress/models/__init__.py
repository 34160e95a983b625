"""Reference models for 32x32 images, and the names by which any model is built again.

Every built-in maps float images in [0, 1] to logits with the normalisation inside, and holds only layers
that can be physically edited: no channel number is used in any `forward`.
"""

from __future__ import annotations

from robustcompress.models.attention import Attention, open_attention
from robustcompress.models.densenet import densenet121
from robustcompress.models.identify import identify
from robustcompress.models.image_size import ImageSize, check_image_size, image_size
from robustcompress.models.mobilenet import mobilenet_v2
from robustcompress.models.normalize import Normalize
from robustcompress.models.registry import (
    ModelSpec,
    build_model,
    list_models,
    list_torchvision_models,
)
from robustcompress.models.resnet import (
    preact_resnet18,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
)
from robustcompress.models.timm_models import list_timm_models
from robustcompress.models.vgg import vgg16_bn
from robustcompress.models.vit import vit_micro, vit_tiny
from robustcompress.models.wrn import wrn_16_4, wrn_28_4, wrn_28_10

__all__ = [
    "Attention",
    "ImageSize",
    "ModelSpec",
    "Normalize",
    "build_model",
    "check_image_size",
    "densenet121",
    "identify",
    "image_size",
    "list_models",
    "list_timm_models",
    "list_torchvision_models",
    "mobilenet_v2",
    "open_attention",
    "preact_resnet18",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg16_bn",
    "vit_micro",
    "vit_tiny",
    "wrn_16_4",
    "wrn_28_4",
    "wrn_28_10",
]
