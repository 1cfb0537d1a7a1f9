"""Turn a config into a segmentor."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import nn

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config_files import heads
from mmseg_inceptionnext.errors import UserError, one_line
from mmseg_inceptionnext.models.padding_preprocessor import PaddingPreprocessor
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
        UserError: A part does not take its arguments; neck or heads do not fit the backbone; or the checkpoint cannot
            be read or does not fit.
    """
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    try:
        model = MODELS.build(cfg.model)
    except (AssertionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]  # of the class that does not take its arguments
        raise UserError(
            f'the model of the config cannot be built; {Path(frame.filename).name}: {one_line(error) or frame.line}'
        ) from error
    _check_channels(cfg.model, getattr(model, 'backbone', None))
    if type(model.data_preprocessor) is SegDataPreProcessor:
        model.data_preprocessor.__class__ = PaddingPreprocessor
    if get_world_size() == 1 or get_device() == 'cpu':
        model = revert_sync_batchnorm(model)
    if checkpoint is not None:
        load_segmentor(model, read_checkpoint(checkpoint), checkpoint)
    return model


def _check_channels(cfg: dict, backbone: nn.Module | None) -> None:
    """Check that neck and heads take the channels of the maps that they get, which fails in the first iteration."""
    maps = getattr(backbone, 'out_channels', None)
    if not isinstance(maps, (list, tuple)):
        return
    origin, parts = type(backbone).__name__, list(heads(cfg))
    if cfg.get('neck'):
        neck = cfg.neck
        _check_fits(f'neck.in_channels={neck.get("in_channels")}', neck.get('in_channels'), list(maps), origin)
        if not isinstance(neck.get('out_channels'), int) or not isinstance(neck.get('num_outs'), int):
            return
        origin, maps = neck.type, [neck.out_channels] * neck.num_outs
    for name, head in parts:
        given, index = head.get('in_channels'), head.get('in_index', -1)
        wanted = [index] if isinstance(index, int) else index
        if any(not -len(maps) <= i < len(maps) for i in wanted):
            raise UserError(f'model.{name}.in_index={index}, but {origin} returns {len(maps)} maps: correct it')
        expected = [maps[i] for i in wanted]
        _check_fits(f'{name}.in_channels={given}', given, expected[0] if isinstance(index, int) else expected, origin)


def _check_fits(setting: str, given: int | Sequence[int] | None, expected: int | list[int], origin: str) -> None:
    given = list(given) if isinstance(given, (list, tuple)) else given
    if given is not None and given != expected:
        raise UserError(f'model.{setting} do not fit {origin}, whose out_channels are {expected} there: set these')


def heads_of(model: nn.Module) -> list[nn.Module]:
    """Return the decode heads of a segmentor: one, or those of a cascade in their order; or a classifier's head."""
    head = model.decode_head if hasattr(model, 'decode_head') else model.head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def channels_of(model: nn.Module) -> int:
    """Return the number of channels of a segmentor's input images."""
    return getattr(model.backbone, 'in_channels', 3)
