"""Overlapping windows over an image, as a stream: what is held grows with a row of windows, not with the image.

The windows are those of mmseg's slide inference, and so are the logits: of every pixel the mean over its windows. mmseg
holds all of them at full size. Here a window is kept as the head left it, at a stride of 4 as a rule, only until all
pixels below it are decided, and up-sampled one class at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mmseg.models.utils import resize
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A part of an image: rows from ``top`` to before ``bottom``, and columns from ``left`` to before ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def within(self, other: Region) -> tuple[slice, slice]:
        """Return the rows and columns of this region, counted from the corner of another."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )

    def common(self, other: Region) -> Region | None:
        """Return the part that two regions share, if there is one."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None


@dataclass(frozen=True)
class Grid:
    """The windows of mmseg's slide inference over an image.

    The last window of a row and of a column is shifted inwards, to the image's border. Where the image is smaller than
    a window, the window is.

    Attributes:
        size: Height and width of the image.
        crop: Height and width of a window.
        stride: Distance of windows, down and to the right.
    """

    size: tuple[int, int]
    crop: tuple[int, int]
    stride: tuple[int, int]

    def starts(self, axis: int) -> list[int]:
        """Return where windows begin: rows for axis 0, columns for axis 1."""
        beyond = max(self.size[axis] - self.crop[axis], 0)
        return [min(i * self.stride[axis], beyond) for i in range(-(-beyond // self.stride[axis]) + 1)]

    def rows(self) -> Iterator[list[Region]]:
        """Yield the windows of each row, from the top."""
        height, width = (min(side, crop) for side, crop in zip(self.size, self.crop, strict=True))
        lefts = self.starts(1)
        for top in self.starts(0):
            yield [Region(top, top + height, left, left + width) for left in lefts]

    def windows(self) -> Iterator[Region]:
        """Yield all windows, row by row: mmseg's order."""
        for row in self.rows():
            yield from row


@dataclass(frozen=True)
class Window:
    """What the network returned for a window.

    Attributes:
        region: Where the window lies.
        logits: (C, h, w), up-sampled to the window's size when they are asked for.
        align_corners: Whether up-sampling aligns corners.
        weights: (height, width) of the window, or None where all pixels have the weight 1.
        first: Row of the head's output that ``logits`` begin with; those above are dropped.
    """

    region: Region
    logits: Tensor
    align_corners: bool = False
    weights: Tensor | None = None
    first: int = 0

    @property
    def _factor(self) -> int | None:
        """How many pixels one of the head's positions becomes; None if that is no whole number."""
        (height, width), (h, w) = self.region.shape, (self.first + self.logits.shape[1], self.logits.shape[2])
        factor = height // h
        return factor if (factor * h, factor * w) == (height, width) and not self.align_corners else None

    def up_sampled(self, channel: int, region: Region) -> Tensor:
        """Return the logits (height, width) of a class in a part of the window."""
        rows, columns = region.within(self.region)
        x, factor = self.logits[channel], self._factor
        if factor == 1:
            return x[rows.start - self.first : rows.stop - self.first, columns]
        if factor is None:
            return resize(x[None, None], self.region.shape, mode='bilinear', align_corners=self.align_corners,
                          warning=False)[0, 0, rows, columns]  # fmt: skip
        # The positions that the part depends on: one more at each side, where the map has one.
        top, left = (max(part.start // factor - 1, 0) for part in (rows, columns))
        x = x[top - self.first : -(-rows.stop // factor) + 1 - self.first, left : -(-columns.stop // factor) + 1]
        x = F.interpolate(x[None, None], scale_factor=float(factor), mode='bilinear')[0, 0]
        top, left = top * factor, left * factor
        return x[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def below(self, row: int) -> Window:
        """Return the window with what is needed from a row of the image on, and nothing else in memory."""
        if self._factor is None:
            return self
        first = max((row - self.region.top) // self._factor - 1, self.first)
        return replace(self, logits=self.logits[:, first - self.first :].clone(), first=first)


class Cell:
    """A part of an image, and all windows that cover pixels of it.

    Args:
        region: Where it lies.
        windows: Windows in mmseg's order; those that do not cover any of its pixels are left out.
    """

    def __init__(self, region: Region, windows: Iterable[Window]):
        self.region = region
        self._parts = [(window, part) for window in windows if (part := window.region.common(region)) is not None]

    @property
    def channels(self) -> int:
        return len(self._parts[0][0].logits)

    def total(self, channel: int) -> Tensor:
        """Return the weighted sum (height, width) of the logits of a class over the windows."""
        total = self._parts[0][0].logits.new_zeros(self.region.shape)
        for window, part in self._parts:
            logits = window.up_sampled(channel, part)
            if window.weights is not None:
                logits = logits * window.weights[part.within(window.region)]
            total[part.within(self.region)] += logits
        return total

    def weight(self) -> Tensor:
        """Return the sum (height, width) of the weights of the windows."""
        total = self._parts[0][0].logits.new_zeros(self.region.shape)
        for window, part in self._parts:
            weights = 1 if window.weights is None else window.weights[part.within(window.region)]
            total[part.within(self.region)] += weights
        return total

    def labels(self, threshold: float | None = None) -> Tensor:
        """Return the labels (height, width), int16.

        Args:
            threshold: Probability above which a single logit means class 1.
        """
        if threshold is not None:
            return ((self.total(0) / self.weight()).sigmoid() > threshold).short()
        return largest_class(self.channels, self.total)


def largest_class(channels: int, logits: Callable[[int], Tensor]) -> Tensor:
    """Return the class of the largest logit of every pixel; of equal ones, the first.

    Args:
        channels: Number of classes.
        logits: Returns the logits (height, width) of a class.

    Returns:
        (height, width), int16.
    """
    largest = logits(0).clone()  # which may be a view
    label = torch.zeros_like(largest, dtype=torch.int16)  # a quarter of the memory traffic of int64
    for index in range(1, channels):
        logit = logits(index)
        label.masked_fill_(logit > largest, index)
        torch.maximum(logit, largest, out=largest)
    return label


def mean_logits(windows: list[Window], shape: tuple[int, int]) -> Callable[[int], Tensor]:
    """Return a function that returns the mean logits (height, width) of a class over windows that are all there."""
    whole = Cell(Region(0, shape[0], 0, shape[1]), windows)
    weight = whole.weight()
    return lambda channel: whole.total(channel) / weight


def cells(grid: Grid, logits: Iterable[Tensor | None], align_corners: bool = False,
          blend: bool = False) -> Iterator[Cell | Region]:  # fmt: skip
    """Yield the parts of an image that can be decided, as soon as they can be: row by row, from left to right.

    A cell is to be used before the next one is asked for, which drops what no later one needs.

    Args:
        grid: The windows.
        logits: (C, h, w) of each window, in the order of ``grid.windows()``, taken one by one; None for a window whose
            pixels are not wanted.
        align_corners: Whether up-sampling aligns corners.
        blend: Weights that fall towards a window's border, linearly over the overlap, instead of equal ones.

    Yields:
        A cell for each window: from its corner to the next windows. If the window has no logits, the region alone.
    """
    logits, rows = iter(logits), list(grid.rows())
    weights, above = None, []
    for row, next_row in zip(rows, [*rows[1:], None], strict=True):
        bottom = next_row[0].top if next_row else grid.size[0]
        left, passed = [], []  # windows of this row: which cells to come need, and which the next row needs alone
        for region, neighbour in zip(row, [*row[1:], None], strict=True):
            right = neighbour.left if neighbour else grid.size[1]
            cell = Region(region.top, bottom, region.left, right)
            found = next(logits)
            if found is None:
                yield cell
            else:
                found = found.contiguous()
                if blend and weights is None:
                    weights = _falling_weights(grid).to(found)
                left.append(Window(region, found, align_corners, weights))
                yield Cell(cell, [*above, *left])
            passed += [window.below(bottom) for window in left if window.region.right <= right and next_row]
            left = [window for window in left if window.region.right > right]
        above = [window for window in (*above, *passed) if window.region.bottom > bottom]


def _falling_weights(grid: Grid) -> Tensor:
    """Return the weights (height, width) of a window's pixels; those of two neighbours add up to 1."""
    sides = []
    for size, crop, stride in zip(grid.size, grid.crop, grid.stride, strict=True):
        distance = torch.arange(min(size, crop)) + 0.5
        distance = torch.minimum(distance, distance.flip(0))
        sides.append((distance / max(crop - stride, 1)).clamp(max=1))
    return sides[0][:, None] * sides[1]
