"""Which networks the sweep takes: all built-in ones, all of torchvision's classifiers, and many families of timm."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import torch
from torch import nn

from robustcompress import build_model
from robustcompress.models import list_models, list_torchvision_models

TIMM = (
    # residual networks
    *("resnet10t", "resnet26d", "resnet26t", "resnetv2_18", "resnetv2_50", "resnext26ts", "seresnet18", "skresnet18"),
    *("seresnext26d_32x4d", "ecaresnet26t", "gcresnext26ts", "res2net50_26w_4s", "resnest14d", "botnet26t_256"),
    *("halonet26t", "lambda_resnet26t", "bat_resnext26ts", "nf_resnet26", "resnet50_gn", "resnetv2_50x1_bit"),
    *("regnetx_002", "regnety_002", "regnetz_b16", "nf_regnet_b0", "eca_nfnet_l0"),
    # made for phones
    *("efficientnet_b0", "efficientnet_lite0", "efficientnet_es", "tf_efficientnet_b0", "tf_efficientnetv2_b0"),
    *("efficientnetv2_rw_t", "efficientnet_b0_gn", "efficientnet_b0_g8_gn", "efficientnet_b0_g16_evos"),
    *("tf_mobilenetv3_small_minimal_100", "tf_mixnet_s", "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "ghostnet_050", "ghostnetv2_100", "ghostnetv3_100"),
    *("mnasnet_small", "semnasnet_075", "fbnetc_100", "fbnetv3_b", "hardcorenas_a", "spnasnet_100", "lcnet_050"),
    *("tinynet_e", "rexnet_100", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "mobileone_s0", "fastvit_t8"),
    *("starnet_s1", "shvit_s1", "hgnetv2_b0"),
    # other convolutional networks
    *("densenet121", "rdnet_tiny", "dla46_c", "dla46x_c", "dla60_res2net", "hrnet_w18_small", "vgg11_bn"),
    *("ese_vovnet19b_slim", "ese_vovnet19b_dw", "selecsls42", "cspresnet50", "cs3darknet_s", "darknet17", "xception41"),
    *("inception_v3", "inception_v4", "inception_next_atto", "convnext_atto", "convnext_zepto_rms", "convnextv2_atto"),
    *("edgenext_xx_small", "convmixer_768_32", "mambaout_femto", "focalnet_tiny_srf", "convformer_s18"),
    # of linear layers
    *("mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "gmixer_12_224", "poolformer_s12", "sequencer2d_s"),
    # with attention
    *("vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vit_relpos_small_patch16_224", "vit_wee_patch16_reg1_gap_256"),
    *("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "flexivit_small"),
    *("hiera_tiny_224", "davit_tiny", "swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256"),
    *("swinv2_cr_tiny_224", "pvt_v2_b0", "caformer_s18", "coatnet_nano_rw_224", "coatnext_nano_rw_224"),
    *("maxvit_rmlp_pico_rw_256", "maxxvit_rmlp_nano_rw_256", "mobilevit_xxs", "mobilevitv2_050", "levit_128s"),
    *("levit_conv_128s", "xcit_nano_12_p16_224", "cait_xxs24_224", "tnt_s_patch16_224", "nest_tiny"),
    *("crossvit_tiny_240", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny", "volo_d1_224", "mvitv2_tiny"),
    *("gcvit_xxtiny", "convit_tiny", "coat_tiny", "coat_lite_tiny", "pit_ti_224", "tiny_vit_5m_224", "nextvit_small"),
    *("swiftformer_xs", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0"),
    *("csatv2", "sehalonet33ts"),
)
"""At least one of every family whose smallest network takes seconds, not minutes, on one core."""

AUXILIARY = ("torchvision:googlenet aux_logits=True", "torchvision:inception_v3 aux_logits=True")
"""Beside torchvision's names: networks with classifiers that only training uses, which build_model leaves out."""

WORDS = ("built-in", "torchvision", "timm")


def names_of(words: Sequence[str]) -> list[str]:
    """Model names, each once: the words "built-in", "torchvision" and "timm" stand for all of theirs."""
    lists = {
        "built-in": lambda: [f"robustcompress:{name}" for name in list_models()],
        "torchvision": lambda: [*(f"torchvision:{name}" for name in list_torchvision_models()), *AUXILIARY],
        "timm": lambda: [f"timm:{name}" for name in TIMM],
    }
    named = [name for word in words for name in (lists[word]() if word in lists else [word])]
    return list(dict.fromkeys(named))


def build_named(name: str) -> nn.Module:
    """Build a network by a name of this list, behind which arguments of its factory may stand."""
    bare, *arguments = name.split()
    pairs = (argument.partition("=") for argument in arguments)
    model, _ = build_model(bare, **{key: ast.literal_eval(value) for key, _, value in pairs})
    return model


def parameters_of(name: str) -> int:
    """How many parameters a network has, without making their values where its constructor permits that."""
    try:
        with torch.device("meta"):
            model = build_named(name)
    except Exception:  # whatever a constructor raises that looks at values
        return _parameters_told(name)
    return sum(p.numel() for p in model.parameters())


def _parameters_told(name: str) -> int:
    """What torchvision says of a network that has its weights; 0 for others."""
    if not name.startswith("torchvision:"):
        return 0
    import torchvision

    weights = torchvision.models.get_model_weights(name.split()[0].partition(":")[2])
    return int(next(iter(weights)).meta["num_params"])
