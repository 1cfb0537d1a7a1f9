"""The token mixer in one kernel: x is read once and written once.

The plain form, :class:`~mmseg_inceptionnext.models.token_mixers.InceptionDWConv2d`, splits x, convolves three of the
parts and concatenates all four: each channel is read and written twice, the unchanged ones as well.

Why it is the same: the mixer is a depthwise operation, so an output channel depends on one input channel alone, and its
index says by which of four rules: copied, or convolved by the 3×3, the 1×k or the k×1 kernel. A program takes some
pixels and some channels of one part, and applies the rule. Positions outside of the image count as zeros, as the plain
form's padding does.

Its derivatives: of ``y_p = Σ_t w_t x_{p+t}`` by x it is ``Σ_t w_t g_{p-t}``, the same kernel with flipped weights,
without a bias; by ``w_t`` it is ``Σ_p g_p x_{p+t}``, and by the bias ``Σ_p g_p``. The sums over pixels are made in
parts, each by one program in a fixed order, and added up: they are the same in each run.

A norm after the mixer needs no kernel: :func:`~mmseg_inceptionnext.inference.optimize.fold_norms` puts it into the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_inceptionnext.models.kernels import kernels_run, sum_dtype
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d

_PARTS = 128  # of the pixels, in the sums of the weights' gradient


class FusedInceptionDWConv2d(InceptionDWConv2d):
    """An InceptionDWConv2d computed by :func:`mix_tokens`; where that cannot run, by its plain form.

    Under autocast it computes in float32 and returns the dtype of x, where the plain form rounds to half precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not kernels_run(x):
            return super().forward(x)
        convs = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        return mix_tokens(x, *(parameter for conv in convs for parameter in (conv.weight, conv.bias)))


def mix_tokens(x: Tensor, weight_hw: Tensor, bias_hw: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor,
               bias_h: Tensor) -> Tensor:  # fmt: skip
    """Compute the token mixer (Eq. 4-7); products are summed in float32, or in float64 if x is.

    Args:
        x: (N, C, H, W), in any layout.
        weight_hw, weight_w, weight_h: (g, 1, s, s), (g, 1, 1, k) and (g, 1, k, 1), s and k odd.
        bias_hw, bias_w, bias_h: (g,).

    Returns:
        (N, C, H, W), dtype and layout of x.
    """
    return _MixTokens.apply(x, weight_hw, bias_hw, weight_w, bias_w, weight_h, bias_h)


class _MixTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        return _mixed(x, parameters, gradient=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        grad_x = _mixed(grad, parameters, gradient=True) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, *[None] * 6
        return grad_x, *_parameter_gradients(x, grad, parameters)


def _mixed(x: Tensor, parameters: tuple[Tensor, ...], gradient: bool) -> Tensor:
    weights, (n, channels, height, width) = parameters[::2], x.shape
    g, out = len(weights[0]), torch.empty_like(x)
    pixels, block = _tile(x)
    copied = triton.cdiv(channels - 3 * g, block)
    grid = (triton.cdiv(height * width, pixels), copied + 3 * triton.cdiv(g, block), n)
    with torch.cuda.device_of(x):
        _mix[grid](
            x, out, *(parameter.contiguous() for parameter in parameters), channels - 3 * g, g, copied, height, width,
            *x.stride(), *out.stride(), SQUARE=weights[0].shape[3], BAND=weights[1].shape[3], GRADIENT=gradient,
            PIXELS=pixels, BLOCK=block, DTYPE=sum_dtype(x),
        )  # fmt: skip
    return out


def _parameter_gradients(x: Tensor, grad: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    weights, (n, channels, height, width) = parameters[::2], x.shape
    g, square, band = len(weights[0]), weights[0].shape[3], weights[1].shape[3]
    pixels, block = _tile(x)
    parts = min(triton.cdiv(n * height * width, pixels), _PARTS)
    taps = triton.next_power_of_2(max(square**2, band) + 1)  # the bias's gradient comes after the last tap
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty(parts, 3, g, taps, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _sum_products[triton.cdiv(g, block), 3, parts](
            x, grad, sums, channels - 3 * g, g, n * height * width, height, width, *x.stride(), *grad.stride(),
            SQUARE=square, BAND=band, TAPS=taps, PIXELS=pixels, BLOCK=block, DTYPE=sum_dtype(x),
        )  # fmt: skip
    gradients = []
    for weight, of_branch in zip(weights, sums.sum(0), strict=True):
        number = weight[0].numel()
        gradients += [of_branch[:, :number].reshape(weight.shape), of_branch[:, number]]
    return [found.to(parameter.dtype) for found, parameter in zip(gradients, parameters, strict=True)]


def _tile(x: Tensor) -> tuple[int, int]:
    """Return the pixels and channels of a program: those that follow one another in memory."""
    return (64, 16) if x.stride(1) == 1 and x.shape[1] > 1 else (512, 1)


@triton.jit
def _mix(
    x, out, weight_hw, bias_hw, weight_w, bias_w, weight_h, bias_h, identity, g, copied, height, width,
    x_n, x_c, x_y, x_x, out_n, out_c, out_y, out_x,
    SQUARE: tl.constexpr, BAND: tl.constexpr, GRADIENT: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Blocks of channels: ``copied`` of the first ``identity`` ones, then as many of each branch."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    block = tl.program_id(1)
    row, column = pixel // width, pixel % width
    image = tl.program_id(2).to(tl.int64)
    x += image * x_n
    out += image * out_n + (row.to(tl.int64) * out_y + column * out_x)[:, None]
    inside = (pixel < height * width)[:, None]
    if block < copied:
        copy = (block * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
        of_copy = inside & (copy < identity)
        place = (row.to(tl.int64) * x_y + column * x_x)[:, None] + copy * x_c
        tl.store(out + copy * out_c, tl.load(x + place, mask=of_copy), mask=of_copy)
    else:
        blocks = tl.cdiv(g, BLOCK)
        branch = (block - copied) // blocks
        own = ((block - copied) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
        channel = (identity + branch * g + own).to(tl.int64)
        of_x, of_out, of_branch = x + channel * x_c, out + channel * out_c, inside & (own < g)
        if branch == 0:
            _convolve(of_x, of_out, weight_hw, bias_hw, row, column, own, of_branch, g, height, width, x_y, x_x,
                      SQUARE, SQUARE, GRADIENT, PIXELS, BLOCK, DTYPE)  # fmt: skip
        elif branch == 1:
            _convolve(of_x, of_out, weight_w, bias_w, row, column, own, of_branch, g, height, width, x_y, x_x,
                      1, BAND, GRADIENT, PIXELS, BLOCK, DTYPE)  # fmt: skip
        else:
            _convolve(of_x, of_out, weight_h, bias_h, row, column, own, of_branch, g, height, width, x_y, x_x,
                      BAND, 1, GRADIENT, PIXELS, BLOCK, DTYPE)  # fmt: skip


@triton.jit
def _convolve(
    x, out, weight, bias, row, column, own, inside, g, height, width, x_y, x_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRADIENT: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((PIXELS, BLOCK), DTYPE)
    if not GRADIENT:
        total += tl.load(bias + own, mask=own < g, other=0).to(DTYPE)
    for tap in tl.static_range(ROWS * COLUMNS):
        value = _shifted(x, row, column, inside, height, width, x_y, x_x, tap, ROWS, COLUMNS)
        place = ROWS * COLUMNS - 1 - tap if GRADIENT else tap
        total += value.to(DTYPE) * tl.load(weight + own * (ROWS * COLUMNS) + place, mask=own < g, other=0).to(DTYPE)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _shifted(x, row, column, inside, height, width, x_y, x_x, tap, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the values that a tap is multiplied with: zeros from outside of the image."""
    y, z = row + tap // COLUMNS - ROWS // 2, column + tap % COLUMNS - COLUMNS // 2
    seen = (y >= 0) & (y < height) & (z >= 0) & (z < width)
    return tl.load(x + (y.to(tl.int64) * x_y + z * x_x)[:, None], mask=inside & seen[:, None], other=0)


@triton.jit
def _sum_products(
    x, grad, sums, identity, g, pixels, height, width, x_n, x_c, x_y, x_x, grad_n, grad_c, grad_y, grad_x,
    SQUARE: tl.constexpr, BAND: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of some channels of a branch, and every so many blocks of pixels of all images."""
    own = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    branch = tl.program_id(1)
    channel = (identity + branch * g + own).to(tl.int64)
    x += channel * x_c
    grad += channel * grad_c
    sums += (tl.program_id(2).to(tl.int64) * 3 + branch) * g * TAPS
    if branch == 0:
        _sum_branch(x, grad, sums, own, g, pixels, height, width, x_n, x_y, x_x, grad_n, grad_y, grad_x,
                    SQUARE, SQUARE, TAPS, PIXELS, BLOCK, DTYPE)  # fmt: skip
    elif branch == 1:
        _sum_branch(x, grad, sums, own, g, pixels, height, width, x_n, x_y, x_x, grad_n, grad_y, grad_x,
                    1, BAND, TAPS, PIXELS, BLOCK, DTYPE)  # fmt: skip
    else:
        _sum_branch(x, grad, sums, own, g, pixels, height, width, x_n, x_y, x_x, grad_n, grad_y, grad_x,
                    BAND, 1, TAPS, PIXELS, BLOCK, DTYPE)  # fmt: skip


@triton.jit
def _sum_branch(
    x, grad, sums, own, g, pixels, height, width, x_n, x_y, x_x, grad_n, grad_y, grad_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    taps = tl.arange(0, TAPS)[None, :]
    total = tl.zeros((BLOCK, TAPS), DTYPE)
    for block in range(tl.program_id(2), tl.cdiv(pixels, PIXELS), tl.num_programs(2)):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        image = (pixel // (height * width)).to(tl.int64)
        row, column = pixel % (height * width) // width, pixel % width
        inside = (pixel < pixels)[:, None] & (own < g)
        place = image * grad_n + row * grad_y + column * grad_x
        gradient = tl.load(grad + place[:, None], mask=inside, other=0).to(DTYPE)
        of_image = x + (image * x_n)[:, None]
        for tap in tl.static_range(ROWS * COLUMNS):
            value = _shifted(of_image, row, column, inside, height, width, x_y, x_x, tap, ROWS, COLUMNS)
            product = tl.sum(gradient * value.to(DTYPE), axis=0)
            total += tl.where(taps == tap, product[:, None], 0)
        total += tl.where(taps == ROWS * COLUMNS, tl.sum(gradient, axis=0)[:, None], 0)
    channel = tl.trans(own)
    tl.store(sums + channel * TAPS + taps, total, mask=channel < g)
