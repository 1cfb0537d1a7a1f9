"""Mixed precision on the device at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

from mmseg_inceptionnext.device import multiplies_bfloat16
from mmseg_inceptionnext.errors import UserError


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward and loss under bfloat16 autocast. Its range is float32's, so the loss needs no scaling.

    mmengine's AmpOptimWrapper always scales, and refuses to run on a CPU.
    """

    cast_dtype = torch.bfloat16  # as AmpOptimWrapper names its own

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(dtype=self.cast_dtype):
            yield


def check_amp(cfg: Config) -> None:
    """Check that the config's optimizer wrapper can be replaced by one for mixed precision.

    Raises:
        UserError: It is of another type.
    """
    if (kind := cfg.optim_wrapper.type) != 'OptimWrapper':
        raise UserError(f'amp=True replaces optim_wrapper.type OptimWrapper, but the config has {kind}: drop one')


def amp_optim_wrapper(bfloat16: bool | None = None) -> dict:
    """Return the settings of an optimizer wrapper for mixed precision.

    Args:
        bfloat16: True for bfloat16, False for float16 with a dynamic loss scale. Default: bfloat16 where the device
            supports it.
    """
    if bfloat16 is None:
        bfloat16 = get_device() != 'cuda' or multiplies_bfloat16('cuda')
    if bfloat16:
        return dict(type='BFloat16OptimWrapper')
    return dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
