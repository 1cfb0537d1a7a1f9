"""UPerHead computed at low resolution: the same function of the same parameters for half the multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_inceptionnext.device import multiplies_bfloat16
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
        logits = super().forward(inputs)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()

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

    @staticmethod
    def add_up_sampled(out: Tensor, taps: list[Taps], align_corners: bool) -> Tensor:
        """See the function; :func:`~mmseg_inceptionnext.models.kernels.use_kernels` puts a kernel here."""
        return add_up_sampled(out, taps, align_corners)

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
        taps = []
        for i in small:
            weight_of_taps = tap_weights(weights[i])[..., None, None]
            taps += take_taps(maps[i], partial(F.conv2d, weight=weight_of_taps), self.out_channels)
        return self.add_up_sampled(out, taps, self.align_corners)


class Taps(NamedTuple):
    """The products of some columns of a map (N, C, h, w) with each tap of a 3×3 convolution.

    Attributes:
        products: (N, 9·O, w', h): the axes of the map are swapped. Channels (3·i + j)·O to (3·i + j + 1)·O are those
            with the tap in row i and column j.
        start: The first of the w' columns.
        width: w.
    """

    products: Tensor
    start: int
    width: int


def take_taps(x: Tensor, product: Callable[[Tensor], Tensor], channels: int) -> list[Taps]:
    """Multiply a map with each tap of a 3×3 convolution.

    On a CPU in several parts: memory of 32 MiB and more comes from the system anew each time, which takes half as long
    as the product.

    Args:
        x: (N, C, h, w).
        product: The 1×1 convolution with :func:`tap_weights`, from (N, C, w', h) to (N, 9·O, w', h).
        channels: O.
    """
    x = x.transpose(2, 3).contiguous(memory_format=torch.channels_last)
    width, step = x.shape[2], x.shape[2]
    if x.device.type == 'cpu' and not torch.compiler.is_compiling():
        step = max(_BYTES_OF_TAPS // (len(x) * 9 * channels * x.shape[3] * x.element_size()), 1)
    return [Taps(product(x[:, :, start : start + step]), start, width) for start in range(0, width, step)]


def tap_weights(weight: Tensor) -> Tensor:
    """Return the nine taps of a 3×3 convolution (O, C, 3, 3) as the weight of a 1×1 convolution (9·O, C).

    The order of the channels is that of :class:`Taps`.
    """
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def add_up_sampled(out: Tensor, taps: list[Taps], align_corners: bool) -> Tensor:
    """Return ``out + Σ_j C_j Σ_i R_i taps_ij``, summed over all maps; ``out`` may be overwritten.

    Half-precision operands are summed in float32: otherwise each term would be rounded, where the plain convolution
    rounds once. Processors that multiply bfloat16 do this by themselves, inside of a product.

    Args:
        out: (N, O, H, W).
        taps: What :func:`take_taps` returned for each map.
        align_corners: Argument of ``torch.nn.functional.interpolate``.
    """
    if not taps:
        return out
    dtype = torch.promote_types(out.dtype, torch.float32)
    if torch.compiler.is_compiling():
        # No loops over blocks, whose number depends on the size. autocast would round the products.
        with torch.autocast(out.device.type, enabled=False):
            taps = [part._replace(products=part.products.to(dtype)) for part in taps]
            return _sum_up_sampled(out.to(dtype), taps, align_corners).to(out.dtype)
    if out.dtype == torch.bfloat16 and out.device.type == 'cpu' and multiplies_bfloat16('cpu'):
        dtype = torch.bfloat16
    places = [(part.start, part.width) for part in taps]
    products = [part.products.to(dtype) for part in taps]
    return _AddUpSampled.apply(out.to(dtype), align_corners, places, *products).to(out.dtype)


def _sum_up_sampled(out: Tensor, taps: list[Taps], align_corners: bool) -> Tensor:
    """Compute :func:`add_up_sampled` by its formula, without blocks."""
    for part in taps:
        r, c = _shifted_interpolations(part.products.shape, part.start, part.width, out, align_corners)
        rows = torch.einsum('iyh,nijowh->njoyw', r, part.products.unflatten(1, (3, 3, out.shape[1])))
        out = out + torch.einsum('jxw,njoyw->noyx', c, rows)
    return out


class _AddUpSampled(torch.autograd.Function):
    """Compute :func:`add_up_sampled` in place and in blocks.

    R_i and C_j are band matrices: a few rows of the result need a few rows of a map, and so do columns. For each block
    of the result, each map is first interpolated to the block's rows: ``Σ_i R_i`` is one product, batched over the
    columns, of (rows, band of rows·3) and (band of rows·3, 3·O); a map's axes are swapped because its row and the tap's
    i then follow one another in memory, as they do in this sum. The columns are one more, batched over the rows, for
    all maps at once: (columns, all bands of columns·3) × (all bands of columns·3, O), added to the block. The result of
    the first stays in the cache for the second, and nothing else is copied.

    So all sums are inside of two products, which accumulate in float32 also where their operands are bfloat16: a term
    is rounded once in between, and the sum once. The derivative uses the same products with the matrices transposed.
    """

    @staticmethod
    def forward(ctx, out: Tensor, align_corners: bool, places: list[tuple[int, int]], *products: Tensor) -> Tensor:
        if out.is_contiguous(memory_format=torch.channels_last):
            ctx.mark_dirty(out)
        out = out.contiguous(memory_format=torch.channels_last)
        ctx.align_corners, ctx.places, ctx.shapes = align_corners, places, [x.shape for x in products]
        products = [x.contiguous(memory_format=torch.channels_last) for x in products]
        for block, c, between, levels in _blocks(out, products, places, align_corners):
            for r, rows, taps in levels:
                rows.baddbmm_(r.expand(len(taps), -1, -1), taps, beta=0)  # in place: not counted as multiply-adds
            block.baddbmm_(c.expand(len(block), -1, -1), between)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # in operations that can be differentiated again
            grads = []
            for shape, place in zip(ctx.shapes, ctx.places, strict=True):
                r, c = _shifted_interpolations(shape, *place, grad, ctx.align_corners)
                rows = torch.einsum('jxw,noyx->njoyw', c, grad)
                grads.append(torch.einsum('iyh,njoyw->nijowh', r, rows).flatten(1, 3))
            return grad, None, None, *grads
        grad = grad.contiguous(memory_format=torch.channels_last)
        like_grad = dict(dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        grads = [torch.empty(shape, **like_grad).zero_() for shape in ctx.shapes]
        for block, c, between, levels in _blocks(grad, grads, ctx.places, ctx.align_corners):
            torch.bmm(c.T.expand(len(block), -1, -1), block, out=between)
            for r, rows, taps in levels:
                taps.baddbmm_(r.T.expand(len(taps), -1, -1), rows)
        return grad, None, None, *grads


_BYTES_OF_TAPS = 24 * 2**20
# Rows and columns of a block. On a CPU the intermediate result of 16 rows of 32 columns, of three maps of 512 float32
# channels, is 6 MB, which the cache holds; a GPU wants few large products.
_CPU_BLOCK, _CPU_BFLOAT16_BLOCK, _BLOCK = (16, 32), (32, 32), (64, 128)


def _blocks(out: Tensor, products: Sequence[Tensor], places: list[tuple[int, int]],
            align_corners: bool) -> Iterator[tuple]:  # fmt: skip
    """Yield the blocks of ``out``, for every image.

    Yields:
        The block (rows, columns, O), a view of ``out``; C (columns, K), K being three times the number of all columns
        of maps that the block depends on; an uninitialised buffer (rows, K, O) for the maps with rows interpolated; and
        for each of ``products`` R (rows, 3·h'), its part of the buffer (w', rows, 3·O), and the taps
        (w', 3·h', 3·O) that the block depends on, both views.
    """
    o, height, width = out.shape[1:]
    block_rows, block_columns = _BLOCK
    if out.device.type == 'cpu':
        block_rows, block_columns = _CPU_BFLOAT16_BLOCK if out.dtype == torch.bfloat16 else _CPU_BLOCK
    maps = []
    for x, place in zip(products, places, strict=True):
        r, c = _shifted_interpolations(x.shape, *place, out, align_corners)
        maps.append((x.permute(0, 2, 3, 1).unflatten(3, (3, -1)), r.permute(1, 2, 0), c.permute(1, 2, 0), *place))
    for left in range(0, width, block_columns):
        columns, needed = slice(left, left + block_columns), []
        for taps, r, c, start, full_width in maps:
            low, high = source_band(left, columns.stop, full_width, width, align_corners)
            band = slice(max(low - start, 0), min(high - start, taps.shape[1]))
            if band.start < band.stop:
                needed.append((taps[:, band], r, c[columns, band].flatten(1)))
        all_c = torch.cat([c for _, _, c in needed], dim=1)
        buffer = out.new_empty(min(block_rows, height), all_c.shape[1], o)
        for top in range(0, height, block_rows):
            rows = slice(top, top + block_rows)
            between = buffer[: height - top]
            parts = between.unflatten(1, (-1, 3)).flatten(2).transpose(0, 1).split([x.shape[1] for x, _, _ in needed])
            bands = [slice(*source_band(top, rows.stop, taps.shape[2], height, align_corners)) for taps, _, _ in needed]
            for n in range(len(out)):
                levels = [
                    (r[rows, band].flatten(1), part, taps[n, :, band].flatten(1, 2))
                    for (taps, r, _), part, band in zip(needed, parts, bands, strict=True)
                ]
                yield out[n, :, rows, columns].permute(1, 2, 0), all_c, between, levels


def _shifted_interpolations(shape: torch.Size, start: int, width: int, large: Tensor,
                            align_corners: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return R (3, H, h) and C (3, W, w') for ``shape`` (N, 9·O, w', h), columns from ``start`` on of ``width``."""
    r, c = (
        shifted_interpolation(size, new_size, align_corners, large.device).to(large.dtype)
        for size, new_size in zip((shape[3], width), large.shape[2:], strict=True)
    )
    return r, c[..., start : start + shape[2]]


def _up_sample(x: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """Up-sample a map, without the copy that ``interpolate`` makes of one that has the size."""
    return x if x.shape[2:] == size else resize(x, size=size, mode='bilinear', align_corners=align_corners)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the channels, without the copy that ``cat`` makes of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
