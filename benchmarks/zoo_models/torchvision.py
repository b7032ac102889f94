"""Torchvision's networks, narrow and shallow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from zoo_models.case import Case, Factory, clips, images
from zoo_models.missing_operators import define_missing_operators

define_missing_operators()

from torchvision import models  # noqa: E402
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, resnet, vgg, video  # noqa: E402
from torchvision.models import swin_transformer as swin  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.segmentation import deeplabv3, fcn, lraspp  # noqa: E402
from torchvision.models.video import mvit  # noqa: E402
from torchvision.models.video import resnet as video_resnet  # noqa: E402
from torchvision.models.video import swin_transformer as swin3d  # noqa: E402

CLASSES = 10


def on_images(make: Callable[..., nn.Module], *args: Any, size: int = 64, **options: Any) -> Factory:
    """A factory for a network of images."""
    return lambda: Case(make(*args, **options), (images(size),))


def on_clips(make: Callable[..., nn.Module], *args: Any, frames: int = 4, size: int = 32, **options: Any) -> Factory:
    """A factory for a network of videos."""
    return lambda: Case(make(*args, **options), (clips(frames, size),))


def classifier(features: int) -> nn.Sequential:
    """Two linear layers in place of those of 4,096 units."""
    return nn.Sequential(
        nn.Linear(features, 128), nn.ReLU(True), nn.Dropout(), nn.Linear(128, 64), nn.ReLU(True), nn.Linear(64, CLASSES)
    )


def alexnet() -> nn.Module:
    """AlexNet with a narrow classifier."""
    model = models.alexnet()
    model.classifier = classifier(256 * 6 * 6)
    return model


def narrow_vgg(batch_norm: bool) -> nn.Module:
    """VGG-11 at a quarter of its width."""
    layers: list[Any] = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    model = vgg.VGG(vgg.make_layers(layers, batch_norm=batch_norm), init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d((2, 2)), classifier(128 * 4)
    return model


def short_resnet(block: type[nn.Module], layers: Sequence[int] = (1, 1, 1, 1), **options: Any) -> nn.Module:
    """A ResNet of one block a stage."""
    return resnet.ResNet(block, list(layers), num_classes=CLASSES, **options)  # type: ignore[arg-type]


def without_last_stage(model: nn.Module, features: int) -> nn.Module:
    """A ResNet of three stages, for 2-d or 3-d convolutions."""
    model.layer4, model.fc = nn.Identity(), nn.Linear(features, CLASSES)
    return model


def narrow_efficientnet(name: str, **options: Any) -> nn.Module:
    """An EfficientNet whose stages are cut to one block."""
    settings, _ = efficientnet._efficientnet_conf(name, **options)
    for setting in settings:
        setting.num_layers = 1
    return efficientnet.EfficientNet(settings[:5], 0.2, num_classes=CLASSES, last_channel=128)


def narrow_mobilenetv3(name: str) -> nn.Module:
    """MobileNetV3 at half its width."""
    settings, last = mobilenetv3._mobilenet_v3_conf(name, width_mult=0.5)
    return mobilenetv3.MobileNetV3(settings, last, num_classes=CLASSES)


def narrow_regnet(se_ratio: float | None) -> nn.Module:
    """RegNetX, or Y with squeeze and excitation."""
    parameters = regnet.BlockParams.from_init_params(
        depth=6, w_0=24, w_a=24.0, w_m=2.2, group_width=8, se_ratio=se_ratio
    )
    return regnet.RegNet(parameters, num_classes=CLASSES)


def narrow_convnext() -> nn.Module:
    """ConvNeXt of one block a stage."""
    stages = [convnext.CNBlockConfig(a, b, 1) for a, b in pairwise((24, 48, 96, 192, None))]
    return convnext.ConvNeXt(stages, num_classes=CLASSES)


def narrow_swin(block: type[nn.Module], downsample: type[nn.Module]) -> nn.Module:
    """Swin of one or two blocks a stage."""
    return swin.SwinTransformer(
        [4, 4], 32, [2, 1, 1], [1, 2, 4], [4, 4], num_classes=CLASSES,
        block=block, downsample_layer=downsample,
    )  # fmt: skip


def segmented(head: Callable[[int, int], nn.Module], net: Callable[..., nn.Module]) -> nn.Module:
    """A segmentation head on three stages of a ResNet."""
    backbone = IntermediateLayerGetter(short_resnet(resnet.BasicBlock), {"layer3": "out"})
    return net(backbone, head(256, 5))


def narrow_lraspp() -> nn.Module:
    """LR-ASPP on MobileNetV3."""
    settings, last = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_large", dilated=True)
    return lraspp._lraspp_mobilenetv3(mobilenetv3.MobileNetV3(settings, last), 5)


def short_video_resnet(makers: Sequence[type[nn.Module]], stem: type[nn.Module]) -> nn.Module:
    """A video ResNet of three stages with one block each."""
    model = video_resnet.VideoResNet(video_resnet.BasicBlock, makers, [1, 1, 1, 1], stem, num_classes=CLASSES)  # type: ignore[arg-type]
    return without_last_stage(model, 256)


def s3d() -> nn.Module:
    """S3D, which pools what is left of small clips."""
    model = video.s3d(num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d(1)
    return model


def narrow_swin3d() -> nn.Module:
    """Video Swin of two stages."""
    return swin3d.SwinTransformer3d([2, 4, 4], 32, [2, 1], [2, 4], [2, 4, 4], num_classes=CLASSES)


def narrow_mvit() -> nn.Module:
    """MViT of three blocks, the second with pooled queries."""
    block = partial(mvit.MSBlockConfig, kernel_kv=[3, 3, 3], stride_kv=[1, 2, 2])
    blocks = [
        block(num_heads=1, input_channels=32, output_channels=32, kernel_q=[], stride_q=[]),
        block(num_heads=2, input_channels=32, output_channels=64, kernel_q=[3, 3, 3], stride_q=[1, 2, 2]),
        block(num_heads=2, input_channels=64, output_channels=64, kernel_q=[], stride_q=[]),
    ]
    return mvit.MViT((32, 32), 4, blocks, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False,
                     proj_after_attn=False, num_classes=CLASSES)  # fmt: skip


MODELS: dict[str, Factory] = {
    "alexnet": on_images(alexnet, size=96),
    "vgg": on_images(narrow_vgg, batch_norm=False),
    "vgg_bn": on_images(narrow_vgg, batch_norm=True),
    "resnet_basic": on_images(short_resnet, resnet.BasicBlock),
    "resnet_bottleneck": on_images(short_resnet, resnet.Bottleneck, width_per_group=16),
    "wide_resnet": on_images(
        lambda: without_last_stage(short_resnet(resnet.Bottleneck, width_per_group=128), 1024)
    ),
    "resnext": on_images(short_resnet, resnet.Bottleneck, groups=8, width_per_group=8),
    "densenet": on_images(
        models.DenseNet, growth_rate=16, block_config=(2, 2, 2, 2), num_init_features=32, num_classes=CLASSES
    ),
    "googlenet": on_images(models.GoogLeNet, num_classes=CLASSES, aux_logits=False, init_weights=False, size=128),
    "inception_v3": on_images(
        models.Inception3, num_classes=CLASSES, aux_logits=False, init_weights=False, size=139
    ),
    "squeezenet": on_images(models.squeezenet1_1, num_classes=CLASSES),
    "mobilenet_v2": on_images(models.mobilenet_v2, width_mult=0.35, num_classes=CLASSES),
    "mobilenet_v3_small": on_images(narrow_mobilenetv3, "mobilenet_v3_small"),
    "mobilenet_v3_large": on_images(narrow_mobilenetv3, "mobilenet_v3_large"),
    "shufflenet_v2": on_images(models.shufflenet_v2_x0_5, num_classes=CLASSES),
    "efficientnet": on_images(narrow_efficientnet, "efficientnet_b0", width_mult=0.75, depth_mult=1.0),
    "efficientnet_v2": on_images(narrow_efficientnet, "efficientnet_v2_s"),
    "regnet_x": on_images(narrow_regnet, None),
    "regnet_y": on_images(narrow_regnet, 0.25),
    "mnasnet": on_images(models.mnasnet0_5, num_classes=CLASSES),
    "convnext": on_images(narrow_convnext),
    "swin": on_images(narrow_swin, swin.SwinTransformerBlock, swin.PatchMerging),
    "swin_v2": on_images(narrow_swin, swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    "vit": on_images(
        models.VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128,
        num_classes=CLASSES, size=32,
    ),
    "maxvit": on_images(
        models.MaxVit, input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32],
        block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.1, num_classes=CLASSES,
    ),
    "fcn": on_images(segmented, fcn.FCNHead, fcn.FCN),
    "deeplabv3": on_images(segmented, deeplabv3.DeepLabHead, deeplabv3.DeepLabV3),
    "lraspp": on_images(narrow_lraspp),
    "r3d": on_clips(short_video_resnet, [video_resnet.Conv3DSimple] * 4, video_resnet.BasicStem),
    "mc3": on_clips(
        short_video_resnet, [video_resnet.Conv3DSimple] + [video_resnet.Conv3DNoTemporal] * 3, video_resnet.BasicStem
    ),
    "r2plus1d": on_clips(short_video_resnet, [video_resnet.Conv2Plus1D] * 4, video_resnet.R2Plus1dStem),
    "s3d": on_clips(s3d, frames=16, size=128),
    "swin3d": on_clips(narrow_swin3d),
    "mvit": on_clips(narrow_mvit),
}  # fmt: skip
