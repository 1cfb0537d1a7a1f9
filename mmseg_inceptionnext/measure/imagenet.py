"""The ImageNet classifiers of the paper's Tables 1, 4, 5 and 8, to count and time them as it does."""

from __future__ import annotations

from pathlib import Path

import timm
from mmengine.config import Config
from mmengine.model import BaseModel
from mmseg.registry import MODELS
from timm.layers import NormMlpClassifierHead
from timm.models.inception_next import MlpClassifierHead
from torch import Tensor, nn

from mmseg_inceptionnext.models.archs import METANEXT_ARCHS
from mmseg_inceptionnext.models.metanext import MetaNeXt


def is_imagenet_model(name: str | Path) -> bool:
    """Return whether a name is that of an arch of MetaNeXt, or of a model of timm."""
    name = str(name)
    # timm takes what follows a dot for the tag of weights, so that the file resnet50.py would be a model.
    return name in METANEXT_ARCHS or ('.' not in name and timm.is_model(name))


def imagenet_config(name: str) -> Config:
    """Return a config whose model is an ImageNet classifier by name, for what else takes the config of a segmentor."""
    return Config(dict(default_scope='mmseg', model=dict(type='ImageNetModel', name=name)))


@MODELS.register_module()
class ImageNetModel(BaseModel):
    """A classifier of 1000 classes with random weights; all of it is its ``backbone``.

    Args:
        name: Arch of MetaNeXt, or model of timm.
    """

    def __init__(self, name: str):
        super().__init__()
        self.backbone = MetaNeXtClassifier(name) if name in METANEXT_ARCHS else timm.create_model(name)

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Tensor:
        return self.backbone(inputs)


class MetaNeXtClassifier(nn.Module):
    """A MetaNeXt with its classifier: InceptionNeXt's is an MLP (Table 3), that of others a norm and a linear layer.

    (N, 3, H, W) to (N, 1000).
    """

    def __init__(self, arch: str):
        super().__init__()
        self.backbone = MetaNeXt(arch, out_indices=(-1,), out_norm=False)
        (channels,) = self.backbone.out_channels
        has_mlp = arch.startswith('inceptionnext') and '_iso_' not in arch
        self.head = MlpClassifierHead(channels) if has_mlp else NormMlpClassifierHead(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1])
