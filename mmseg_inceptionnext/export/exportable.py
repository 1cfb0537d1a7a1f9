"""A trained segmentor as one function of pixels, in operations that export for any size and run fast afterwards.

Read from top to bottom: the segmentor, its labels, UPerHead, its parts, and pooling and up-sampling as matrix products.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import FPNHead, UPerHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import Upsample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.label_map_segmentor import predicts_from_logits
from mmseg_inceptionnext.inference.optimize import fold_norms
from mmseg_inceptionnext.models.build import heads_of
from mmseg_inceptionnext.models.interpolation import shifted_interpolation, source_band
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d
from mmseg_inceptionnext.models.winograd import WinogradConv2d


class ExportableSegmentor(nn.Module):
    """From pixels to logits or labels of the same size: normalisation, network, up-sampling, argmax or threshold.

    With a temperature, it also returns the probability of each label, by which logits are divided for it.

    Norms are folded. UPerHead is computed at low resolution (:class:`ExportableUPerHead`). With it and with FPNHead all
    sizes are read from the input at run time, so that an export may leave them open (:attr:`any_size`). Other heads,
    and cascades of them, are taken as they are.

    Args:
        model: A trained EncoderDecoder; it stays as it is.
        labels: Return labels instead of all logits: the index of the largest, or for a single output channel whether
            its probability is above the head's threshold.
        runtime: 'onnxruntime' or 'openvino', whose fastest form the operations take; None for any.
        precision: What it computes in: 'fp32', or less.
        temperature: Return confidence as well; what logits are divided by. None for none.
        fixed_size: The export fixes the size. Then the widest 3×3 convolutions of a UPerHead are computed by Winograd's
            algorithm, if in float32, and labels in blocks of rows.

    Input: (N, 3, H, W), RGB from 0 to 255, of any dtype. Output: logits (N, classes, H, W), float32, or labels
    (N, H, W), of :attr:`label_dtype`; with a temperature also confidence (N, H, W), float32.

    Attributes:
        any_size (bool): Whether an export may leave the sizes open.
        label_dtype (torch.dtype): uint8, or int64 for more than 256 classes.

    Raises:
        UserError: What the segmentor predicts does not follow from its logits for whole images.
    """

    def __init__(self, model: EncoderDecoder, labels: bool, runtime: str | None = None, precision: str = 'fp32',
                 fixed_size: bool = False, temperature: float | None = None):  # fmt: skip
        super().__init__()
        _check(model)
        is_uper_head = _is_exportable_uper_head(heads_of(model)[0])
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_norms(model)
        self.temperature = temperature
        preprocessor, self.labels, self.runtime, self.fixed_size = model.data_preprocessor, labels, runtime, fixed_size
        self.is_bgr = _takes_bgr(preprocessor)
        self.register_buffer('mean', preprocessor.mean if preprocessor._enable_normalize else torch.zeros(1, 1, 1))
        self.register_buffer('std', preprocessor.std if preprocessor._enable_normalize else torch.ones(1, 1, 1))
        self.backbone, self.neck = model.backbone, model.neck if model.with_neck else nn.Identity()
        self.align_corners, self.threshold = model.align_corners, threshold_of(model)
        self.label_dtype = torch.uint8 if model.num_classes <= 256 else torch.int64
        first, *others = heads_of(model)
        self.any_size = not others and (is_uper_head or isinstance(first, FPNHead))
        if is_uper_head:
            wide_conv = WinogradConv3x3 if fixed_size and precision == 'fp32' else Conv3x3
            first = ExportableUPerHead(first, wide_conv, runtime == 'openvino' and precision != 'fp32')
        self.heads = nn.ModuleList([first, *others])
        for module in list(self.heads.modules()):
            for name, child in module.named_children():
                if isinstance(child, Upsample):
                    setattr(module, name, UpsampleByTwo(self.align_corners))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = (image.flip(1) if self.is_bgr else image).float()
        x = ((x - self.mean.float()) / self.std.float()).to(next(self.backbone.parameters()).dtype)
        features = self.neck(self.backbone(x))
        first, *others = self.heads
        logits = first(features)
        for head in others:
            logits = head(features, logits)
        logits, size = logits.float(), image.shape[2:]
        if self.labels and self.threshold is None and self.fixed_size and self.runtime:
            labels, confidence = labels_in_blocks(
                logits, size, self.align_corners, self.runtime == 'onnxruntime', self.temperature
            )
            labels = labels.to(self.label_dtype)
            return labels if confidence is None else (labels, confidence)
        logits = F.interpolate(logits, size, mode='bilinear', align_corners=self.align_corners)
        if self.temperature is None and not self.labels:
            return logits
        labels = logits.argmax(1) if self.threshold is None else (logits.sigmoid() > self.threshold)[:, 0]
        found = labels.to(self.label_dtype) if self.labels else logits
        if self.temperature is None:
            return found
        if self.threshold is None:
            return found, largest_probability(logits, 1, self.temperature)
        sign = 2 * labels.to(logits.dtype) - 1
        return found, (sign * logits[:, 0] / self.temperature).sigmoid()


def largest_probability(logits: Tensor, dim: int, temperature: float) -> Tensor:
    """Return the largest probability of the classes along a dimension, which disappears."""
    return 1 / ((logits - logits.amax(dim, keepdim=True)) / temperature).exp().sum(dim)


_LABEL_ROWS = 32  # rows of a block of labels: its logits stay in the cache


def labels_in_blocks(logits: Tensor, size: tuple[int, int], align_corners: bool, channels_last: bool,
                     temperature: float | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Up-sample logits bilinearly by matrix products, and take the argmax, a block of rows after the other.

    A row of the result depends on two rows of the logits, so that a block of 32 rows needs a band of the matrix over
    rows, and its logits of all classes are used while they are in the cache.

    Args:
        logits: (N, classes, h, w).
        size: H and W.
        align_corners: Argument of ``torch.nn.functional.interpolate``.
        channels_last: Take the argmax over the innermost dimension: faster in ONNX Runtime, slower in OpenVINO.
        temperature: What logits are divided by for probabilities.

    Returns:
        (N, H, W), int64, and with a temperature the probabilities of these labels, (N, H, W) float32.
    """
    rows, columns = (
        interpolation_matrices(old, new, align_corners, logits)[1]
        for old, new in zip(logits.shape[2:], size, strict=True)
    )
    # (N, h, W·classes) or (N, classes, h, W)
    x = (columns @ logits.permute(0, 2, 3, 1)).flatten(2) if channels_last else logits @ columns.T
    blocks, confidence = [], []
    for start in range(0, size[0], _LABEL_ROWS):
        low, high = source_band(start, start + _LABEL_ROWS, logits.shape[2], size[0], align_corners)
        band = rows[start : start + _LABEL_ROWS, low:high]
        if channels_last:
            block, classes = (band @ x[:, low:high]).unflatten(2, (size[1], -1)), 3
        else:
            block, classes = band @ x[:, :, low:high], 1
        blocks.append(block.argmax(classes))
        if temperature is not None:
            confidence.append(largest_probability(block, classes, temperature))
    return torch.cat(blocks, dim=1), torch.cat(confidence, dim=1) if confidence else None


def threshold_of(model: EncoderDecoder) -> float | None:
    """Return the probability above which a segmentor with a single output channel predicts class 1; None for others."""
    return heads_of(model)[-1].threshold if model.out_channels == 1 else None


def _check(model: EncoderDecoder) -> None:
    if not isinstance(model, EncoderDecoder) or not predicts_from_logits(model):
        kinds = [type(head).__name__ for head in heads_of(model)] if hasattr(model, 'decode_head') else []
        raise UserError(
            f'{" and ".join(kinds) or type(model).__name__} of this config cannot be exported: heads can that predict '
            'from up-sampled logits, on whole images (test_cfg.mode)'
        )
    if model.data_preprocessor.test_cfg:
        raise UserError('a data_preprocessor.test_cfg pads images, which an exported file does not: leave it out')


def _is_exportable_uper_head(head: nn.Module) -> bool:
    """Return whether a head is a UPerHead of plain convolutions, BatchNorm and ReLU."""
    return isinstance(head, UPerHead) and all(map(_is_plain, (m for m in head.modules() if isinstance(m, ConvModule))))


def _is_plain(module: ConvModule) -> bool:
    """Return whether a module is a 1×1 or a 3×3 convolution and a ReLU once its norm is folded."""
    conv = module.conv
    return (
        type(conv) in (nn.Conv2d, WinogradConv2d, LateUpsampleConv2d)
        and (conv.kernel_size, conv.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, 'zeros')
        and not (module.with_explicit_padding or module.with_spectral_norm)
        and module.order == ('conv', 'norm', 'act')
        and (not module.with_norm or isinstance(module.norm, _BatchNorm) and module.norm.running_mean is not None)
        and module.with_activation
        and type(module.activate) is nn.ReLU
    )


def _takes_bgr(preprocessor: nn.Module) -> bool:
    """Return whether a preprocessor keeps the channels in the BGR order of mmseg's pipelines.

    It is tried on a black and a blue pixel: the attribute has a different name in each distribution of mmseg.
    """
    if preprocessor._enable_normalize and len(preprocessor.mean) != 3:
        return False
    pixels = torch.tensor([[0, 255], [0, 0], [0, 0]])[:, None]  # (3, 1, 2)
    black, blue = preprocessor(dict(inputs=[pixels]))['inputs'][0, 0, 0]
    return (black != blue).item()


class UpsampleByTwo(nn.Module):
    """mmseg's Upsample by two, without reading sizes as Python numbers. (N, C, H, W) to (N, C, 2H, 2W)."""

    def __init__(self, align_corners: bool):
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [2 * side for side in x.shape[2:]]
        return F.interpolate(x, size, mode='bilinear', align_corners=self.align_corners)


class ExportableUPerHead(nn.Module):
    """UPerHead with folded norms, for inference; the products of its two bottlenecks are taken at low resolution.

    :class:`~mmseg_inceptionnext.models.late_upsample_uper_head.LateUpsampleConv2d` proves that this is the same.

    Args:
        head: A UPerHead of plain convolutions, with its norms folded.
        wide_conv: Class of the 3×3 convolutions over the two largest maps.
        operands_vary: See :class:`Bottleneck`.

    Input: feature maps (N, C_i, H_i, W_i) of a backbone. Output: logits (N, classes, H_0, W_0).
    """

    def __init__(self, head: UPerHead, wide_conv: type[nn.Module], operands_vary: bool):
        super().__init__()
        self.in_index, self.align_corners = head.in_index, head.align_corners
        self.pool_scales = [module[0].output_size for module in head.psp_modules]
        self.pooled_convs = nn.ModuleList(module[1].conv for module in head.psp_modules)
        self.lateral_convs = nn.ModuleList(module.conv for module in head.lateral_convs)
        convs = [wide_conv if i < 2 else Conv3x3 for i in range(len(head.fpn_convs))]
        self.fpn_convs = nn.ModuleList(
            conv(module.conv.weight, module.conv.bias) for conv, module in zip(convs, head.fpn_convs, strict=True)
        )
        self.bottleneck = Bottleneck(head.bottleneck.conv, head.in_channels[-1], head.align_corners, Conv3x3,
                                     operands_vary)  # fmt: skip
        self.fpn_bottleneck = Bottleneck(head.fpn_bottleneck.conv, head.channels, head.align_corners, wide_conv,
                                         operands_vary)  # fmt: skip
        self.conv_seg = head.conv_seg

    def forward(self, features: list[Tensor]) -> Tensor:
        *features, last = [features[i] for i in self.in_index]
        maps = [_pointwise(conv, x).relu() for conv, x in zip(self.lateral_convs, features, strict=True)]
        pooled = [
            _pointwise(conv, average_pool(last, scale)).relu()
            for conv, scale in zip(self.pooled_convs, self.pool_scales, strict=True)
        ]
        maps.append(self.bottleneck([last, *pooled]).relu())
        for i in range(len(maps) - 1, 0, -1):
            size = maps[i - 1].shape[2:]
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size, mode='bilinear', align_corners=self.align_corners)
        maps[:-1] = [conv(x).relu() for conv, x in zip(self.fpn_convs, maps[:-1], strict=True)]
        return _pointwise(self.conv_seg, self.fpn_bottleneck(maps).relu())


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias)


class Conv3x3(nn.Module):
    """A 3×3 convolution, padded by 1. (N, C, H, W) to (N, O, H, W)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.contiguous()), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


# Winograd's F(4×4, 3×3) with the points 0, 1, -1, 1/2, -2 and ∞, which round least of those tried (docs/speed.md).
_INPUT = torch.tensor(
    [
        [1, -1.5, -2, 1.5, 1, 0],
        [0, -1, 0.5, 2.5, 1, 0],
        [0, 1, -2.5, 0.5, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 0.5, -1, -0.5, 1, 0],
        [0, 1, -1.5, -2, 1.5, 1],
    ],
    dtype=torch.double,
)
_KERNEL = (
    torch.tensor(
        [[15, 0, 0], [5, 5, 5], [-5, 5, -5], [-16, -8, -4], [1, -2, 4], [0, 0, 15]],
        dtype=torch.double,
    )
    / 15
)
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 0.5, -2, 0], [0, 1, 1, 0.25, 4, 0], [0, 1, -1, 0.125, -8, 1]],
    dtype=torch.double,
)
# Rows and columns of a block. Larger matrices are mostly zeros, and smaller products do not reach the machine's rate.
_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


class WinogradConv3x3(nn.Module):
    """:class:`Conv3x3` in a quarter of the multiplications, in matrix products alone.

    ``Aᵀ [(G w Gᵀ) ∘ (Bᵀ d B)] A`` for every 4×4 outputs and the 6×6 inputs d around them, summed over channels, as in
    :mod:`mmseg_inceptionnext.models.winograd`. Bᵀ for all tiles of a block is one matrix (6 · tiles, rows), A one of
    (rows, 6 · tiles), and both include the padding; between them are 36 products over channels, whose rows are the
    tiles of the block.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = torch.einsum('ik,ockl,jl->ijco', _KERNEL, weight.double(), _KERNEL).flatten(0, 1).float()
        self.weight, self.bias = nn.Parameter(weight.contiguous()), bias

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        out = torch.cat([self._rows(x, y, width) for y in range(0, height, _BLOCK_ROWS)], dim=1)
        return (out if self.bias is None else out + self.bias).permute(0, 3, 1, 2)

    def _rows(self, x: Tensor, start: int, width: int) -> Tensor:
        top, bottom, rows_in, rows_out = _tiles(start, _BLOCK_ROWS, x.shape[1], x)
        x = (rows_in @ x[:, top:bottom].flatten(2)).unflatten(2, (width, -1))  # (N, 6·tiles, W, C)
        x = torch.cat([self._columns(x, start) for start in range(0, width, _BLOCK_COLUMNS)], dim=2)
        return (rows_out @ x.flatten(2)).unflatten(2, (width, -1))

    def _columns(self, x: Tensor, start: int) -> Tensor:
        left, right, columns_in, columns_out = _tiles(start, _BLOCK_COLUMNS, x.shape[2], x)
        x = (columns_in @ x[:, :, left:right]).unflatten(2, (6, -1)).unflatten(1, (6, -1))
        x = x.transpose(2, 3)  # (N, 6, 6, tiles, tiles, C)
        tiles = x.shape[3:5]
        # (36, C, O), not (6, 6, C, O): where there are 6 rows of tiles, onnxscript's optimizer would leave out the
        # reshapes and let the products broadcast along the wrong axes.
        x = x.flatten(3, 4).flatten(1, 2) @ self.weight
        x = x.unflatten(2, tiles).unflatten(1, (6, 6)).transpose(2, 3)
        return columns_out @ x.flatten(3, 4).flatten(1, 2)


def _tiles(start: int, block: int, size: int, like: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Return where the inputs of a block along an axis begin and end, and the matrices for all its tiles."""
    outputs = min(block, size - start)
    tiles = -(-outputs // 4)
    first, last = max(start - 1, 0), min(start + outputs + 1, size)
    # [t, p]: which of the six inputs of tile t input p is
    index = torch.arange(first, last) - (start - 1) - 4 * torch.arange(tiles)[:, None]
    inputs = torch.where((index >= 0) & (index < 6), _INPUT[:, index.clamp(0, 5)], 0.0).flatten(0, 1)
    output = torch.einsum('ai,ts->tais', _OUTPUT, torch.eye(tiles, dtype=torch.double)).flatten(2).flatten(0, 1)
    inputs, output = (matrix.to(like.device, like.dtype) for matrix in (inputs, output[:outputs]))
    return first, last, inputs, output


class Bottleneck(nn.Module):
    """A 3×3 convolution over maps up-sampled to the size of the first, without doing so: ``Σ_j C_j Σ_i R_i W_ij x``.

    Each of the sums over taps is part of a matrix product: the three R_i stand side by side in one matrix, whose
    product is with the maps ``W_i x`` below each other, and so do the C_j of all maps. Taps are (N, h, w, channels), in
    which no product needs another layout.

    Args:
        conv: Convolution over the concatenated maps.
        channels: Channels of the first map.
        align_corners: Whether up-sampling aligns corners.
        first_conv: Class of the convolution of the first map.
        operands_vary: Let R and C depend on a map, by zero times one of its values: OpenVINO computes a product with a
            constant on the left in float32, however low the precision of the others, and converts all operands.

    Input: a list of (N, C_k, H_k, W_k). Output: (N, O, H_0, W_0).
    """

    def __init__(self, conv: nn.Conv2d, channels: int, align_corners: bool, first_conv: type[nn.Module],
                 operands_vary: bool):  # fmt: skip
        super().__init__()
        others = (conv.in_channels - channels) // conv.out_channels
        first, *others = conv.weight.split([channels, *[conv.out_channels] * others], dim=1)
        self.conv = first_conv(first, conv.bias)
        # (O, C, i, j) to (C, j·O) for each row i of taps
        self.taps = nn.ModuleList(
            nn.ParameterList(row.permute(1, 2, 0).flatten(1).contiguous() for row in weight.unbind(2))
            for weight in others
        )
        self.align_corners, self.operands_vary = align_corners, operands_vary

    def forward(self, maps: list[Tensor]) -> Tensor:
        out = self.conv(maps[0])
        o, height, width = out.shape[1:]
        rows, columns = [], []
        for x, weights in zip(maps[1:], self.taps, strict=True):
            h, w = x.shape[2:]
            r = interpolation_matrices(h, height, self.align_corners, x).transpose(0, 1).flatten(1)  # (H, i·h)
            c = interpolation_matrices(w, width, self.align_corners, x).permute(1, 2, 0).flatten(1)  # (W, w·j)
            x = x.permute(0, 2, 3, 1)
            if self.operands_vary:
                zero = 0 * x[0, 0, 0, 0]
                r, c = r + zero, c + zero
            taps = torch.cat([x @ weight for weight in weights], dim=1)  # (N, i·h, w, j·O)
            rows.append((r @ taps.flatten(2)).unflatten(2, (3 * w, o)))
            columns.append(c)
        return out + (torch.cat(columns, dim=1) @ torch.cat(rows, dim=2)).permute(0, 3, 1, 2)


def interpolation_matrices(size: int, new_size: int, align_corners: bool, like: Tensor) -> Tensor:
    """Return :func:`shifted_interpolation` with the device and dtype of a map: (3, new_size, size)."""
    return shifted_interpolation(size, new_size, align_corners).to(like.device, like.dtype)


def average_pool(x: Tensor, scale: int) -> Tensor:
    """Pool (N, C, H, W) to (N, C, scale, scale) as ``torch.nn.functional.adaptive_avg_pool2d`` does, for any size.

    Bin i of k covers the rows from ⌊i·H/k⌋ to ⌈(i+1)·H/k⌉ - 1, and the same columns. It is a rectangle, so that its
    mean is the mean over rows of the means over columns: a matrix along each axis, with 1 / (length of the bin) inside
    the bin. Bins are computed in integers: no rounding moves them, whatever the size.
    """
    rows, columns = (_pooling_matrix(size, scale).to(x.device, x.dtype) for size in x.shape[2:])
    return rows @ (x @ columns.T)


def _pooling_matrix(size: int, scale: int) -> Tensor:
    """Return the matrix of average pooling along an axis: (scale, size), float64."""
    bins, positions = torch.arange(scale)[:, None], torch.arange(size)
    start, stop = bins * size // scale, ((bins + 1) * size + scale - 1) // scale
    inside = (positions >= start) & (positions < stop)
    return inside.double() / (stop - start)
