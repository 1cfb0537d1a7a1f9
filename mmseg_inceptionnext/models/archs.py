"""The architectures of the paper: of Table 3, and of its experiments with other token mixers and norms."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmseg_inceptionnext.errors import UserError, did_you_mean

# Table 3. Its Atto column misprints two widths; these are the released model's, and give the printed 4.2 M parameters.
ARCHS = {
    'atto': dict(depths=(2, 2, 6, 2), channels=(40, 80, 160, 320), mlp_ratios=(4, 4, 4, 3),
                 band_kernel_size=9, square_kernel_size=3, branch_ratio=1 / 4),
    'tiny': dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768), mlp_ratios=(4, 4, 4, 3),
                 band_kernel_size=11, square_kernel_size=3, branch_ratio=1 / 8),
    'small': dict(depths=(3, 3, 27, 3), channels=(96, 192, 384, 768), mlp_ratios=(4, 4, 4, 3),
                  band_kernel_size=11, square_kernel_size=3, branch_ratio=1 / 8),
    'base': dict(depths=(3, 3, 27, 3), channels=(128, 256, 512, 1024), mlp_ratios=(4, 4, 4, 3),
                 band_kernel_size=11, square_kernel_size=3, branch_ratio=1 / 8),
}  # fmt: skip


_BODY = ('depths', 'channels', 'mlp_ratios')
_BN, _LN = dict(type='SyncBN', requires_grad=True), dict(type='LN', eps=1e-6)
_CONVNEXT_TINY = dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768), mlp_ratios=(4, 4, 4, 4), norm_cfg=_LN)
_ISO_SMALL = dict(depths=18, channels=384, mlp_ratios=4, patch_size=16)


def _from_inceptionnext(arch: Mapping, norm_cfg: Mapping = _BN, **token_mixer: Any) -> dict:
    """Return an arch like those of :data:`ARCHS` as MetaNeXt takes it, with some arguments of its mixer changed."""
    body = {key: arch[key] for key in _BODY}
    mixer = dict(type='InceptionDWConv2d', **{key: arch[key] for key in arch if key not in _BODY})
    return dict(body, norm_cfg=norm_cfg, token_mixer=mixer | token_mixer)


def _inceptionnext_tiny(norm_cfg: Mapping = _BN, **token_mixer: Any) -> dict:
    return _from_inceptionnext(ARCHS['tiny'], norm_cfg, **token_mixer)


def _convnext_tiny(kernel_size: int = 7, ratio: float = 1.0) -> dict:
    return dict(_CONVNEXT_TINY, token_mixer=dict(type='DWConv2d', kernel_size=kernel_size, ratio=ratio))


# Every row of Tables 1, 3, 5 and 8 that has the MetaNeXt block. ConvNeXt's names are those of the released files. The
# paper does not say which norms the isotropic models have, nor a position embedding of MetaNeXt-Attn: there is none
# here. The printed MACs of MetaNeXt-Attn are those of DeiT-S's 12 blocks.
METANEXT_ARCHS = {
    **{f'inceptionnext_{name}': _from_inceptionnext(arch) for name, arch in ARCHS.items()},
    'convnext_tiny': _convnext_tiny(),
    'convnext_tiny_k5': _convnext_tiny(5),
    'convnext_tiny_k3': _convnext_tiny(3),
    'convnext_tiny_k3_par1_2': _convnext_tiny(3, 1 / 2),
    'convnext_tiny_k3_par3_8': _convnext_tiny(3, 3 / 8),
    'convnext_tiny_k3_par1_4': _convnext_tiny(3, 1 / 4),
    'convnext_tiny_k3_par1_8': _convnext_tiny(3, 1 / 8),
    'convnext_tiny_k3_par1_16': _convnext_tiny(3, 1 / 16),
    'metanext_attn_small': dict(_ISO_SMALL, depths=12, norm_cfg=_LN, token_mixer=dict(type='Attention', head_dim=64)),
    'convnext_iso_small': dict(_ISO_SMALL, norm_cfg=_LN, token_mixer=dict(type='DWConv2d', kernel_size=7)),
    'inceptionnext_iso_small': dict(_ISO_SMALL, norm_cfg=_BN, token_mixer=_inceptionnext_tiny()['token_mixer']),
    'inceptionnext_tiny_no_w': _inceptionnext_tiny(branches=('hw', 'h')),
    'inceptionnext_tiny_no_h': _inceptionnext_tiny(branches=('hw', 'w')),
    'inceptionnext_tiny_no_hw': _inceptionnext_tiny(branches=('w', 'h')),
    'inceptionnext_tiny_sequential': _inceptionnext_tiny(sequential=True),
    'inceptionnext_tiny_band7': _inceptionnext_tiny(band_kernel_size=7),
    'inceptionnext_tiny_band9': _inceptionnext_tiny(band_kernel_size=9),
    'inceptionnext_tiny_band13': _inceptionnext_tiny(band_kernel_size=13),
    'inceptionnext_tiny_ratio1_4': _inceptionnext_tiny(branch_ratio=1 / 4),
    'inceptionnext_tiny_ratio1_16': _inceptionnext_tiny(branch_ratio=1 / 16),
    'inceptionnext_tiny_ln': _inceptionnext_tiny(norm_cfg=_LN),
}


@dataclasses.dataclass(frozen=True)
class MetaNeXtArch:
    """A MetaNeXt as it is built: a number of blocks, a width and an MLP ratio for each stage.

    An isotropic one has a stage of its own for each block, none of which down-samples.
    """

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    patch_size: int = 4
    isotropic: bool = False
    token_mixer: Mapping = dataclasses.field(default_factory=lambda: dict(type='InceptionDWConv2d'))
    norm_cfg: Mapping = dataclasses.field(default_factory=lambda: _BN)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of the output of each stage."""
        return tuple(self.patch_size * (1 if self.isotropic else 2**i) for i in range(len(self.depths)))

    @property
    def default_out_indices(self) -> tuple[int, ...]:
        """All stages; of an isotropic one, the blocks that end its quarters, for heads that take four maps."""
        number = len(self.depths)
        if self.isotropic and number > 4:
            return tuple((i + 1) * number // 4 - 1 for i in range(4))
        return tuple(range(number))

    def mixer_with(self, changes: Mapping | None) -> dict:
        """Return the token mixer with some arguments changed, or another if ``changes`` name another type."""
        changes = dict(changes or {})
        same = changes.get('type', self.token_mixer['type']) == self.token_mixer['type']
        return {**self.token_mixer, **changes} if same else changes


def resolve_metanext_arch(arch: str | Mapping) -> MetaNeXtArch:
    """Return the MetaNeXt of a name in :data:`METANEXT_ARCHS`, of one that InceptionNeXt takes, or of a dict.

    Raises:
        UserError: An unknown name, or a dict of an architecture that cannot be built.
    """
    if isinstance(arch, str):
        if arch in ARCHS or arch in [name[0] for name in ARCHS]:
            arch = f'inceptionnext_{next(name for name in ARCHS if name.startswith(arch))}'
        if arch not in METANEXT_ARCHS:
            meant = did_you_mean(arch, METANEXT_ARCHS, f'choose from {", ".join(map(repr, METANEXT_ARCHS))}')
            raise UserError(f'unknown arch {arch!r}: {meant}, or give a dict')
        arch = METANEXT_ARCHS[arch]
    elif 'band_kernel_size' in arch:
        arch = _from_inceptionnext(resolve_arch(arch))

    unknown = sorted(set(arch) - {*_BODY, 'patch_size', 'token_mixer', 'norm_cfg'})
    if unknown or not set(_BODY) <= set(arch):
        wrong = f'has unknown keys {unknown}' if unknown else f'lacks {sorted(set(_BODY) - set(arch))}'
        raise UserError(
            f'the arch dict {wrong}; it needs {list(_BODY)} and may have patch_size, token_mixer and norm_cfg'
        )
    if not isinstance(size := arch.get('patch_size', 4), int) or size < 1:
        raise UserError(f'patch_size={size} of an arch dict must be a whole number of pixels')
    numbers = [isinstance(arch[key], (int, float)) for key in _BODY]
    if all(numbers):
        depth = arch['depths']
        if not isinstance(depth, int) or depth < 1:
            raise UserError(f'depths={depth} of an isotropic arch must be a whole number of blocks, at least one')
        repeated = {'depths': (1,) * depth} | {key: (arch[key],) * depth for key in _BODY[1:]}
        return MetaNeXtArch(**{**arch, **repeated}, isotropic=True)
    if any(numbers) or not 0 < len(arch['depths']) == len(arch['channels']) == len(arch['mlp_ratios']):
        raise UserError(
            'depths, channels and mlp_ratios of an arch dict must have one entry a stage, or be three numbers'
        )
    return MetaNeXtArch(**arch)


def resolve_arch(arch: str | dict) -> dict:
    """Return the entry of :data:`ARCHS` of that name or first letter; a dict is checked and returned as it is.

    Raises:
        UserError: An unknown name, or a dict of an architecture that cannot be built.
    """
    if isinstance(arch, str):
        names = {name[0]: name for name in ARCHS} | {name: name for name in ARCHS}
        if arch not in names:
            if arch in METANEXT_ARCHS:
                raise UserError(f"arch={arch!r} is MetaNeXt's: set type='MetaNeXt'")
            raise UserError(f'unknown arch {arch!r}: choose from {", ".join(map(repr, ARCHS))}, or give a dict')
        return ARCHS[names[arch]]

    expected = set(ARCHS['tiny'])
    if set(arch) != expected:
        wrong = [f'lacks {sorted(expected - set(arch))}'] if expected - set(arch) else []
        wrong += [f'has unknown keys {sorted(set(arch) - expected)}'] if set(arch) - expected else []
        raise UserError(f'the arch dict {" and ".join(wrong)}; it needs exactly {sorted(expected)}')
    if not 0 < len(arch['depths']) == len(arch['channels']) == len(arch['mlp_ratios']):
        raise UserError('depths, channels and mlp_ratios of an arch dict must have one entry a stage')
    return arch


def recognise_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the name of the InceptionNeXt with the depths and widths of a backbone's state dict, or None."""
    if not any('.token_mixer.dwconv_' in key for key in state_dict):
        return None
    widths: dict[int, list[int]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'stages\.(\d+)\.blocks\.\d+\.gamma', key):
            widths.setdefault(int(match[1]), []).append(len(value))
    depths = tuple(len(widths[i]) for i in sorted(widths))
    channels = tuple(widths[i][0] for i in sorted(widths))
    found = (name for name, arch in ARCHS.items() if (arch['depths'], arch['channels']) == (depths, channels))
    return next(found, None)
