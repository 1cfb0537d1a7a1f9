"""Up-sampling, shifting and summing the taps of the low-resolution head in one pass over its output.

The plain form, :func:`~mmseg_inceptionnext.models.late_upsample_uper_head.add_up_sampled`, sums by matrix products over
blocks whose size suits a CPU's cache, and half-precision operands are converted to float32 before.

Why it is the same: ``out_yx + Σ_j C_j[x] Σ_i R_i[y] taps_ij`` is what that function computes. Row y of R_i is linear
interpolation at position y + i - 1, or nothing if that is outside of the output, and so is C_j. Linear interpolation
has two weights at most, so a tap is read at four positions: nine taps times four of each map, added up in registers in
float32. Nothing is rounded before the sum is stored.

Its derivative by a tap at position (h, w) of its map is ``Σ_y Σ_x R_i[y, h] C_j[x, w] g_yx``, over those y and x that
the position has a weight in: a program adds up the gradients around one position, for all nine taps.

Positions are fractions of integers, so that the lower neighbour is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_inceptionnext.models.kernels import kernels_run, sum_dtype
from mmseg_inceptionnext.models.late_upsample_uper_head import Taps, add_up_sampled

_MAPS = 4  # of a kernel; a head of more takes the plain form
_PIXELS, _CHANNELS = 16, 128


def add_up_sampled_by_kernel(out: Tensor, taps: list[Taps], align_corners: bool) -> Tensor:
    """Compute :func:`~mmseg_inceptionnext.models.late_upsample_uper_head.add_up_sampled`, not in place."""
    whole = all(part.products.shape[2] == part.width for part in taps)
    if not (kernels_run(out) and whole and 0 < len(taps) <= _MAPS):
        return add_up_sampled(out, taps, align_corners)
    return _AddUpSampledByKernel.apply(out, align_corners, *(part.products for part in taps))


class _AddUpSampledByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, align_corners: bool, *products: Tensor) -> Tensor:
        ctx.align_corners, ctx.like = align_corners, [(x.shape, x.dtype) for x in products]
        products = [x.contiguous(memory_format=torch.channels_last) for x in products]
        n, channels, height, width = out.shape
        result = torch.empty_like(out)
        maps = [value for x in products for value in (x, x.shape[3], x.shape[2])]
        maps += [out, 1, 1] * (_MAPS - len(products))  # which are not read
        grid = (triton.cdiv(height * width, _PIXELS), triton.cdiv(channels, _CHANNELS), n)
        with torch.cuda.device_of(out):
            _add[grid](
                out, result, *maps, channels, height, width, *out.stride(), *result.stride(), MAPS=len(products),
                ALIGN=align_corners, PIXELS=_PIXELS, CHANNELS=_CHANNELS, DTYPE=sum_dtype(out),
            )  # fmt: skip
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        channels, height, width = grad.shape[1:]
        for shape, dtype in ctx.like:
            found = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
            n, _, w, h = shape
            with torch.cuda.device_of(grad):
                _gather[n * w * h, triton.cdiv(channels, _CHANNELS)](
                    grad, found, h, w, channels, height, width, *grad.stride(),
                    ALIGN=ctx.align_corners, CHANNELS=_CHANNELS, DTYPE=sum_dtype(grad),
                )  # fmt: skip
            grads.append(found)
        return grad, None, *grads


@triton.jit
def _neighbour(position, size, new_size, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Return the lower of the two positions that one is interpolated from, and the weight of the upper one."""
    if ALIGN:
        numerator, denominator = position * (size - 1), tl.maximum(new_size - 1, 1)
    else:
        numerator, denominator = (2 * position + 1) * size - new_size, 2 * new_size
    numerator = tl.minimum(tl.maximum(numerator, 0), (size - 1) * denominator)
    low = numerator // denominator
    return low, (numerator - low * denominator).to(DTYPE) / denominator.to(DTYPE)


@triton.jit
def _add(
    out, result, map_0, h_0, w_0, map_1, h_1, w_1, map_2, h_2, w_2, map_3, h_3, w_3, channels, height, width,
    out_n, out_c, out_y, out_x, result_n, result_c, result_y, result_x,
    MAPS: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    image = tl.program_id(2).to(tl.int64)
    row, column = pixel // width, pixel % width
    inside = (pixel < height * width)[:, None] & (channel < channels)
    place = image * out_n + (row.to(tl.int64) * out_y + column * out_x)[:, None] + channel.to(tl.int64) * out_c
    total = tl.load(out + place, mask=inside, other=0).to(DTYPE)
    total += _interpolated(map_0, h_0, w_0, image, row, column, channel, inside, channels, height, width,
                           ALIGN, PIXELS, CHANNELS, DTYPE)  # fmt: skip
    if MAPS > 1:
        total += _interpolated(map_1, h_1, w_1, image, row, column, channel, inside, channels, height, width,
                               ALIGN, PIXELS, CHANNELS, DTYPE)  # fmt: skip
    if MAPS > 2:
        total += _interpolated(map_2, h_2, w_2, image, row, column, channel, inside, channels, height, width,
                               ALIGN, PIXELS, CHANNELS, DTYPE)  # fmt: skip
    if MAPS > 3:
        total += _interpolated(map_3, h_3, w_3, image, row, column, channel, inside, channels, height, width,
                               ALIGN, PIXELS, CHANNELS, DTYPE)  # fmt: skip
    place = image * result_n + (row.to(tl.int64) * result_y + column * result_x)[:, None]
    place += channel.to(tl.int64) * result_c
    tl.store(result + place, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _interpolated(
    products, h, w, image, row, column, channel, inside, channels, height, width,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the sum of a map's nine taps, (PIXELS, CHANNELS). In memory the map is (N, w, h, 9, channels)."""
    total = tl.zeros((PIXELS, CHANNELS), DTYPE)
    for tap in range(9):
        y, x = row + tap // 3 - 1, column + tap % 3 - 1
        top, lower = _neighbour(y, h, height, ALIGN, DTYPE)
        left, right = _neighbour(x, w, width, ALIGN, DTYPE)
        seen = inside & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        for corner in range(4):
            i, j = corner // 2, corner % 2
            weight = tl.where(i == 0, 1 - lower, lower) * tl.where(j == 0, 1 - right, right)
            position = (image * w + tl.minimum(left + j, w - 1)) * h + tl.minimum(top + i, h - 1)
            value = tl.load(products + (position * 9 + tap)[:, None] * channels + channel, mask=seen, other=0)
            total += value.to(DTYPE) * weight[:, None]
    return total


@triton.jit
def _gather(
    grad, found, h, w, channels, height, width, grad_n, grad_c, grad_y, grad_x,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of the nine taps, of 16 for a power of 2, at one position of a map."""
    place = tl.program_id(0).to(tl.int64)
    h_own, w_own, image = place % h, place // h % w, place // (h * w)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    tap = tl.arange(0, 16)
    total = tl.zeros((16, CHANNELS), DTYPE)
    top, bottom = _span(h_own, h, height, ALIGN)
    left, right = _span(w_own, w, width, ALIGN)
    for y in range(top, bottom):
        of_row = _weight(y + tap // 3 - 1, h_own, h, height, ALIGN, DTYPE)
        for x in range(left, right):
            weight = of_row * _weight(x + tap % 3 - 1, w_own, w, width, ALIGN, DTYPE)
            position = image * grad_n + y * grad_y + x * grad_x + channel.to(tl.int64) * grad_c
            value = tl.load(grad + position, mask=channel < channels, other=0).to(DTYPE)
            total += weight[:, None] * value
    position = (place * 9 + tap)[:, None] * channels + channel
    mask = (tap < 9)[:, None] & (channel < channels)
    tl.store(found + position, total.to(found.dtype.element_ty), mask=mask)


@triton.jit
def _weight(position, own, size, new_size, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Return the weight of ``own`` in interpolated positions; nothing in those outside."""
    low, upper = _neighbour(position, size, new_size, ALIGN, DTYPE)
    weight = tl.where(low == own, 1 - upper, tl.where(low + 1 == own, upper, 0))
    return tl.where((position >= 0) & (position < new_size), weight, 0)


@triton.jit
def _span(own, size, new_size, ALIGN: tl.constexpr):
    """Return a range of positions outside of which ``own`` has no weight, with shifts by one."""
    if ALIGN:
        first = tl.maximum(own - 1, 0) * (new_size - 1) // tl.maximum(size - 1, 1)
        last = (own + 1) * (new_size - 1) // tl.maximum(size - 1, 1)
    else:
        first = tl.maximum(2 * own - 1, 0) * new_size // (2 * size)
        last = (2 * own + 3) * new_size // (2 * size)
    return tl.maximum(first - 2, 0), tl.minimum(last + 3, new_size)
