"""Token mixers of the MetaNeXt block (Sec. 3): what moves information between positions.

Each takes and returns (N, C, H, W). A mixer of your own is a module whose first argument is the number of channels,
registered in :data:`TOKEN_MIXERS`; a config names it as ``token_mixer=dict(type=…)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real

import timm.models.vision_transformer
import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from mmseg_inceptionnext.errors import UserError

TOKEN_MIXERS = Registry('token mixer', scope='mmseg_inceptionnext')


def build_token_mixer(cfg: Mapping, channels: int) -> nn.Module:
    """Build the token mixer of a config for a number of channels.

    Raises:
        UserError: It is not registered, or does not take its arguments.
    """
    arguments = dict(cfg)
    name = arguments.pop('type', None)
    mixer = TOKEN_MIXERS.module_dict.get(name)
    if mixer is None:
        raise UserError(f'token_mixer.type={name!r} is none of {", ".join(TOKEN_MIXERS.module_dict)}: choose one')
    known = list(inspect.signature(mixer).parameters)[1:]
    if unknown := [key for key in arguments if key not in known]:
        raise UserError(
            f'token_mixer.{unknown[0]} is no argument of {name}, which takes {", ".join(known)}: correct it'
        )
    return mixer(channels, **arguments)


@TOKEN_MIXERS.register_module()
class InceptionDWConv2d(nn.Module):
    """A large-kernel depthwise convolution decomposed into four parallel branches (Sec. 3.2, Eq. 4-7).

    Of C channels, the first C - 3g pass unchanged; g each go through a square, a horizontal and a vertical band
    kernel, g = ⌊C · branch_ratio⌋. The identity comes first, as in the released weights; Algorithm 1 prints it last.

    Args:
        channels: C.
        square_kernel_size: Side of the square kernel, odd.
        band_kernel_size: Length of both band kernels, odd.
        branch_ratio: Share of the channels that each kernel takes, at most a third.
        branches: Which of 'hw' (square), 'w' (horizontal band) and 'h' (vertical band) there are. The channels of the
            others pass unchanged (Table 8).
        sequential: Both band kernels, the horizontal one first, on the g channels of the horizontal one; those of the
            vertical one pass unchanged (Table 8).

    Raises:
        UserError: An argument outside its range.
    """

    def __init__(
        self,
        channels: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 1 / 8,
        branches: Sequence[str] = ('hw', 'w', 'h'),
        sequential: bool = False,
    ):
        super().__init__()
        _check_odd(square_kernel_size=square_kernel_size, band_kernel_size=band_kernel_size)
        if not isinstance(branch_ratio, Real) or not 1 <= int(channels * branch_ratio) <= channels // 3:
            raise UserError(
                f'branch_ratio={branch_ratio} of {channels} channels must give each of the three convolution branches '
                'at least one channel and at most a third of them'
            )
        branches = (branches,) if isinstance(branches, str) else tuple(branches)
        if not set(branches) <= {'hw', 'w', 'h'}:
            raise UserError(f"branches={branches} must be some of 'hw', 'w' and 'h'")
        if sequential and not {'w', 'h'} <= set(branches):
            raise UserError(f"sequential=True needs both band kernels: branches={branches} must have 'w' and 'h'")
        g = int(channels * branch_ratio)
        kernel_sizes = {'hw': (square_kernel_size,) * 2, 'w': (1, band_kernel_size), 'h': (band_kernel_size, 1)}
        for branch, kernel_size in kernel_sizes.items():
            conv = _depthwise(g, kernel_size) if branch in branches else nn.Identity()
            self.add_module(f'dwconv_{branch}', conv)
        self.split_sizes = (channels - 3 * g, g, g, g)
        self.sequential = sequential

    def forward(self, x: Tensor) -> Tensor:
        x_id, x_hw, x_w, x_h = x.split(self.split_sizes, dim=1)
        if self.sequential:
            x_w = self.dwconv_h(self.dwconv_w(x_w))
        else:
            x_w, x_h = self.dwconv_w(x_w), self.dwconv_h(x_h)
        return torch.cat((x_id, self.dwconv_hw(x_hw), x_w, x_h), dim=1)


@TOKEN_MIXERS.register_module()
class DWConv2d(nn.Module):
    """ConvNeXt's depthwise convolution (Eq. 4), of all channels or, as in Table 1, of the last ones.

    Args:
        channels: C.
        kernel_size: Side of the kernel, odd.
        ratio: Share of the channels that are convolved, ⌊C · ratio⌋ of them; the first ones pass unchanged.

    Raises:
        UserError: An argument outside its range.
    """

    def __init__(self, channels: int, kernel_size: int = 7, ratio: float = 1.0):
        super().__init__()
        _check_odd(kernel_size=kernel_size)
        if not isinstance(ratio, Real) or not 1 <= int(channels * ratio) <= channels:
            raise UserError(f'ratio={ratio} of {channels} channels must give at least one and at most all of them')
        convolved = int(channels * ratio)
        self.dwconv = _depthwise(convolved, (kernel_size, kernel_size))
        self.split_sizes = (channels - convolved, convolved)

    def forward(self, x: Tensor) -> Tensor:
        if self.split_sizes[0] == 0:
            return self.dwconv(x)
        x_id, x_conv = x.split(self.split_sizes, dim=1)
        return torch.cat((x_id, self.dwconv(x_conv)), dim=1)


@TOKEN_MIXERS.register_module()
class Attention(timm.models.vision_transformer.Attention):
    """timm's multi-head self-attention over all positions (MetaNeXt-Attn, Table 5), without position embedding.

    Args:
        channels: C.
        head_dim: Channels of a head; C is a multiple of it.
        qkv_bias: Queries, keys and values have biases.

    Raises:
        UserError: ``head_dim`` does not divide ``channels``.
    """

    def __init__(self, channels: int, head_dim: int = 64, qkv_bias: bool = True):
        if not isinstance(head_dim, int) or head_dim < 1 or channels % head_dim:
            raise UserError(f'head_dim={head_dim} must divide the {channels} channels')
        super().__init__(channels, num_heads=channels // head_dim, qkv_bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape)


def _depthwise(channels: int, kernel_size: tuple[int, int]) -> nn.Conv2d:
    padding = tuple(side // 2 for side in kernel_size)
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels)


def _check_odd(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise UserError(f'{name}={size} must be odd, or the map would change its size')
