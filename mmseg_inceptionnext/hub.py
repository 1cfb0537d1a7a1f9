"""A shipped config or its model by name, as ``mmengine.hub`` gives those of other packages."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS

from mmseg_inceptionnext.checkpoints import read_checkpoint
from mmseg_inceptionnext.config import read_config, require
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.segmentor import find_device
from mmseg_inceptionnext.weights import load_segmentor


def get_config(name: str | Path) -> Config:
    """A shipped config.

    Args:
        name: Such as 'upernet/inceptionnext_t'; or a config file.

    Raises:
        UserError: no such config, or a file that cannot be read as one.
    """
    return read_config(name)


def get_model(
    name: str | Path, checkpoint: str | Path | None = None, device: str | torch.device | None = None
) -> EncoderDecoder:
    """The segmentor of a config, in eval mode.

    SyncBN, which cannot train outside of a distributed run, is BN. To segment images as the config prepares them, take
    :class:`~mmseg_inceptionnext.Segmentor`.

    Args:
        name: As of :func:`get_config`.
        checkpoint: A segmentor trained with the config, read without running what is in it; every key and shape must
            agree. Default: random weights; the model's ``init_weights()`` loads ImageNet's into the backbone.
        device: Such as 'cpu' or 'cuda:1'. Default: a GPU if there is one.

    Raises:
        UserError: the config or the checkpoint cannot be read, they do not fit, or there is no such device.
    """
    device = find_device(device)
    cfg = read_config(name)
    require(cfg, 'model')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is not None:
        load_segmentor(model, read_checkpoint(checkpoint), checkpoint, ARCHS)
    return model.to(device).eval()
