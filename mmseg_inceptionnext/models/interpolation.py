"""Linear interpolation along one axis as a matrix, as ``torch.nn.functional.interpolate`` defines it."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Position = TypeVar('Position', float, Tensor)


def source_position(position: Position, size: int, new_size: int, align_corners: bool) -> Position:
    """Return the position in the small map, before clamping, that a position in the up-sampled map is taken from."""
    if align_corners:
        return position * (size - 1) / torch.sym_max(new_size - 1, 1)
    return ((2 * position + 1) * size - new_size) / (2 * new_size)


def shifted_interpolation(size: int, new_size: int, align_corners: bool, device: torch.device | None = None) -> Tensor:
    """Return the interpolation matrix with its rows shifted by -1, 0 and 1; zeros are shifted in.

    ``size`` and ``new_size`` may be symbolic, while a model is exported.

    Returns:
        (3, new_size, size), float64: [i, y, h] is the weight of position h in the up-sampled position y + i - 1.
    """
    new = torch.arange(new_size, dtype=torch.float64, device=device)
    positions = source_position(new, size, new_size, align_corners).clamp(0, size - 1)
    distances = positions[:, None] - torch.arange(size, device=device)
    matrix = F.pad((1 - distances.abs()).clamp(min=0), (0, 0, 1, 1))
    return torch.stack([matrix[i : i + new_size] for i in range(3)])


def source_band(start: int, stop: int, size: int, new_size: int, align_corners: bool) -> tuple[int, int]:
    """Return the range of positions that the up-sampled ones from ``start`` - 1 to ``stop`` (inclusive) depend on."""
    low, high = (
        int(max(source_position(p, size, new_size, align_corners), 0)) for p in (start - 1, min(stop, new_size))
    )
    return min(low, size - 1), min(high + 2, size)
