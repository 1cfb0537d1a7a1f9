"""Mixed precision on the device at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from mmseg.registry import OPTIM_WRAPPERS
from torch import nn

from mmseg_inceptionnext.errors import UserError


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward and loss under bfloat16 autocast. Its range is float32's, so the loss needs no scaling.

    mmengine's AmpOptimWrapper always scales, and refuses to run on a CPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def use_mixed_precision(cfg: Config, bfloat16: bool | None = None) -> None:
    """Train in bfloat16 where the device computes in it, else in float16 with a dynamic loss scale.

    Args:
        cfg: A config with ``optim_wrapper``.
        bfloat16: Force one of the two.

    Raises:
        UserError: the config already has an optimizer wrapper of its own kind.
    """
    wrapper = cfg.optim_wrapper
    if wrapper.type != 'OptimWrapper':
        raise UserError(f'--amp replaces optim_wrapper.type OptimWrapper, but the config has {wrapper.type}: drop one')
    if bfloat16 is None:
        # Since torch 2.4 older GPUs "support" bfloat16 by emulation, which is slower than float32.
        bfloat16 = get_device() != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    if bfloat16:
        wrapper.type = 'BFloat16OptimWrapper'
    else:
        wrapper.update(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
