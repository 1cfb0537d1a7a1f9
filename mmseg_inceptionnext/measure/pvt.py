"""Pyramid Vision Transformer, version 1 (Wang et al., ICCV 2021): a baseline of Table 7 that mmseg and timm lack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from timm.layers import DropPath, Mlp
from timm.models.pvt_v2 import Attention  # with linear_attn=False: version 1's spatial-reduction attention
from torch import Tensor, nn

from mmseg_inceptionnext.errors import UserError

DEPTHS = {'small': (3, 4, 6, 3), 'medium': (3, 4, 18, 3), 'large': (3, 8, 27, 3)}
_CHANNELS, _HEADS, _MLP_RATIOS, _SR_RATIOS = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1)


class Block(nn.Module):
    """Pre-norm transformer block. (N, H·W, C) to the same."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, num_heads, sr_ratio=sr_ratio)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, channels * mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch embedding, position embedding (learnt at 224², interpolated to other sizes) and a sequence of blocks.

    (N, C_in, H, W) to (N, C, ⌊H/p⌋, ⌊W/p⌋) for patches of size p.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int, grid_size: int, rates: list[float], **block):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)
        self.pos_embed = nn.Parameter(torch.empty(1, channels, grid_size, grid_size))
        self.blocks = nn.ModuleList(Block(channels, drop_path=rate, **block) for rate in rates)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        size = tuple(x.shape[2:])
        x = self.norm(x.flatten(2).transpose(1, 2))
        position = F.interpolate(self.pos_embed, size=size, mode='bilinear')
        x = x + position.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, size)
        return x.transpose(1, 2).unflatten(2, size)


@MODELS.register_module()
class PVT(BaseModule):
    """PVT-Small, -Medium or -Large, returning the feature maps of its four stages (strides 4, 8, 16, 32).

    Input: (N, 3, H, W), H and W multiples of 32.

    Raises:
        UserError: An unknown ``arch``.
    """

    def __init__(self, arch: str = 'small', drop_path_rate: float = 0.1, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if arch not in DEPTHS:
            raise UserError(f'unknown arch {arch!r}: choose from {", ".join(map(repr, DEPTHS))}')
        rates = iter(torch.linspace(0, drop_path_rate, sum(DEPTHS[arch]), device='cpu').tolist())
        self.stages = nn.ModuleList(
            Stage(
                (3, *_CHANNELS)[i],
                _CHANNELS[i],
                patch_size=4 if i == 0 else 2,
                grid_size=224 // (4 * 2**i),
                rates=[next(rates) for _ in range(depth)],
                num_heads=_HEADS[i],
                mlp_ratio=_MLP_RATIOS[i],
                sr_ratio=_SR_RATIOS[i],
            )
            for i, depth in enumerate(DEPTHS[arch])
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        return tuple(outs)
