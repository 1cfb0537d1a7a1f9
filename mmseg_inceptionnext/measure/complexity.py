"""Parameters and MACs of a segmentor, as the paper's Tables 6 and 7 count them.

The counter is torch's own (``torch.utils.flop_counter``): convolutions and matrix products, those of attention
included. Norms, activations and up-samplings are not counted. Nothing is computed: the model runs on torch's meta
device, where no convolution takes a shortcut that a device may have (Winograd's).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.errors import UserError

_LARGEST_STRIDE = 32


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Cost of one config.

    Attributes:
        config: The config's path.
        params_m: Parameters in millions, with the auxiliary head, as the paper prints them.
        params_m_without_aux: Without it: what inference needs.
        gmacs: 10⁹ multiply-adds of one image in mmseg's ``tensor`` mode, in which the auxiliary head does not run; with
            mmseg's UPerHead in the place of :class:`LateUpsampleUPerHead`, as the paper counts.
        gmacs_executed: Those of the config's own head, which computes the same at another cost.
        gmacs_by_part: Of ``gmacs``, the parts of 'backbone', 'neck' and 'head'.
        shape: Height and width of the image.
    """

    config: str
    params_m: float
    params_m_without_aux: float
    gmacs: float
    gmacs_executed: float
    gmacs_by_part: dict[str, float]
    shape: tuple[int, int]


def measure_complexity(config: str | Path, shape: tuple[int, int] | None = None) -> Complexity:
    """Count one config.

    Args:
        config: A config file.
        shape: Height and width of the image; default the paper's, 512×2048 for UperNet and 512×512 for others.

    Raises:
        UserError: the config cannot be read, or the model cannot take the shape.
    """
    cfg = read_config(config)
    init_default_scope('mmseg')
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    if shape is None:
        shape = (512, 2048) if 'UPerHead' in cfg.model.decode_head.type else (512, 512)

    total = sum(p.numel() for p in model.parameters())
    auxiliary = sum(p.numel() for name, p in model.named_parameters() if name.startswith('auxiliary_head.'))
    gmacs = executed = count_gmacs(model, shape)
    if cfg.model.decode_head.type == 'LateUpsampleUPerHead':
        plain_head = MODELS.build(dict(cfg.model.decode_head, type='UPerHead'))
        model.decode_head = revert_sync_batchnorm(plain_head).eval()
        gmacs = count_gmacs(model, shape)
    return Complexity(
        config=str(config),
        params_m=total / 1e6,
        params_m_without_aux=(total - auxiliary) / 1e6,
        gmacs=sum(gmacs.values()),
        gmacs_executed=sum(executed.values()),
        gmacs_by_part=gmacs,
        shape=tuple(shape),
    )


def count_gmacs(model: nn.Module, shape: tuple[int, int]) -> dict[str, float]:
    """10⁹ multiply-adds of a segmentor's backbone, neck and head for one image of height and width ``shape``.

    Raises:
        UserError: the model cannot take the shape; a shape that it can take is named.
    """
    try:
        return _count_gmacs(model, shape)
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        fitting = tuple(-(-max(side, 1) // _LARGEST_STRIDE) * _LARGEST_STRIDE for side in shape)
        if fitting == tuple(shape):
            raise  # a multiple of the stride should fit: a bug
        _count_gmacs(model, fitting)
        raise UserError(
            f'the model cannot take {shape[0]}×{shape[1]} images: use {fitting[0]}×{fitting[1]}, a multiple of '
            f'{_LARGEST_STRIDE}'
        ) from error


def _count_gmacs(model: nn.Module, shape: tuple[int, int]) -> dict[str, float]:
    # Fused attention has no formula in torch's counter on every device; as plain matrix products it is counted.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, depth=2) as counter,
    ):
        model.to('meta')(torch.empty(1, 3, *shape, device='meta'), mode='tensor')
    by_module = counter.get_flop_counts()
    backbone, neck = (
        sum(by_module.get(f'{type(model).__name__}.{part}', {}).values()) / 2e9 for part in ('backbone', 'neck')
    )
    # EncoderDecoder calls the head's forward directly, so that it has no entry of its own.
    head = counter.get_total_flops() / 2e9 - backbone - neck
    return {'backbone': backbone, 'neck': neck, 'head': head} if neck else {'backbone': backbone, 'head': head}
