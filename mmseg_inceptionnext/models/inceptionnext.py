"""InceptionNeXt (Yu et al., CVPR 2024): MetaNeXt with the Inception depthwise convolution (Sec. 3.3, Table 3).

Parameter names are those of the released ImageNet checkpoints, so that nothing is renamed on load.
"""

from __future__ import annotations

from collections.abc import Mapping

import mmengine
from mmseg.registry import MODELS

from mmseg_inceptionnext.models.archs import resolve_arch
from mmseg_inceptionnext.models.metanext import ConvMlp, MetaNeXt
from mmseg_inceptionnext.models.metanext import MetaNeXtBlock as InceptionNeXtBlock
from mmseg_inceptionnext.models.metanext import MetaNeXtStage as InceptionNeXtStage
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d

__all__ = ['ConvMlp', 'InceptionDWConv2d', 'InceptionNeXt', 'InceptionNeXtBlock', 'InceptionNeXtStage']


@mmengine.registry.MODELS.register_module()  # where mmdet and mmpretrain look as well
@MODELS.register_module()
class InceptionNeXt(MetaNeXt):
    """InceptionNeXt (Sec. 3.3, Table 3), returning the feature maps of several stages.

    Args:
        arch: Name ('atto', 'tiny', 'small' or 'base') or its first letter; or a dict like an entry of
            :data:`~mmseg_inceptionnext.models.archs.ARCHS`.

    All other arguments, attributes, input and output are those of :class:`~mmseg_inceptionnext.MetaNeXt`.

    Raises:
        UserError: An unknown ``arch``, or an argument outside its range.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        norm_cfg: dict = dict(type='SyncBN', requires_grad=True),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        token_mixer: Mapping | None = None,
    ):
        super().__init__(
            resolve_arch(arch), in_channels, drop_path_rate, layer_scale_init_value, out_indices, norm_cfg, out_norm,
            frozen_stages, norm_eval, with_cp, token_mixer, init_cfg,
        )  # fmt: skip
