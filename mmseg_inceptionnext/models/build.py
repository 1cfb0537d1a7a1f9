"""Turn a config into a segmentor."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.models.weights import load_segmentor

# Stride of the last feature map of every backbone here, and so the shortest side of an input, in pixels.
LARGEST_STRIDE = 32


def build_segmentor(cfg: Config, checkpoint: str | Path | None = None) -> BaseModel:
    """Build the segmentor of a config on the CPU, in training mode.

    SyncBN becomes BN wherever it has nothing to synchronise: in a single process, and on CPUs, which do not have it.

    Args:
        cfg: A whole config, or one with ``model`` alone.
        checkpoint: Path of a segmentor trained with the config; every key and shape must agree. Default: random
            weights; the model's ``init_weights()`` loads ImageNet's into the backbone.

    Raises:
        UserError: The checkpoint cannot be read or does not fit.
    """
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = MODELS.build(cfg.model)
    if get_world_size() == 1 or get_device() == 'cpu':
        model = revert_sync_batchnorm(model)
    if checkpoint is not None:
        load_segmentor(model, read_checkpoint(checkpoint), checkpoint)
    return model


def channels_of(model: nn.Module) -> int:
    """Return the number of channels of a segmentor's input images."""
    return getattr(model.backbone, 'in_channels', 3)
