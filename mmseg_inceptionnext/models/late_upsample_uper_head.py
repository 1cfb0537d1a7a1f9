"""UPerHead computed at low resolution: the same function of the same parameters for half the multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_inceptionnext.models.interpolation import shifted_interpolation, source_band
from mmseg_inceptionnext.models.winograd import WinogradConv2d, conv2d_3x3, custom_functions_work


@MODELS.register_module()
class LateUpsampleUPerHead(UPerHead):
    """mmseg's UPerHead, whose two bottlenecks are a :class:`LateUpsampleConv2d`.

    Arguments, state dict, results and gradients are UPerHead's, up to the rounding of sums in another order. Two thirds
    of the multiply-adds of a UperNet are in ``fpn_bottleneck``, a 3×3 convolution over four maps, three of which are
    up-sampled; the pooled maps of the PSP ``bottleneck`` are treated in the same way. With InceptionNeXt-T at 512×2048,
    933 GMACs become 510. The other 3×3 convolutions are those of :mod:`mmseg_inceptionnext.models.winograd`. If
    ``conv_cfg`` asks for other than plain convolutions, the head is a plain UPerHead.
    """

    def __init__(self, pool_scales: tuple[int, ...] = (1, 2, 3, 6), **kwargs):
        super().__init__(pool_scales, **kwargs)
        bottlenecks, others = self.convolutions(self)
        self.late = all(is_plain_3x3(self.get_submodule(name)) for name in bottlenecks)  # conv_cfg may ask for others
        if self.late:
            swap_convolutions(self, bottlenecks, others, self.align_corners)

    @staticmethod
    def convolutions(head: nn.Module) -> tuple[dict[str, list[int]], list[str]]:
        """Name the 3×3 convolutions: those of concatenated maps, with the channels of the maps; and the others."""
        bottlenecks = {
            'bottleneck.conv': [head.in_channels[-1], *[head.channels] * len(head.psp_modules.pool_scales)],
            'fpn_bottleneck.conv': [head.channels] * len(head.in_channels),
        }
        return bottlenecks, [f'fpn_convs.{i}.conv' for i in range(len(head.fpn_convs))]

    def psp_forward(self, inputs: list[Tensor]) -> Tensor:
        return self._up_sample_and_convolve(
            self.bottleneck, [inputs[-1], *(pool(inputs[-1]) for pool in self.psp_modules)]
        )

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        inputs = in_rows(self._transform_inputs(inputs))
        maps = [lateral_conv(x) for lateral_conv, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        maps.append(self.psp_forward(inputs))
        maps = top_down(maps, self.fpn_convs, self.align_corners)
        return self._up_sample_and_convolve(self.fpn_bottleneck, maps)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        # Up-sampling and the loss or argmax over classes, which follow, are faster with contiguous classes.
        return super().forward(inputs).contiguous()

    def _up_sample_and_convolve(self, bottleneck: nn.Module, maps: list[Tensor]) -> Tensor:
        if not self.late:
            maps = torch.cat([_up_sample(x, maps[0].shape[2:], self.align_corners) for x in maps], dim=1)
        return bottleneck(maps)


def in_rows(maps: list[Tensor]) -> list[Tensor]:
    """Return maps in channels_last: the matrix products of our functions take the channels of a pixel as a row."""
    return [x.contiguous(memory_format=torch.channels_last) for x in maps] if custom_functions_work() else maps


def top_down(maps: list[Tensor], convs: Iterable[nn.Module], align_corners: bool) -> list[Tensor]:
    """Add each map, up-sampled, to the one before it, from the last to the first; convolve the sums, not the last."""
    maps = list(maps)
    for i in range(len(maps) - 1, 0, -1):
        size = maps[i - 1].shape[2:]
        maps[i - 1] = resize(maps[i], size, mode='bilinear', align_corners=align_corners).add_(maps[i - 1])
    return [*(conv(x) for conv, x in zip(convs, maps[:-1], strict=True)), maps[-1]]


def is_plain_3x3(conv: nn.Module) -> bool:
    """Return whether a layer is a 3×3 convolution without stride, dilation and groups, padded by a zero."""
    plain = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode='zeros')
    return type(conv) is nn.Conv2d and all(getattr(conv, name) == value for name, value in plain.items())


def swap_convolutions(
    head: nn.Module, bottlenecks: dict[str, list[int]], others: list[str], align_corners: bool
) -> list[str]:
    """Swap the 3×3 convolutions of a head for ours, in place, and return the names of those that were swapped.

    Args:
        bottlenecks: Names of the plain ones that take concatenated maps, with the channels of the maps.
        others: Names of others, which are swapped if they are plain.
        align_corners: How the maps are up-sampled.
    """
    others = [name for name in others if is_plain_3x3(head.get_submodule(name))]
    for name, map_channels in bottlenecks.items():
        LateUpsampleConv2d.from_conv(head.get_submodule(name), map_channels, align_corners)
    for name in others:
        WinogradConv2d.from_conv(head.get_submodule(name))
    return [*bottlenecks, *others]


class LateUpsampleConv2d(nn.Conv2d):
    """A 3×3 convolution over maps up-sampled (bilinearly) to the first and concatenated, without doing either.

    Why it is the same:

    - Linearity: a convolution of a concatenation is the sum of each map's convolution with its slice W of the weight,
      and this is a sum over the nine taps of 1×1 convolutions, each shifted by its tap, ``Σ_ij S_ij W_ij U x``. U
      up-samples, S_ij shifts.
    - Commutation: W_ij mixes channels in the same way at every position, and U mixes positions in the same way in every
      channel. So ``W_ij U x = U W_ij x``: the products with W_ij, nearly all the work, are taken at low resolution.
    - Separability: ``S_ij U`` is a matrix R_i over rows times a matrix C_j over columns, those of linear interpolation
      with their rows shifted by the tap: ``Σ_j C_j Σ_i R_i W_ij x``.
    - Boundary: the plain convolution pads the up-sampled map with zeros. A shift brings in zeros from outside, a row of
      zeros in R_i or C_j.

    A map as large as the first is convolved as usual.

    Input: a list of (N, C_k, H_k, W_k), channels_last for speed; or a tensor, which is convolved as usual.
    Output: (N, out_channels, H_0, W_0).
    """

    def __init__(self, map_channels: list[int], out_channels: int, align_corners: bool = False, **kwargs):
        super().__init__(sum(map_channels), out_channels, kernel_size=3, padding=1, **kwargs)
        self.map_channels = list(map_channels)
        self.align_corners = align_corners

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, map_channels: list[int], align_corners: bool) -> LateUpsampleConv2d:
        """Turn a plain 3×3 convolution into one, in place: its parameters and hooks stay where they are."""
        conv.__class__, conv.map_channels, conv.align_corners = cls, list(map_channels), align_corners
        return conv

    def _conv_forward(self, maps: list[Tensor] | Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(maps, Tensor):
            return conv2d_3x3(maps, weight, bias)
        size = maps[0].shape[2:]
        if not custom_functions_work():
            x = torch.cat([_up_sample(x, size, self.align_corners) for x in maps], dim=1)
            return F.conv2d(x, weight, bias, padding=1)
        weights = weight.split(self.map_channels, dim=1)
        small = [i for i, x in enumerate(maps) if x.shape[2:].numel() < size.numel()]
        large = [i for i in range(len(maps)) if i not in small]
        out = conv2d_3x3(
            _concatenate([_up_sample(maps[i], size, self.align_corners) for i in large]),
            _concatenate([weights[i] for i in large]),
            bias,
        )
        return add_up_sampled(
            out,
            [[F.conv2d(maps[i], w[..., None, None]) for w in tap_weights(weights[i])] for i in small],
            self.align_corners,
        )


def tap_weights(weight: Tensor) -> list[Tensor]:
    """Return the nine taps of a 3×3 convolution as weights of 1×1 convolutions.

    Args:
        weight: (O, C, 3, 3).

    Returns:
        For each of the three rows of taps, (3·O, C): channels j·O to (j + 1)·O are column j.
    """
    return [row.permute(2, 0, 1).flatten(0, 1) for row in weight.unbind(2)]


def add_up_sampled(out: Tensor, taps: list[list[Tensor]], align_corners: bool) -> Tensor:
    """Return ``out + Σ_j C_j Σ_i R_i taps_ij``, summed over all maps; ``out`` may be overwritten.

    Half-precision operands are summed in float32: otherwise each term would be rounded, where the plain convolution
    rounds once.

    Args:
        out: (N, O, H, W).
        taps: For each map, for each row of taps, (N, 3·O, h, w): the map convolved with :func:`tap_weights`.
        align_corners: Argument of ``torch.nn.functional.interpolate``.
    """
    if not taps:
        return out
    dtype = torch.promote_types(out.dtype, torch.float32)
    rows = [row.to(dtype) for rows in taps for row in rows]
    if not torch.compiler.is_compiling():
        return _AddUpSampled.apply(out.to(dtype), align_corners, *rows).to(out.dtype)
    # Compiling or exporting: no loops over blocks, whose number depends on the size. autocast would round the products.
    with torch.autocast(out.device.type, enabled=False):
        return _sum_up_sampled(out.to(dtype), rows, align_corners).to(out.dtype)


def _sum_up_sampled(out: Tensor, rows: list[Tensor], align_corners: bool) -> Tensor:
    """Compute :func:`add_up_sampled` by its formula, without blocks."""
    for level in range(0, len(rows), 3):
        r, c = _shifted_interpolations(rows[level], out, align_corners)
        taps = torch.stack(rows[level : level + 3], dim=1).unflatten(2, (3, out.shape[1]))
        taps = torch.einsum('iyh,nijohw->njoyw', r, taps)
        out = out + torch.einsum('jxw,njoyw->noyx', c, taps)
    return out


class _AddUpSampled(torch.autograd.Function):
    """Compute :func:`add_up_sampled` in place and in blocks.

    R_i and C_j are band matrices: a few rows of the result need a few rows of the map. A block of rows is interpolated
    by three matrix products, (rows, band of rows) × (band of rows, w·3·O), and stays in the cache for the columns,
    batched products (columns, band of columns·3) × (band of columns·3, O) into ``out``. All operands are used in their
    channels_last layout, nothing is permuted or copied, and only one block of the intermediate result exists. The
    derivative uses the same products with the matrices transposed.
    """

    @staticmethod
    def forward(ctx, out: Tensor, align_corners: bool, *rows: Tensor) -> Tensor:
        if out.is_contiguous(memory_format=torch.channels_last):
            ctx.mark_dirty(out)
        out = out.contiguous(memory_format=torch.channels_last)
        ctx.align_corners, ctx.shapes = align_corners, [row.shape for row in rows]
        for level in range(0, len(rows), 3):
            for r, c, between, taps, block in _blocks(out, rows[level : level + 3], align_corners):
                for i in range(3):
                    between.flatten(1).addmm_(r[i], taps[i], beta=min(i, 1))
                for x, band, c_x in c:
                    block[:, x].baddbmm_(c_x.expand(len(block), -1, -1), between[:, band])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # in operations that can be differentiated again
            grads = []
            for shape in ctx.shapes[::3]:
                r, c = _shifted_interpolations(grad.new_empty(shape[-2:]), grad, ctx.align_corners)
                taps = torch.einsum('jxw,noyx->njoyw', c, grad)
                grads += torch.einsum('iyh,njoyw->nijohw', r, taps).flatten(2, 3).unbind(1)
            return grad, None, *grads
        grad = grad.contiguous(memory_format=torch.channels_last)
        like_grad = dict(dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        grads = [torch.empty(shape, **like_grad).zero_() for shape in ctx.shapes]
        for level in range(0, len(grads), 3):
            for r, c, between, taps, block in _blocks(grad, grads[level : level + 3], ctx.align_corners):
                between.zero_()
                for x, band, c_x in c:
                    between[:, band].baddbmm_(c_x.T.expand(len(block), -1, -1), block[:, x])
                for i in range(3):
                    taps[i].addmm_(r[i].T, between.flatten(1))
        return grad, None, *grads


# Rows and columns of a block. On a CPU 8 rows of 64 columns of 512 float32 channels, 3 taps each, are 3 MB, which the
# cache holds; a GPU wants few large products.
_CPU_BLOCK, _BLOCK = (8, 32), (64, 128)


def _blocks(out: Tensor, rows: list[Tensor], align_corners: bool) -> Iterator[tuple]:
    """Yield blocks of a few rows of ``out``, for every image.

    Yields:
        The three R_i (rows of the block, h'); a list of (columns, their band of the buffer's second axis,
        C (columns, 3·w')); an uninitialised buffer (rows of the block, 3·w, O) for the map with rows interpolated; the
        three maps (h', w·3·O); and the block of ``out`` (rows of the block, W, O). h' and w' are the parts of h
        and w that the block and the columns depend on. The last two are views.
    """
    o, height, width = out.shape[1:]
    h, w = rows[0].shape[2:]
    block_rows, block_columns = _CPU_BLOCK if out.device.type == 'cpu' else _BLOCK
    r, c = _shifted_interpolations(rows[0], out, align_corners)
    c = c.permute(1, 2, 0).flatten(1)
    columns = [
        (slice(x, x + block_columns), slice(3 * low, 3 * high), c[x : x + block_columns, 3 * low : 3 * high])
        for x in range(0, width, block_columns)
        for low, high in [source_band(x, x + block_columns, w, width, align_corners)]
    ]
    between = out.new_empty(min(block_rows, height), 3 * w, o)
    for n in range(len(out)):
        for y in range(0, height, block_rows):
            low, high = source_band(y, y + block_rows, h, height, align_corners)
            taps = [row[n].permute(1, 2, 0)[low:high].flatten(1) for row in rows]
            block = out[n, :, y : y + block_rows].permute(1, 2, 0)
            yield r[:, y : y + block_rows, low:high], columns, between[: len(block)], taps, block


def _shifted_interpolations(small: Tensor, large: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return R (3, H, h) and C (3, W, w) for a (…, h, w) map that is up-sampled to (…, H, W)."""
    r, c = (
        shifted_interpolation(small.shape[axis], large.shape[axis], align_corners, small.device) for axis in (-2, -1)
    )
    return r.to(small.dtype), c.to(small.dtype)


def _up_sample(x: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """Up-sample a map, without the copy that ``interpolate`` makes of one that has the size."""
    return x if x.shape[2:] == size else resize(x, size=size, mode='bilinear', align_corners=align_corners)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the channels, without the copy that ``cat`` makes of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
