"""Count parameters and MACs of a segmentor, as the paper's Tables 6 and 7 do, or of an ImageNet classifier.

The counter is torch's own (``torch.utils.flop_counter``): convolutions and matrix products, including attention. Norms,
activations and up-sampling are not counted. Nothing is computed: the model runs on torch's meta device, where no
convolution takes a shortcut such as Winograd's.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmseg_inceptionnext.config_files import heads, is_classifier, read_config
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.measure.imagenet import imagenet_config, is_imagenet_model
from mmseg_inceptionnext.models.build import LARGEST_STRIDE, build_segmentor, channels_of


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Cost of one config.

    Attributes:
        config: Path of the config, or name of the ImageNet model.
        params_m: Parameters in millions, with the auxiliary head, as the paper prints them.
        params_m_without_aux: Parameters in millions that inference needs: without the auxiliary head.
        gmacs: 10⁹ multiply-adds of one image in mmseg's ``tensor`` mode, where the auxiliary head does not run; with
            mmseg's UPerHead instead of :class:`LateUpsampleUPerHead`, as the paper counts.
        gmacs_executed: 10⁹ multiply-adds with the config's own head, which computes the same at another cost.
        gmacs_by_part: ``gmacs`` of 'backbone', 'neck' and 'head'.
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
    """Count parameters and MACs of one config, or of an ImageNet classifier.

    Args:
        config: Path or name of a config; or an arch of MetaNeXt or a model of timm, such as 'convnext_tiny_k5'.
        shape: Height and width of the image. Default: the paper's, 512×2048 for UperNet, 512×512 for other segmentors
            and 224×224 for classifiers, or what the config of one crops to.

    Raises:
        UserError: The config cannot be read, or the model cannot take the shape.
    """
    is_name = is_imagenet_model(config)
    cfg = imagenet_config(str(config)) if is_name else read_config(config)
    with torch.device('meta') if is_name else nullcontext():  # drawing 90 M weights takes seconds
        model = build_segmentor(cfg).eval()
    types = [head.type for name, head in heads(cfg.model) if name == 'decode_head']
    if shape is None and is_name:
        shape = (224, 224)
    elif shape is None and is_classifier(cfg):
        (side,) = (step.crop_size for step in cfg.test_dataloader.dataset.pipeline if step.type == 'CenterCrop')
        shape = (side, side)
    elif shape is None:
        shape = (512, 2048) if any('UPerHead' in kind for kind in types) else (512, 512)

    total = sum(p.numel() for p in model.parameters())
    auxiliary = sum(p.numel() for name, p in model.named_parameters() if name.startswith('auxiliary_head.'))
    gmacs = executed = count_gmacs(model, shape)
    if 'LateUpsampleUPerHead' in types:
        plain = copy.deepcopy(cfg)
        for _, head in heads(plain.model):
            head.type = head.type.replace('LateUpsampleUPerHead', 'UPerHead')
        gmacs = count_gmacs(build_segmentor(plain).eval(), shape)
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
    """Count the 10⁹ multiply-adds of a segmentor's backbone, neck and head for one image of height and width ``shape``.

    Raises:
        UserError: The model cannot take the shape; the message names one that it can take.
    """
    try:
        return _count_gmacs(model, shape)
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        fitting = tuple(-(-max(side, 1) // LARGEST_STRIDE) * LARGEST_STRIDE for side in shape)
        if fitting == tuple(shape):
            raise  # a multiple of the stride should fit: a bug
        _count_gmacs(model, fitting)
        raise UserError(
            f'the model cannot take {shape[0]}×{shape[1]} images: use {fitting[0]}×{fitting[1]}, a multiple of '
            f'{LARGEST_STRIDE}'
        ) from error


def _count_gmacs(model: nn.Module, shape: tuple[int, int]) -> dict[str, float]:
    # Fused attention has no formula in torch's counter on every device; as plain matrix products it is counted.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, depth=2) as counter,
    ):
        model.to('meta')(torch.empty(1, channels_of(model), *shape, device='meta'), mode='tensor')
    by_module = counter.get_flop_counts()
    backbone, neck = (
        sum(by_module.get(f'{type(model).__name__}.{part}', {}).values()) / 2e9 for part in ('backbone', 'neck')
    )
    # EncoderDecoder calls the head's forward directly, so that it has no entry of its own.
    head = counter.get_total_flops() / 2e9 - backbone - neck
    return {'backbone': backbone, 'neck': neck, 'head': head} if neck else {'backbone': backbone, 'head': head}
