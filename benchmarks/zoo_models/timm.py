"""Timm's networks, the small ones, cut in depth and width where timm has an option for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from zoo_models.case import Case, Factory, images
from zoo_models.missing_operators import define_missing_operators

define_missing_operators()

import timm  # noqa: E402
from timm.layers import GatedMlp, StdConv2d  # noqa: E402
from timm.models import convmixer, focalnet, metaformer, mlp_mixer, resnetv2  # noqa: E402

CLASSES = 10


def on_images(name: str, size: int = 64, **options: Any) -> Factory:
    """A factory for the network of this name."""
    return lambda: Case(timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), (images(size),))


def of_class(make: Callable[..., nn.Module], *args: Any, size: int = 64, **options: Any) -> Factory:
    """A factory for a class whose names in timm fix the options that are to be changed."""
    return lambda: Case(make(*args, num_classes=CLASSES, **options), (images(size),))


def mixer(**options: Any) -> Factory:
    """A factory for two blocks of an all-perceptron network."""
    return of_class(mlp_mixer.MlpMixer, img_size=64, patch_size=16, num_blocks=2, embed_dim=96, **options)


MODELS: dict[str, Factory] = {
    "efficientnet": on_images("efficientnet_lite0"),
    "efficientnet_v2": on_images("test_efficientnet"),
    "mobilenet_v3": on_images("mobilenetv3_small_050"),
    "mobilenet_v4": on_images("mobilenetv4_conv_small_050"),
    "lcnet": on_images("lcnet_050"),
    "tinynet": on_images("tinynet_e"),
    "ghostnet": on_images("ghostnet_050"),
    "rexnet": on_images("rexnet_100", width_mult=0.5),
    "mnasnet": on_images("mnasnet_small"),
    "convnext": on_images("convnext_atto", depths=(1, 1, 2, 1)),
    "convnext_v2": on_images("convnextv2_atto", depths=(1, 1, 2, 1)),
    "swin": on_images(
        "swin_tiny_patch4_window7_224",
        img_size=64, embed_dim=32, depths=(2, 1, 1), num_heads=(1, 2, 4), window_size=4,
    ),
    "vit": on_images("vit_tiny_patch16_224", img_size=64, depth=2),
    "deit_distilled": on_images("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    "beit": on_images("beit_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3),
    "eva02": on_images("eva02_tiny_patch14_224", img_size=56, depth=2, size=56),
    "cait": on_images("cait_xxs24_224", img_size=64, depth=2),
    "xcit": on_images("xcit_nano_12_p16_224", img_size=64, depth=2),
    "coat": on_images("coat_lite_tiny", img_size=64),
    "pvt_v2": on_images("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "twins": on_images(
        "twins_svt_small", img_size=64, embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1),
        wss=(4, 4, 4, 4),
    ),
    "mixer": mixer(),
    "resmlp": mixer(block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=4),
    "gmlp": mixer(block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=6),
    "convmixer": of_class(convmixer.ConvMixer, 96, 2, kernel_size=7, patch_size=7),
    "mobilevit": on_images("mobilevit_xxs"),
    "mobilevit_v2": on_images("mobilevitv2_050"),
    "edgenext": on_images("edgenext_xx_small"),
    "efficientformer": on_images("efficientformer_l1", size=224, embed_dims=(24, 48, 72, 96), depths=(1, 1, 1, 2)),
    "efficientformer_v2": on_images(
        "efficientformerv2_s0", img_size=64, embed_dims=(24, 32, 48, 64), depths=(1, 1, 1, 2)
    ),
    "fastvit": on_images("fastvit_t8", layers=(1, 1, 1, 1)),
    "levit": on_images("levit_128s", img_size=64, depth=(1, 1, 1)),
    "poolformer": of_class(
        metaformer.MetaFormer, depths=(1, 1, 1, 1), dims=(24, 48, 72, 96), token_mixers=metaformer.Pooling,
    ),
    "inception_next": on_images("inception_next_atto", depths=(1, 1, 1, 1)),
    "starnet": on_images("starnet_s1", depths=(1, 1, 1, 1)),
    "repvgg": on_images("repvgg_a0"),
    "mobileone": on_images("mobileone_s0"),
    "repvit": on_images("repvit_m0_9", depth=(1, 1, 1, 1)),
    "regnet_x": on_images("regnetx_002"),
    "regnet_y": on_images("regnety_002"),
    "resnext": on_images("resnext50_32x4d", layers=(1, 1, 1, 1), cardinality=8, base_width=8),
    "seresnet": on_images("seresnet18", layers=(1, 1, 1, 1)),
    "res2net": on_images("res2net50_26w_4s", layers=(1, 1, 1, 1), base_width=8),
    "skresnet": on_images("skresnet18", layers=(1, 1, 1, 1)),
    "resnet_v2": on_images("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 64, 96, 128), stem_chs=16),
    "bit": of_class(
        resnetv2.ResNetV2, (1, 1, 1), channels=(128, 128, 256), stem_chs=32, stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
    ),
    "nfnet": on_images("test_nfnet"),
    "densenet": on_images("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    "vovnet": on_images("ese_vovnet19b_slim_dw"),
    "dla": on_images("dla46_c"),
    "hardcorenas": on_images("hardcorenas_a"),
    "sequencer": on_images(
        "sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(48, 96, 96, 96), hidden_sizes=(12, 24, 24, 24)
    ),
    "coatnet": on_images("coatnet_pico_rw_224", img_size=64),
    "davit": on_images("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(24, 48, 72, 96), num_heads=(1, 2, 3, 4)),
    "focalnet": of_class(focalnet.FocalNet, depths=(1, 1, 1, 1), embed_dim=24),
    "mambaout": on_images("mambaout_femto", depths=(1, 1, 1, 1)),
    "tiny_vit": on_images("tiny_vit_5m_224"),
}  # fmt: skip
