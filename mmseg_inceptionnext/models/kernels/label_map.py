"""Label maps from the logits of a head in one pass: up-sampling and argmax, without logits at full size.

The plain form, :func:`~mmseg_inceptionnext.inference.label_map_segmentor.label_map`, up-samples a class at a time, in
one step to the size of the network's input and in another to that of the original image, and keeps the largest.

Why it is the same: a pixel's label depends on the logits at a few positions of the head's output. A program takes some
pixels and goes through the classes; for each it interpolates as torch does, with the same float32 positions and in the
same order, and where there are two steps, the four neighbours of the second are results of the first. Padding is left
out and a flip undone by the index. A class replaces the one before it only if its logit is larger: of equal ones, the
first stays, as torch's argmax has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_inceptionnext.models.kernels import kernels_run

_PIXELS = 256


def label_map_by_kernel(logits: Tensor, input_size: tuple[int, int], meta: dict, align_corners: bool,
                        plain: Callable[..., Tensor]) -> Tensor:  # fmt: skip
    """Compute the plain form, :func:`~mmseg_inceptionnext.inference.label_map_segmentor.label_map`.

    Args:
        logits, input_size, meta, align_corners: Its arguments.
        plain: What is called where the kernel cannot run, and for float64.
    """
    if not kernels_run(logits) or logits.dtype == torch.float64:
        return plain(logits, input_size, meta, align_corners)
    classes, h, w = logits.shape
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    size = input_size[0] - top - bottom, input_size[1] - left - right
    height, width = meta['ori_shape'][:2]
    flipped = meta['flip_direction'] if meta.get('flip') else None
    labels = torch.empty(1, height, width, dtype=torch.long, device=logits.device)
    scales = [
        _scale(*sizes, align_corners)
        for sizes in ((h, input_size[0]), (w, input_size[1]), (size[0], height), (size[1], width))
    ]
    with torch.cuda.device_of(logits):
        _largest_class[(triton.cdiv(height * width, _PIXELS),)](
            logits.contiguous(), labels, classes, h, w, *size, top, left, height, width, *scales,
            FIRST=(h, w) != tuple(input_size), SECOND=size != (height, width),
            UPSIDE_DOWN=flipped == 'vertical', MIRRORED=flipped == 'horizontal', ALIGN=align_corners,
            PIXELS=_PIXELS,
        )  # fmt: skip
    return labels


def _scale(size: int, new_size: int, align_corners: bool) -> float:
    """Return by what torch multiplies positions."""
    if align_corners:
        return (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    return size / new_size


@triton.jit
def _largest_class(
    logits, labels, classes, h, w, size_y, size_x, top, left, height, width, scale_y, scale_x, scale_2_y, scale_2_x,
    FIRST: tl.constexpr, SECOND: tl.constexpr, UPSIDE_DOWN: tl.constexpr, MIRRORED: tl.constexpr, ALIGN: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    largest = tl.zeros((PIXELS,), tl.float32)
    label = tl.zeros((PIXELS,), tl.int64)
    for index in range(classes):
        if SECOND:
            y_0, y_1, lower = _neighbours(y, size_y, scale_2_y, ALIGN)
            x_0, x_1, right = _neighbours(x, size_x, scale_2_x, ALIGN)
            value = _blend(
                _at(logits, y_0, x_0, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
                    FIRST, UPSIDE_DOWN, MIRRORED, ALIGN),
                _at(logits, y_0, x_1, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
                    FIRST, UPSIDE_DOWN, MIRRORED, ALIGN),
                _at(logits, y_1, x_0, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
                    FIRST, UPSIDE_DOWN, MIRRORED, ALIGN),
                _at(logits, y_1, x_1, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
                    FIRST, UPSIDE_DOWN, MIRRORED, ALIGN),
                lower, right,
            )  # fmt: skip
        else:
            value = _at(logits, y, x, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
                        FIRST, UPSIDE_DOWN, MIRRORED, ALIGN)  # fmt: skip
        is_larger = (value > largest) | (index == 0)
        label = tl.where(is_larger, index, label)
        largest = tl.where(is_larger | (value != value), value, largest)  # nothing is larger than NaN
        logits += h * w
    tl.store(labels + pixel, label, mask=inside)


@triton.jit
def _at(
    logits, y, x, inside, h, w, size_y, size_x, top, left, scale_y, scale_x,
    FIRST: tl.constexpr, UPSIDE_DOWN: tl.constexpr, MIRRORED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return a class's logits, up-sampled to the network's input, at positions without its padding and flip."""
    if UPSIDE_DOWN:
        y = size_y - 1 - y
    if MIRRORED:
        x = size_x - 1 - x
    y, x = y + top, x + left
    if FIRST:
        y_0, y_1, lower = _neighbours(y, h, scale_y, ALIGN)
        x_0, x_1, right = _neighbours(x, w, scale_x, ALIGN)
        value = _blend(
            tl.load(logits + y_0 * w + x_0, mask=inside).to(tl.float32),
            tl.load(logits + y_0 * w + x_1, mask=inside).to(tl.float32),
            tl.load(logits + y_1 * w + x_0, mask=inside).to(tl.float32),
            tl.load(logits + y_1 * w + x_1, mask=inside).to(tl.float32),
            lower, right,
        )  # fmt: skip
    else:
        value = tl.load(logits + y * w + x, mask=inside).to(tl.float32)
    return value


@triton.jit
def _neighbours(position, size, scale, ALIGN: tl.constexpr):
    """Return the two positions that one is interpolated from, and the weight of the second."""
    exact = position * scale if ALIGN else tl.maximum((position + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(exact.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), exact - first


@triton.jit
def _blend(a, b, c, d, lower, right):
    return (1 - lower) * ((1 - right) * a + right * b) + lower * ((1 - right) * c + right * d)
