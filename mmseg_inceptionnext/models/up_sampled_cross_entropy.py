"""Loss and accuracy of up-sampled logits, without the up-sampled logits: the same values and gradients in less time."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmseg_inceptionnext.models.interpolation import shifted_interpolation, source_band
from mmseg_inceptionnext.models.winograd import custom_functions_work

_BLOCK_BYTES = 8 * 2**20  # of up-sampled logits, which stay in the cache
_EPS = torch.finfo(torch.float32).eps  # which mmseg adds to what it divides by


def use_up_sampled_cross_entropy(model: nn.Module) -> nn.Module:
    """Let the heads of a segmentor compute their loss by :func:`up_sampled_cross_entropy`, in place, on a CPU.

    Heads whose loss is another than mmseg's cross entropy over classes, a mean of all pixels, stay as they are. So does
    every head on a GPU, where this has not been measured, and in a compiler.
    """
    for head in model.modules():
        if isinstance(head, BaseDecodeHead) and _has_plain_loss(head):
            head.loss_by_feat = MethodType(_loss_by_feat, head)
    return model


def _has_plain_loss(head: BaseDecodeHead) -> bool:
    loss = head.loss_decode
    return (
        type(head).loss_by_feat is BaseDecodeHead.loss_by_feat
        and head.sampler is None
        and type(loss) is CrossEntropyLoss
        and loss.reduction == 'mean'
        and not (loss.use_sigmoid or loss.use_mask)
        and (loss.class_weight is None or not loss.avg_non_ignore)  # together, mmseg's loss fails
    )


def _loss_by_feat(
    self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: list[SegDataSample]
) -> dict[str, Tensor]:
    """Take the place of a head's ``loss_by_feat``."""
    plain = seg_logits.device.type != 'cpu' or not seg_logits.requires_grad
    if plain or torch.compiler.is_compiling() or not custom_functions_work():
        return type(self).loss_by_feat(self, seg_logits, batch_data_samples)
    labels, loss = self._stack_batch_gt(batch_data_samples).squeeze(1), self.loss_decode
    counted = labels != self.ignore_index
    labels = labels.where(counted, 0)
    dtype = torch.promote_types(seg_logits.dtype, torch.float32)
    if loss.class_weight is None:
        weights = counted.to(dtype)
        total = weights.sum() if loss.avg_non_ignore else labels.numel()
    else:
        weights = torch.tensor(loss.class_weight, dtype=dtype)[labels] * counted
        total = weights.sum()
    value, right = up_sampled_cross_entropy(
        seg_logits, labels, weights * (loss.loss_weight / (total + _EPS)), self.align_corners, counted
    )
    return {loss.loss_name: value, 'acc_seg': (right + _EPS) * (100 / (counted.sum() + _EPS))}


def up_sampled_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, align_corners: bool, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross entropy of all pixels of up-sampled logits, and how many labels are right.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W), int64, from 0 to C - 1.
        weights: (N, H, W), factors of the pixels' losses; float32, or float64 if the logits are.
        align_corners: How the logits are up-sampled to H×W, bilinearly.
        counted: (N, H, W), bool: which pixels may count as right: those whose label has the largest logit, or one of
            the largest.

    Returns:
        The sum, () and the number, (1,), both of the dtype of ``weights``; the number has no gradient.
    """
    return _UpSampledCrossEntropy.apply(logits, labels, weights, align_corners, counted)


class _UpSampledCrossEntropy(torch.autograd.Function):
    """Compute loss and gradient at once, in blocks of rows.

    Of the up-sampled logits, which are the largest tensors of a training step, the plain way writes four to six copies:
    themselves, their log softmax, both gradients, and what counts right labels; each is larger than the cache. Here a
    block of rows is up-sampled, turned into its part of loss and gradient, and its gradient down-sampled, before the
    next one.

    Why it is the same: up-sampling is linear, ``Z = R X Cᵀ`` for each class, with the matrices of linear interpolation
    over rows and columns. The gradient of the loss by Z is ``G = weight · (softmax(Z) - one-hot(label))``, and by X it
    is ``Rᵀ G C``. A block of rows of Z needs a band of X; the sum over all blocks gives ``Rᵀ G``. As the loss is a
    scalar, its gradient can be computed with it, and ``backward`` only has to scale it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, align_corners: bool, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype, classes = weights.dtype, logits.shape[1]
        (h, w), (height, width) = logits.shape[2:], labels.shape[1:]
        r, c = (
            shifted_interpolation(size, new_size, align_corners)[1].to(dtype)
            for size, new_size in ((h, height), (w, width))
        )
        step = max(_BLOCK_BYTES // (classes * width * weights.element_size()), 1)
        block = weights.new_empty(classes, min(step, height), width)
        wide, wide_grad = weights.new_empty(2, classes, h, width)
        gradient = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
        loss, right = weights.new_zeros(()), weights.new_zeros(1)
        with torch.autocast('cpu', enabled=False):
            for n in range(len(logits)):
                torch.matmul(logits[n].to(dtype), c.T, out=wide)
                wide_grad.zero_()
                for top in range(0, height, step):
                    rows = slice(top, min(top + step, height))
                    band = slice(*source_band(top, rows.stop, h, height, align_corners))
                    of_rows = r[rows, band].expand(classes, -1, -1)
                    z, label, weight = block[:, : rows.stop - top], labels[n, None, rows], weights[n, rows]
                    torch.bmm(of_rows, wide[:, band], out=z)
                    z -= z.amax(0)
                    of_label = z.gather(0, label)[0]
                    sums = z.exp_().sum(0)
                    loss += ((sums.log() - of_label) * weight).sum()
                    right += ((of_label == 0) & counted[n, rows]).sum()
                    z *= weight / sums
                    z.scatter_add_(0, label, -weight[None])
                    wide_grad[:, band].baddbmm_(of_rows.transpose(1, 2), z)
                torch.matmul(wide_grad, c, out=gradient[n])
        ctx.save_for_backward(gradient.to(logits.dtype))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
