"""The architectures of the paper's Table 3, and which of them a state dict belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mmseg_inceptionnext.errors import UserError

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


def resolve_arch(arch: str | dict) -> dict:
    """Return the entry of :data:`ARCHS` of that name or first letter; a dict is checked and returned as it is.

    Raises:
        UserError: An unknown name, or a dict of an architecture that cannot be built.
    """
    if isinstance(arch, str):
        names = {name[0]: name for name in ARCHS} | {name: name for name in ARCHS}
        if arch not in names:
            raise UserError(f'unknown arch {arch!r}: choose from {", ".join(map(repr, ARCHS))}, or give a dict')
        return ARCHS[names[arch]]

    expected = set(ARCHS['tiny'])
    if set(arch) != expected:
        wrong = [f'lacks {sorted(expected - set(arch))}'] if expected - set(arch) else []
        wrong += [f'has unknown keys {sorted(set(arch) - expected)}'] if set(arch) - expected else []
        raise UserError(f'the arch dict {" and ".join(wrong)}; it needs exactly {sorted(expected)}')
    if not 0 < len(arch['depths']) == len(arch['channels']) == len(arch['mlp_ratios']):
        raise UserError('depths, channels and mlp_ratios of an arch dict must have one entry a stage')
    for key in ('band_kernel_size', 'square_kernel_size'):
        if arch[key] % 2 == 0:
            raise UserError(f'{key}={arch[key]} must be odd, or the branches would differ in size')
    if not 1 <= int(min(arch['channels']) * arch['branch_ratio']) <= min(arch['channels']) // 3:
        raise UserError(
            f'branch_ratio={arch["branch_ratio"]} of {min(arch["channels"])} channels must give each of the three '
            'convolution branches at least one channel and at most a third of them'
        )
    return arch


def recognise_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the name of the architecture with the depths and widths of a backbone's state dict, or None."""
    widths: dict[int, list[int]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'stages\.(\d+)\.blocks\.\d+\.gamma', key):
            widths.setdefault(int(match[1]), []).append(len(value))
    depths = tuple(len(widths[i]) for i in sorted(widths))
    channels = tuple(widths[i][0] for i in sorted(widths))
    found = (name for name, arch in ARCHS.items() if (arch['depths'], arch['channels']) == (depths, channels))
    return next(found, None)
