"""Layers for inference on a CPU, whose weights are packed once, for the units that the processor has.

They compute in the dtype of their weights, float32 or bfloat16; biases are float32. They replace trained layers, have
no parameters, and cannot be trained, saved or moved to another device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmseg_inceptionnext.models.late_upsample_uper_head import (
    LateUpsampleConv2d,
    add_up_sampled,
    take_taps,
    tap_weights,
)
from mmseg_inceptionnext.models.winograd import MIN_CHANNELS, convolve, transform_weight


class PackedPointwiseConv2d(nn.Module):
    """A 1×1 convolution fused with an activation, or with the addition of a residual of its dtype.

    It uses the oneDNN operators that torch's own compiler uses for linear layers. A plain convolution packs its weights
    in every call.

    Args:
        weight: (O, C), float32 or bfloat16.
        bias: (O,).
        activation: 'none', 'relu' or 'gelu'.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = 'none'):
        super().__init__()
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias if bias is None else bias.detach().clone()
        self.activation = activation

    @torch.compiler.disable  # the compiler wants to pack the weight itself
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        n, _, height, width = x.shape
        rows = _rows(x.to(self.dtype))
        if residual is None:
            out = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.activation, [], 'none')
        else:
            out = torch.ops.mkldnn._linear_pointwise.binary(rows, _rows(residual), self.weight, self.bias, 'add')
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)

    def __deepcopy__(self, memo: dict) -> PackedPointwiseConv2d:
        return self  # it never changes, and torch cannot copy a packed weight


class PackedLinear(PackedPointwiseConv2d):
    """The same for ``nn.Linear``: (…, C) to (…, O)."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, self.activation, [], 'none')


class PackedMlp(nn.Module):
    """``residual + fc2(gelu(fc1(x)))`` with 1×1 convolutions. (N, C, H, W) to (N, C, H, W), float32."""

    def __init__(self, mlp: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.fc1 = PackedPointwiseConv2d(mlp.fc1.weight.flatten(1).to(dtype), mlp.fc1.bias, 'gelu')
        self.fc2 = PackedPointwiseConv2d(mlp.fc2.weight.flatten(1).to(dtype), mlp.fc2.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.dtype == torch.float32:
            return self.fc2(hidden, residual)
        return self.fc2(hidden).float().add_(residual)  # in float32: the roundings of all blocks would add up


class PackedConv2d(nn.Module):
    """A 3×3 convolution, stride and padding 1, fused with an activation.

    Args:
        weight: (O, C, 3, 3), float32 or bfloat16.
        bias: (O,).
        activation: 'none' or 'relu'.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = 'none'):
        super().__init__()
        self.dtype, self.activation = weight.dtype, activation
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1)
        self.bias = bias if bias is None else bias.detach().clone()

    @torch.compiler.disable  # as PackedPointwiseConv2d
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1, self.activation, [], ''
        )

    def __deepcopy__(self, memo: dict) -> PackedConv2d:
        return self


class PackedWinogradConv2d(nn.Module):
    """A 3×3 convolution whose weight is transformed once, see :mod:`mmseg_inceptionnext.models.winograd`."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = transform_weight(weight.detach())
        self.bias = bias if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        out = convolve(x, self.weight)
        return out if self.bias is None else out.add_(self.bias[:, None, None])


class PackedLateUpsampleConv2d(nn.Module):
    """A :class:`LateUpsampleConv2d` with packed weights; the same input and output."""

    def __init__(self, conv: LateUpsampleConv2d, dtype: torch.dtype = torch.float32):
        super().__init__()
        first, *others = conv.weight.detach().to(dtype).split(conv.map_channels, dim=1)
        self.conv = packed_conv2d_3x3(first, conv.bias)
        self.taps = nn.ModuleList(PackedPointwiseConv2d(tap_weights(weight), None) for weight in others)
        self.align_corners = conv.align_corners

    def forward(self, maps: list[Tensor]) -> Tensor:
        out, taps = self.conv(maps[0]), []
        for x, product in zip(maps[1:], self.taps, strict=True):
            taps += take_taps(x, product, out.shape[1])
        return add_up_sampled(out, taps, self.align_corners)


def packed_conv2d_3x3(weight: Tensor, bias: Tensor | None, activation: str = 'none') -> nn.Module:
    """Return a convolution of stride and padding 1 in the faster form for its (O, C, 3, 3) weight.

    Only a :class:`PackedConv2d` takes the activation in.
    """
    if weight.dtype == torch.float32 and min(weight.shape[:2]) >= MIN_CHANNELS:
        return PackedWinogradConv2d(weight, bias)
    return PackedConv2d(weight, bias, activation)


def _rows(x: Tensor) -> Tensor:
    """Reshape (N, C, H, W) to (N·H·W, C), without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
