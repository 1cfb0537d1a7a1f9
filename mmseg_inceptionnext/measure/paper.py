"""The figures that the paper prints: in Tables 6 and 7 by config, in Tables 1, 4, 5 and 8 by ImageNet model.

Parameters in millions, MACs in 10⁹, FPS on a 2080Ti, mIoU and top-1 accuracy in percent, throughput in images/s.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmseg_inceptionnext.config_files import find_config
from mmseg_inceptionnext.measure.imagenet import is_imagenet_model


class PaperRow(NamedTuple):
    name: str
    params: int
    macs: int
    fps: float | None
    miou: float


# UperNet; MACs at 512×2048, mIoU multi-scale. In the order of the table.
TABLE_6 = {
    'baselines/upernet/swin_t': PaperRow('Swin-T', 60, 945, 20.6, 45.8),
    'baselines/upernet/convnext_t': PaperRow('ConvNeXt-T', 60, 939, 20.6, 46.7),
    'upernet/inceptionnext_t': PaperRow('InceptionNeXt-T', 56, 933, 22.7, 47.9),
    'baselines/upernet/swin_s': PaperRow('Swin-S', 81, 1038, 16.2, 49.5),
    'baselines/upernet/convnext_s': PaperRow('ConvNeXt-S', 82, 1027, 16.8, 49.6),
    'upernet/inceptionnext_s': PaperRow('InceptionNeXt-S', 78, 1020, 17.6, 50.0),
    'baselines/upernet/swin_b': PaperRow('Swin-B', 121, 1188, 16.2, 49.7),
    'baselines/upernet/convnext_b': PaperRow('ConvNeXt-B', 122, 1170, 15.7, 49.9),
    'upernet/inceptionnext_b': PaperRow('InceptionNeXt-B', 115, 1159, 17.5, 50.6),
}

# Semantic FPN; MACs at 512×512, mIoU single-scale.
TABLE_7 = {
    'baselines/fpn/resnet_50': PaperRow('ResNet-50', 29, 46, 30.2, 36.7),
    'baselines/fpn/pvt_s': PaperRow('PVT-Small', 28, 45, 27.2, 39.8),
    'baselines/fpn/poolformer_s24': PaperRow('PoolFormer-S24', 23, 39, 28.8, 40.3),
    'fpn/inceptionnext_t': PaperRow('InceptionNeXt-T', 28, 44, 31.4, 43.1),
    'baselines/fpn/resnet_101': PaperRow('ResNet-101', 48, 65, 22.2, 38.8),
    'baselines/fpn/resnext_101_32x4d': PaperRow('ResNeXt-101-32x4d', 47, 65, None, 39.7),
    'baselines/fpn/pvt_m': PaperRow('PVT-Medium', 48, 61, 20.0, 41.6),
    'baselines/fpn/poolformer_s36': PaperRow('PoolFormer-S36', 35, 48, 21.6, 42.0),
    'baselines/fpn/poolformer_m36': PaperRow('PoolFormer-M36', 60, 68, 15.4, 42.4),
    'fpn/inceptionnext_s': PaperRow('InceptionNeXt-S', 50, 65, 20.7, 45.6),
    'baselines/fpn/pvt_l': PaperRow('PVT-Large', 65, 80, 16.0, 42.1),
    'baselines/fpn/resnext_101_64x4d': PaperRow('ResNeXt-101-64x4d', 86, 104, None, 40.2),
    'baselines/fpn/poolformer_m48': PaperRow('PoolFormer-M48', 77, 82, 12.1, 42.7),
    'fpn/inceptionnext_b': PaperRow('InceptionNeXt-B', 85, 100, 20.2, 46.4),
}


class ImageNetRow(NamedTuple):
    """A row about an ImageNet classifier.

    Attributes:
        name: As the paper calls it.
        model: Arch of MetaNeXt or model of timm; None if neither has it.
        params, macs: As printed; MACs at ``size``.
        train, infer: Throughput in training and inference, on an A100 with TF32; of Table 5 on a 2080Ti.
        size: Height and width of the image.
    """

    name: str
    model: str | None
    params: str
    macs: str
    train: int | None
    infer: int | None
    top1: float
    size: int = 224


TABLE_1 = (
    ImageNetRow('7×7', 'convnext_tiny', '28.6', '4.5', 575, 2413, 82.1),
    ImageNetRow('5×5', 'convnext_tiny_k5', '28.4', '4.4', 675, 2704, 82.0),
    ImageNetRow('3×3', 'convnext_tiny_k3', '28.3', '4.4', 798, 2802, 81.5),
    ImageNetRow('3×3, 1/2', 'convnext_tiny_k3_par1_2', '28.3', '4.4', 818, 2740, 81.4),
    ImageNetRow('3×3, 3/8', 'convnext_tiny_k3_par3_8', '28.3', '4.4', 847, 2762, 81.4),
    ImageNetRow('3×3, 1/4', 'convnext_tiny_k3_par1_4', '28.3', '4.4', 871, 2808, 81.3),
    ImageNetRow('3×3, 1/8', 'convnext_tiny_k3_par1_8', '28.3', '4.4', 901, 2833, 80.8),
    ImageNetRow('3×3, 1/16', 'convnext_tiny_k3_par1_16', '28.3', '4.4', 916, 2846, 80.1),
)

# The last two lines of Table 3, with the throughput and accuracy of Table 4.
TABLE_3 = (
    ImageNetRow('A', 'inceptionnext_atto', '4.2', '0.5', 2661, 9876, 75.3),
    ImageNetRow('T', 'inceptionnext_tiny', '28.1', '4.2', 901, 2900, 82.3),
    ImageNetRow('S', 'inceptionnext_small', '49.4', '8.4', 521, 1750, 83.5),
    ImageNetRow('B', 'inceptionnext_base', '86.7', '14.9', 375, 1244, 84.0),
)

# FocalNets of timm are those with a large receptive field; RSB-ResNets are ResNets that were trained otherwise.
TABLE_4 = (
    ImageNetRow('MobileNetV2 (1.4)', 'mobilenetv2_140', '6.1', '0.60', 1001, 5190, 74.7),
    ImageNetRow('EfficientNet-B0', 'efficientnet_b0', '5.3', '0.40', 954, 5502, 77.1),
    ImageNetRow('GhostNet 1.3×', 'ghostnet_130', '7.3', '0.24', 946, 7451, 75.7),
    ImageNetRow('ConvNeXt-A', 'convnext_atto', '3.7', '0.55', 835, 4539, 75.7),
    ImageNetRow('InceptionNeXt-A', 'inceptionnext_atto', '4.2', '0.51', 2661, 9876, 75.3),
    ImageNetRow('DeiT-S', 'deit_small_patch16_224', '22', '4.6', 1227, 3781, 79.8),
    ImageNetRow('T2T-ViT-14', None, '22', '4.8', None, None, 81.5),
    ImageNetRow('TNT-S', 'tnt_s_patch16_224', '24', '5.2', None, None, 81.5),
    ImageNetRow('Swin-T', 'swin_tiny_patch4_window7_224', '29', '4.5', 564, 1768, 81.3),
    ImageNetRow('Focal-T', None, '29', '4.9', None, None, 82.2),
    ImageNetRow('ResNet-50', 'resnet50', '26', '4.1', 969, 3149, 78.4),
    ImageNetRow('RSB-ResNet-50', 'resnet50', '26', '4.1', 969, 3149, 79.8),
    ImageNetRow('RegNetY-4G', 'regnety_040', '21', '4.0', 670, 2694, 81.3),
    ImageNetRow('FocalNet-T', 'focalnet_tiny_lrf', '29', '4.5', None, None, 82.3),
    ImageNetRow('ConvNeXt-T', 'convnext_tiny', '29', '4.5', 575, 2413, 82.1),
    ImageNetRow('InceptionNeXt-T', 'inceptionnext_tiny', '28', '4.2', 901, 2900, 82.3),
    ImageNetRow('T2T-ViT-19', None, '39', '8.5', None, None, 81.9),
    ImageNetRow('PVT-Medium', None, '44', '6.7', None, None, 81.2),
    ImageNetRow('Swin-S', 'swin_small_patch4_window7_224', '50', '8.7', 359, 1131, 83.0),
    ImageNetRow('Focal-S', None, '51', '9.1', None, None, 83.5),
    ImageNetRow('RSB-ResNet-101', 'resnet101', '45', '7.9', 620, 2057, 81.3),
    ImageNetRow('RegNetY-8G', 'regnety_080', '39', '8.0', 689, 1326, 82.1),
    ImageNetRow('FocalNet-S', 'focalnet_small_lrf', '50', '8.7', None, None, 83.5),
    ImageNetRow('ConvNeXt-S', 'convnext_small', '50', '8.7', 361, 1535, 83.1),
    ImageNetRow('InceptionNeXt-S', 'inceptionnext_small', '49', '8.4', 521, 1750, 83.5),
    ImageNetRow('DeiT-B', 'deit_base_patch16_224', '86', '17.5', 541, 1608, 81.8),
    ImageNetRow('T2T-ViT-24', None, '64', '13.8', None, None, 82.3),
    ImageNetRow('TNT-B', 'tnt_b_patch16_224', '66', '14.1', None, None, 82.9),
    ImageNetRow('PVT-Large', None, '62', '9.8', None, None, 81.7),
    ImageNetRow('Swin-B', 'swin_base_patch4_window7_224', '88', '15.4', 271, 843, 83.5),
    ImageNetRow('Focal-B', None, '90', '16.0', None, None, 83.8),
    ImageNetRow('RSB-ResNet-152', 'resnet152', '60', '11.6', 437, 1457, 81.8),
    ImageNetRow('RegNetY-16G', 'regnety_160', '84', '15.9', 322, 1100, 82.2),
    ImageNetRow('RepLKNet-31B', None, '79', '15.3', None, None, 83.5),
    ImageNetRow('FocalNet-B', 'focalnet_base_lrf', '89', '15.4', None, None, 83.9),
    ImageNetRow('ConvNeXt-B', 'convnext_base', '89', '15.4', 267, 1122, 83.8),
    ImageNetRow('InceptionNeXt-B', 'inceptionnext_base', '87', '14.9', 375, 1244, 84.0),
    ImageNetRow('DeiT-B', 'deit_base_patch16_384', '86', '55.4', 131, 361, 83.1, 384),
    ImageNetRow('Swin-B', 'swin_base_patch4_window12_384', '88', '47.1', 104, 296, 84.5, 384),
    ImageNetRow('RepLKNet-31B', None, '79', '45.1', None, None, 84.8, 384),
    ImageNetRow('ConvNeXt-B', 'convnext_base', '89', '45.0', 95, 393, 85.1, 384),
    ImageNetRow('InceptionNeXt-B', 'inceptionnext_base', '87', '43.6', 139, 428, 85.2, 384),
)

TABLE_5 = (
    ImageNetRow('DeiT-S', 'deit_small_patch16_224', '22', '4.6', 276, 784, 79.8),
    ImageNetRow('MetaNeXt-Attn', 'metanext_attn_small', '22', '4.6', 288, 816, 3.9),
    ImageNetRow('ConvNeXt-S (iso.)', 'convnext_iso_small', '22', '4.3', 270, 879, 79.7),
    ImageNetRow('InceptionNeXt-S (iso.)', 'inceptionnext_iso_small', '22', '4.2', 310, 998, 79.7),
)

TABLE_8 = (
    ImageNetRow('Baseline', 'inceptionnext_tiny', '28.1', '4.2', 901, 2900, 82.3),
    ImageNetRow('no horizontal band', 'inceptionnext_tiny_no_w', '28.0', '4.2', 947, 3093, 81.9),
    ImageNetRow('no vertical band', 'inceptionnext_tiny_no_h', '28.0', '4.2', 954, 3173, 81.9),
    ImageNetRow('no square kernel', 'inceptionnext_tiny_no_hw', '28.0', '4.2', 940, 3004, 82.0),
    ImageNetRow('bands in sequence', 'inceptionnext_tiny_sequential', '28.1', '4.2', 903, 2971, 82.1),
    ImageNetRow('band 7', 'inceptionnext_tiny_band7', '28.0', '4.2', 905, 2946, 82.1),
    ImageNetRow('band 9', 'inceptionnext_tiny_band9', '28.1', '4.2', 904, 2916, 82.1),
    ImageNetRow('band 13', 'inceptionnext_tiny_band13', '28.1', '4.2', 896, 2895, 82.0),
    ImageNetRow('branch ratio 1/4', 'inceptionnext_tiny_ratio1_4', '28.1', '4.2', 834, 2499, 82.2),
    ImageNetRow('branch ratio 1/16', 'inceptionnext_tiny_ratio1_16', '28.0', '4.2', 936, 3097, 81.8),
    ImageNetRow('Layer Norm', 'inceptionnext_tiny_ln', '28.1', '4.2', 721, 2646, 82.4),
)

# Peak rate of stochastic depth, by size.
TABLE_10 = {'upernet': {'t': 0.2, 's': 0.3, 'b': 0.4}, 'fpn': {'t': 0.1, 's': 0.2, 'b': 0.2}}


# ImageNet recipes, for A, T, S, B and for B at 384².
TABLE_9_CONFIGS = tuple(f'imagenet/inceptionnext_{name}' for name in ('a', 't', 's', 'b', 'b_384'))
TABLE_9 = {
    'input resolution': ('224²', '224²', '224²', '224²', '384²'),
    'epochs': ('450', '300', '300', '300', '30'),
    'batch size': ('1280', '4096', '4096', '4096', '1024'),
    'optimizer': ('AdamW',) * 5,
    'Adam ε': ('1e-08',) * 5,
    'Adam (β1, β2)': ('(0.9, 0.999)',) * 5,
    'learning rate': ('0.001', '0.004', '0.004', '0.004', '5e-05'),
    'learning rate decay': ('Cosine',) * 5,
    'gradient clipping': ('None',) * 5,
    'warmup epochs': ('5', '20', '20', '20', 'None'),
    'weight decay': ('0.05',) * 5,
    'random augment': ('5/uniform', '9/0.5', '9/0.5', '9/0.5', '9/0.5'),
    'repeated augmentation': ('off',) * 5,
    'cutmix': ('1.0',) * 5,
    'mixup': ('0.2', '0.8', '0.8', '0.8', '0.8'),
    'cutmix-mixup switch prob': ('0.5',) * 5,
    'random erasing prob': ('0.1', '0.25', '0.25', '0.25', '0.25'),
    'label smoothing': ('0.1',) * 5,
    'peak stochastic depth rate': ('0.1', '0.1', '0.3', '0.4', '0.7'),
    'dropout in classifier': ('0.0', '0.0', '0.0', '0.0', '0.5'),
    'LayerScale initialization': ('1e-06', '1e-06', '1e-06', '1e-06', 'pre-trained'),
    'EMA decay rate': ('None', 'None', 'None', 'None', '0.9999'),
}


def imagenet_row(model: str, shape: tuple[int, int] = (224, 224)) -> ImageNetRow | None:
    """Return the row of an ImageNet model at a size of images, with the most digits that the paper prints; or None.

    Throughput is the A100's where the paper has it.
    """
    rows = (*TABLE_1, *TABLE_3, *TABLE_8, *TABLE_4, *TABLE_5)
    return next((row for row in rows if row.model == model and (row.size, row.size) == tuple(shape)), None)


def paper_row(config: str | Path) -> PaperRow | None:
    """Return the row that a config stands for, by its path below ``configs``; None if no table of segmentors has it.

    Raises:
        UserError: There is no such config.
    """
    if is_imagenet_model(config):
        return None
    parts = find_config(config).absolute().with_suffix('').parts
    key = '/'.join(parts[len(parts) - parts[::-1].index('configs') :]) if 'configs' in parts else ''
    return (TABLE_6 | TABLE_7).get(key)
