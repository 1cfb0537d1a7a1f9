"""The figures that the paper prints in Tables 6 and 7, by config.

Parameters in millions, MACs in 10⁹, FPS on a 2080Ti, mIoU in percent.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmseg_inceptionnext.config_files import find_config


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


def paper_row(config: str | Path) -> PaperRow | None:
    """Return the row that a config stands for, by its path below ``configs``; None if no table has it.

    Raises:
        UserError: There is no such config.
    """
    parts = find_config(config).absolute().with_suffix('').parts
    key = '/'.join(parts[len(parts) - parts[::-1].index('configs') :]) if 'configs' in parts else ''
    return (TABLE_6 | TABLE_7).get(key)
