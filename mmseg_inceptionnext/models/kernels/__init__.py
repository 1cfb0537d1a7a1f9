"""Kernels for GPUs, in Triton, which torch brings with its CUDA builds: a file for each, with its proof and derivative.

They are off unless :func:`use_kernels` switches them on. None has been run on a GPU so far: their results were compared
with the plain forms in Triton's interpreter, and they were compiled for compute capabilities 7.5, 8.0 and 9.0. Whether
they are faster is not known.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmseg_inceptionnext.errors import MissingPackage, UserError
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d
from mmseg_inceptionnext.models.winograd import custom_functions_work

if TYPE_CHECKING:
    import triton.language as tl


def use_kernels(model: nn.Module) -> nn.Module:
    """Let a model compute by the kernels where it can, in place; for training and for inference, on a GPU.

    Token mixers become a :class:`~mmseg_inceptionnext.models.kernels.token_mixer.FusedInceptionDWConv2d`; a
    LateUpsampleConv2d sums its taps, and a LabelMapSegmentor labels whole images, each in one pass. Parameters and keys
    stay as they are. Compiled, traced, or moved to a CPU, the model takes the plain forms.

    Raises:
        UserError: The model is not on a GPU, Triton is not installed, or there is nothing to replace.
    """
    device = next(model.parameters()).device
    if device.type != 'cuda':
        raise UserError(f'kernels=True is for GPUs, but the model is on {device}: move it to one, or leave kernels out')
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingPackage('kernels=True needs triton: pip install triton, or leave kernels out') from error
    if not _swap(model):
        raise UserError(f'kernels=True: {type(model).__name__} has no part with a kernel: leave kernels out')
    return model


def _swap(model: nn.Module) -> int:
    """Replace all parts of a model that have a kernel; return how many."""
    from mmseg_inceptionnext.inference.label_map_segmentor import label_map
    from mmseg_inceptionnext.models.kernels.label_map import label_map_by_kernel
    from mmseg_inceptionnext.models.kernels.token_mixer import FusedInceptionDWConv2d
    from mmseg_inceptionnext.models.kernels.up_sampled_sum import add_up_sampled_by_kernel

    number = 0
    for module in model.modules():
        if isinstance(module, InceptionDWConv2d) and _has_all_branches(module):
            module.__class__ = FusedInceptionDWConv2d
        elif isinstance(module, LateUpsampleConv2d):
            module.add_up_sampled = add_up_sampled_by_kernel
        else:
            continue
        number += 1
    if hasattr(model, 'label_map'):  # a LabelMapSegmentor
        model.label_map = partial(label_map_by_kernel, plain=label_map)
        number += 1
    return number


def _has_all_branches(mixer: InceptionDWConv2d) -> bool:
    """Return whether a token mixer is the paper's, none of its ablations."""
    convs = (mixer.dwconv_hw, mixer.dwconv_w, mixer.dwconv_h)
    return not mixer.sequential and all(isinstance(conv, nn.Conv2d) for conv in convs)


def sum_dtype(x: Tensor) -> tl.dtype:
    """Return what a kernel sums a tensor in."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def kernels_run(x: Tensor) -> bool:
    """Return whether a kernel can be called with a tensor here: not on a CPU, in a compiler, a trace or torch.func."""
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'  # which runs on a CPU, for tests
    return (x.is_cuda or interpreted) and not torch.compiler.is_compiling() and custom_functions_work()
