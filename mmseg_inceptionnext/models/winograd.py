"""A 3×3 convolution in 16/36 of the multiplications, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

# F(2×2, 3×3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), Sec. 4.1.
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
MIN_CHANNELS = 256  # input and output channels: with fewer, the transforms cost what the products save
_TILES = 512  # tiles a block: what the caches of a core hold with 512 channels


def conv2d_3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.conv2d(x, weight, bias, padding=1)`` for 3×3 kernels, faster where possible.

    That is in float32 on a CPU, for many channels; cuDNN does the same itself. In one dimension, two outputs of a
    kernel w over inputs d are

        ``y = (m_0 + m_1 + m_2, m_1 - m_2 - m_3)`` with ``m = (d_0 - d_2, d_1 + d_2, d_2 - d_1, d_1 - d_3) ∘ G w``,

    as multiplying out shows: four products instead of six, and in two dimensions, rows first and then columns, 16
    instead of 36. For many channels each of the 16 is a matrix product over channels. Inputs and products are only
    added and halved, so that rounding errors are of the direct convolution's size: with 256 and 512 channels the
    largest error against float64 was below 5e-7 of the largest output, the mean error 1.6 to 2 times the direct one's.
    Both derivatives save as much; the one of ``x`` is such a convolution, too.

    Args:
        x: (N, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,).

    Returns:
        (N, O, H, W).
    """
    worthwhile = (
        x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and x.shape[2] * x.shape[3] >= 16 * 16
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and custom_functions_work()
    )
    if not worthwhile:
        return F.conv2d(x, weight, bias, padding=1)
    out = _Winograd.apply(x, weight)
    return out if bias is None else out + bias[:, None, None]


def custom_functions_work() -> bool:
    """Return whether autograd functions of our own can run: not in torch.jit.trace, torch.func or forward-mode AD."""
    return not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


class WinogradConv2d(nn.Conv2d):
    """A plain 3×3 convolution, stride and padding 1, computed by :func:`conv2d_3x3`."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> WinogradConv2d:
        """Turn a plain 3×3 convolution into one, in place: its parameters and hooks stay where they are."""
        conv.__class__ = cls
        return conv

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d_3x3(x, weight, bias)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, transform_weight(weight))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # in operations that can be differentiated again
            grad_weight = conv2d_weight(x, weight.shape, grad, padding=1)
            return F.conv_transpose2d(grad, weight, padding=1), grad_weight
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve(grad, transform_weight(weight.transpose(0, 1).flip(2, 3)))
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad)
        return grad_x, grad_weight


def transform_weight(weight: Tensor) -> Tensor:
    """Compute G w Gᵀ of every kernel: (O, C, 3, 3) to (4, 4, O, C)."""
    o, c = weight.shape[:2]
    return (torch.kron(_G, _G) @ weight.reshape(o * c, 9).T).view(4, 4, o, c)


@torch.compiler.disable  # a compiler would unroll the loops, for every size anew
def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution, padded by 1, with a transformed weight. Not differentiable.

    Args:
        x: (N, C, H, W), float32.
        weight: (4, 4, O, C), what :func:`transform_weight` returns.

    Returns:
        (N, O, H, W) in channels_last.
    """
    n, _, height, width = x.shape
    o = weight.shape[2]
    tiles = (-(-height // 2), -(-width // 2))
    out = torch.empty(n, o, 2 * tiles[0], 2 * tiles[1], dtype=x.dtype, memory_format=torch.channels_last)
    sums = x.new_empty(2, 4, _rows_of_a_block(tiles), tiles[1], o)
    for image, y, data in _transformed(x, tiles):
        r = data.shape[2]
        for j in range(4):
            products = [_linear(data[i, j].flatten(0, 1), weight[i, j]).view(r, tiles[1], o) for i in range(4)]
            _transform_output(products, sums[:, j, :r])
        for a in range(2):
            line = out[image, :, 2 * y + a : 2 * (y + r) : 2].permute(1, 2, 0)
            _transform_output(sums[a, :, :r], [line[:, 0::2], line[:, 1::2]])
    if (height, width) == out.shape[2:]:
        return out
    return out[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the weight: :func:`transform_weight` and :func:`convolve`, each step transposed."""
    c, o, (height, width) = x.shape[1], grad.shape[1], grad.shape[2:]
    tiles = (-(-height // 2), -(-width // 2))
    grad = grad.permute(0, 2, 3, 1)
    if height % 2 or width % 2:
        grad = F.pad(grad, (0, 0, 0, width % 2, 0, height % 2))
    rows = _rows_of_a_block(tiles)
    sums, products = x.new_empty(4, 2, rows, tiles[1], o), x.new_empty(4, 4, rows, tiles[1], o)
    transformed = x.new_zeros(4, 4, o, c)
    for image, y, data in _transformed(x, tiles):
        r = data.shape[2]
        for b in range(2):
            line = grad[image, 2 * y : 2 * (y + r), b::2]
            _transform_output_gradient([line[0::2], line[1::2]], sums[:, b, :r])
        for i in range(4):
            _transform_output_gradient(sums[i, :, :r], products[i, :, :r])
            for j in range(4):
                transformed[i, j] += _linear(products[i, j, :r].view(-1, o).T, data[i, j].flatten(0, 1).T)
    return (transformed.view(16, o * c).T @ torch.kron(_G, _G)).view(o, c, 3, 3)


def _transformed(x: Tensor, tiles: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the transformed 4×4 inputs of all 2×2 outputs, in blocks.

    Yields:
        Index of the image, first row of tiles, and (4, 4, rows of tiles, tiles in a row, C), a buffer that is reused.
    """
    n, c, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    right = 2 * tiles[1] - width + 1  # the padding, and what completes the last tile
    rows = _rows_of_a_block(tiles)
    half, data = x.new_empty(4, rows, width + 1 + right, c), x.new_empty(4, 4, rows, tiles[1], c)
    for image in range(n):
        for y in range(0, tiles[0], rows):
            r = min(rows, tiles[0] - y)
            top, bottom = 2 * y - 1, 2 * (y + r) + 1
            block = x[image, max(top, 0) : bottom]
            block = F.pad(block, (0, 0, 1, right, max(-top, 0), max(bottom - height, 0)))
            _transform_input([block[i:][: 2 * r - 1 : 2] for i in range(4)], half[:, :r])
            for i in range(4):
                _transform_input([half[i, :r, j:][:, : 2 * tiles[1] - 1 : 2] for j in range(4)], data[i, :, :r])
            yield image, y, data[:, :, :r]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` by oneDNN where torch has it: MKL, which torch prefers, has no AVX-512 on AMD."""
    if _onednn_works():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], 'none')
    return F.linear(x, weight)


@cache
def _onednn_works() -> bool:
    x, weight = (torch.arange(n, dtype=torch.float32, device='cpu').view(-1, 3) for n in (6, 12))
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], 'none'), x @ weight.T)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _rows_of_a_block(tiles: tuple[int, int]) -> int:
    return min(max(_TILES // tiles[1], 1), tiles[0])


def _transform_input(d: list[Tensor], out: Tensor) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _transform_output(m: Tensor, out: list[Tensor] | Tensor) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _transform_output_gradient(y: list[Tensor] | Tensor, out: Tensor) -> None:
    out[0].copy_(y[0])
    torch.add(y[0], y[1], out=out[1])
    torch.sub(y[0], y[1], out=out[2])
    torch.neg(y[1], out=out[3])
