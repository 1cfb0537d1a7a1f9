"""Make a trained segmentor fast: the same function in fewer and faster operations."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import timm
import torch
from mmcv.cnn import ConvModule, Linear, fuse_conv_bn
from mmcv.cnn.bricks.transformer import FFN
from mmseg.models.backbones.swin import WindowMSA
from mmseg.models.decode_heads import FPNHead, UPerHead
from mmseg.models.necks import FPN
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils.embed import PatchMerging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.label_map_segmentor import LabelMapSegmentor
from mmseg_inceptionnext.inference.packed import (
    PackedConv2d,
    PackedLateUpsampleConv2d,
    PackedLinear,
    PackedMlp,
    PackedPointwiseConv2d,
    packed_conv2d_3x3,
)
from mmseg_inceptionnext.inference.precision import check_precision, faster, use_bfloat16
from mmseg_inceptionnext.models.build import heads_of
from mmseg_inceptionnext.models.kernels import use_kernels
from mmseg_inceptionnext.models.late_upsample import late_upsample
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d
from mmseg_inceptionnext.models.metanext import MetaNeXt, MetaNeXtBlock
from mmseg_inceptionnext.models.token_mixers import Attention
from mmseg_inceptionnext.models.winograd import WinogradConv2d

# Convolutions whose result is linear in the weight that they store.
_PLAIN_CONVS = (nn.Conv2d, WinogradConv2d, LateUpsampleConv2d)
# Parts of backbones that call their linear layers and do not read the weights.
_CALLERS_OF_LINEAR = (Attention, WindowMSA, PatchMerging, FFN, timm.layers.Mlp)


def optimize_for_inference(
    model: EncoderDecoder,
    example_shape: tuple[int, int] | None = None,
    precision: str = 'fp32',
    kernels: bool = False,
) -> EncoderDecoder:
    """Return a copy of a segmentor that predicts the same, faster. The model that is given stays as it is.

    - A UPerHead convolves at low resolution (:func:`~mmseg_inceptionnext.models.late_upsample.late_upsample`).
    - BatchNorm and LayerScale of MetaNeXt's blocks and the norms of stem and down-samplings are folded into the
      convolutions next to them, and those of neck and head as well. This is exact: no padding comes in between.
    - The auxiliary head is dropped. An EncoderDecoder becomes a :class:`LabelMapSegmentor`.
    - On a CPU, the weights of MetaNeXt, FPN, UPerHead and FPNHead are packed
      (:mod:`mmseg_inceptionnext.inference.packed`) in the precision asked for. In float32, their wide 3×3 convolutions
      use Winograd's algorithm. Under another ``torch.autocast`` they are not packed: call this under the autocast that
      the result will run under.
    - In bfloat16 the result runs under an autocast of its own, so that layers which are not packed are fast as well.
      Logits are float32. It deviates from float32 as much as the model itself does under autocast.
    - The memory layout is channels_last on a CPU. On other devices it stays as it is, or becomes the faster one for
      ``example_shape``.

    The result is for inference only: in eval mode, without gradients. If packed, it cannot be saved or moved.

    Args:
        model: A segmentor on the device where it will run.
        example_shape: Height and width of an image to time both precisions with, and both layouts on other devices
            than a CPU.
        precision: 'fp32', 'bf16', or 'auto': the faster of the two for an image of ``example_shape``.
        kernels: Compute by :mod:`mmseg_inceptionnext.models.kernels`, on a GPU. None has been run on one so far.

    Raises:
        UserError: Another precision, or 'auto' without ``example_shape``; or ``kernels`` cannot be used here.
    """
    check_precision(precision)
    if precision == 'auto':
        if example_shape is None:
            raise UserError("precision='auto' needs example_shape=(H, W), the size of an image to race with")
        x = _example(model, example_shape)
        make = partial(optimize_for_inference, model, example_shape, kernels=kernels)
        return faster(make, lambda made: made(x), _device(model))[1]
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if model.with_auxiliary_head:
        del model.auxiliary_head
    if type(model) is EncoderDecoder:
        model.__class__ = LabelMapSegmentor
    with contextlib.suppress(UserError):  # another head, or one of other convolutions
        late_upsample(model)
    fold_norms(model)
    if kernels:
        use_kernels(model)
    device = _device(model)
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    if device == 'cpu' and not torch.is_autocast_enabled('cpu') and packing_works(dtype):
        pack_weights(model, dtype)
    if precision == 'bf16':
        use_bfloat16(model)
    layout = torch.contiguous_format
    if device == 'cpu':
        layout = torch.channels_last
    elif example_shape is not None:
        layout = _faster_layout(model, example_shape)
    model.to(memory_format=layout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and type(module) not in _PLAIN_CONVS:
            module.to(memory_format=torch.contiguous_format)  # mmcv's take a view of their weight as rows
    if layout is torch.channels_last:
        model.backbone.register_forward_pre_hook(_to_channels_last)
    return model


def made_for(model: nn.Module, precision: str, fast: bool) -> nn.Module:
    """Return a segmentor that computes in 'fp32' or 'bf16'; an EncoderDecoder optimised, if ``fast``."""
    if fast and isinstance(model, EncoderDecoder):
        return optimize_for_inference(model, precision=precision)
    return use_bfloat16(copy.deepcopy(model)) if precision == 'bf16' else model


def fold_norms(model: EncoderDecoder) -> None:
    """Fold norms and LayerScale into convolutions, in place. For eval mode."""
    backbone = model.backbone
    if isinstance(backbone, MetaNeXt):
        backbone.stem = fuse_conv_bn(backbone.stem)
        for stage in backbone.stages:
            if isinstance(stage.downsample, nn.Sequential):
                norm, conv = stage.downsample
                if _folds(norm):
                    _fold_norm_into_next(norm, conv)
                    stage.downsample = conv
            for i, block in enumerate(stage.blocks):
                if isinstance(block, MetaNeXtBlock):
                    stage.blocks[i] = FoldedBlock(block)
    for part in _neck_and_head(model):
        for module in part.modules():
            if isinstance(module, ConvModule) and _has_norm_to_fold(module):
                fuse_conv_bn(module)


class FoldedBlock(nn.Module):
    """A MetaNeXtBlock with its norm in ``fc1``, if that is a BatchNorm, and its γ in ``fc2``.

    (N, C, H, W) to (N, C, H, W).
    """

    def __init__(self, block: MetaNeXtBlock):
        super().__init__()
        self.token_mixer, self.norm, self.mlp = block.token_mixer, block.norm, block.mlp
        if _folds(self.norm):
            _fold_norm_into_next(self.norm, self.mlp.fc1)
            self.norm = nn.Identity()
        fc2 = self.mlp.fc2
        fc2.weight.copy_(fc2.weight.double() * block.gamma.double()[:, None, None, None])
        fc2.bias.copy_(fc2.bias.double() * block.gamma.double())

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.mlp, PackedMlp):
            return self.mlp(self.norm(self.token_mixer(x.to(self.mlp.dtype))), residual=x)
        return x + self.mlp(self.norm(self.token_mixer(x)))


def _has_norm_to_fold(module: ConvModule) -> bool:
    # Other convolutions compute their weight in each call, such as weight standardisation, which would undo the scale.
    is_plain = type(module.conv) in _PLAIN_CONVS and not module.with_spectral_norm
    return is_plain and module.order == ('conv', 'norm', 'act') and _folds(module.norm)


def _folds(norm: nn.Module | None) -> bool:
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None


def _fold_norm_into_next(norm: _BatchNorm, conv: nn.Conv2d) -> None:
    """Fold a norm in eval mode into the convolution after it, which has no padding."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    weight = conv.weight.double()
    conv.bias.copy_(conv.bias.double() + torch.einsum('oihw,i->o', weight, shift))
    conv.weight.copy_(weight * scale[:, None, None])


def pack_weights(model: EncoderDecoder, dtype: torch.dtype = torch.float32) -> None:
    """Replace float32 layers by packed ones where there are any, in place. For a CPU, after :func:`fold_norms`.

    Args:
        model: A segmentor.
        dtype: What the packed layers compute in: float32 or bfloat16.
    """
    for module in list(model.backbone.modules()):
        if isinstance(module, FoldedBlock) and _is_float32(module.mlp):
            module.mlp = PackedMlp(module.mlp, dtype)
        elif type(module) in _CALLERS_OF_LINEAR:
            _pack_linears(module, dtype)
    if isinstance(model.backbone, MetaNeXt):
        for module in model.backbone.modules():
            if type(module) is nn.Conv2d and _is_float32(module):
                module.to(dtype)  # once, and not in each call
    head = model.decode_head
    # Known parts only: others may read the weights of their layers, which packed ones do not have.
    for part in _neck_and_head(model):
        if isinstance(part, (FPN, UPerHead, FPNHead)):
            for module in list(part.modules()):
                if isinstance(module, ConvModule) and _is_unpacked(module):
                    _pack_conv_module(module, dtype)
    if isinstance(head, (UPerHead, FPNHead)) and type(head.conv_seg) is nn.Conv2d and _is_float32(head):
        head.conv_seg = PackedPointwiseConv2d(head.conv_seg.weight.flatten(1).to(dtype), head.conv_seg.bias)


def _pack_linears(module: nn.Module, dtype: torch.dtype) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Linear) and _is_float32(child):
                setattr(parent, name, PackedLinear(child.weight.to(dtype), child.bias))


def _neck_and_head(model: EncoderDecoder) -> list[nn.Module]:
    return [model.neck, *heads_of(model)] if model.with_neck else heads_of(model)


def _is_float32(module: nn.Module) -> bool:
    """Return whether a module has parameters, and all are float32; a packed module has none."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return dtypes == {torch.float32}


def _is_unpacked(module: ConvModule) -> bool:
    """Return whether :func:`_pack_conv_module` can pack a module: a plain convolution, with or without activation."""
    conv = module.conv
    return (
        type(conv) in _PLAIN_CONVS
        and conv.weight.dtype == torch.float32
        and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, 'zeros')
        and module.order == ('conv', 'norm', 'act')
        and not module.with_explicit_padding
        and not module.with_spectral_norm
    )


def _pack_conv_module(module: ConvModule, dtype: torch.dtype) -> None:
    conv, weight = module.conv, module.conv.weight.to(dtype)
    rectified = module.with_activation and type(module.activate) is nn.ReLU and not _has_norm(module)
    activation = 'relu' if rectified else 'none'
    if isinstance(conv, LateUpsampleConv2d):
        module.conv = PackedLateUpsampleConv2d(conv, dtype)
    elif (conv.kernel_size, conv.padding) == ((3, 3), (1, 1)):
        module.conv = packed_conv2d_3x3(weight, conv.bias, activation)
    elif (conv.kernel_size, conv.padding) == ((1, 1), (0, 0)):
        module.conv = PackedPointwiseConv2d(weight.flatten(1), conv.bias, activation)
    if isinstance(module.conv, (PackedPointwiseConv2d, PackedConv2d)):
        module.with_activation = module.with_activation and not rectified
    if module.with_activation and type(module.activate) is nn.ReLU:
        module.activate.inplace = True  # no other module uses the result


def _has_norm(module: ConvModule) -> bool:
    return module.with_norm and not isinstance(module.norm, nn.Identity)


def packing_works(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether torch has the packed operators here, and they compute what they should."""
    pointwise, conv, x = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 3, padding=1), torch.randn(1, 16, 4, 4)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        try:
            packed = [
                PackedPointwiseConv2d(pointwise.weight.flatten(1).to(dtype), pointwise.bias, 'relu')(x),
                PackedConv2d(conv.weight.to(dtype), conv.bias, 'relu')(x),
            ]
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        expected = torch.stack([pointwise(x), conv(x)]).relu()
        return torch.allclose(torch.stack(packed).float(), expected, atol=tolerance)


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _example(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    return torch.zeros(1, model.backbone.in_channels, *shape, device=next(model.parameters()).device)


def _to_channels_last(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(memory_format=torch.channels_last),)


def _faster_layout(model: EncoderDecoder, shape: tuple[int, int]) -> torch.memory_format:
    from torch.utils.benchmark import Timer  # here: where there is no GPU, importing it warns of that

    def seconds(layout: torch.memory_format) -> float:
        model.to(memory_format=layout)
        x = _example(model, shape).contiguous(memory_format=layout)
        with torch.inference_mode():
            timer = Timer("model(x, mode='tensor')", globals=dict(model=model, x=x))
            timer.timeit(3)
            return timer.timeit(10).mean

    return min((torch.contiguous_format, torch.channels_last), key=seconds)
