"""Multi-scale test: one label map from an image at several sizes and their mirror images."""

from __future__ import annotations

import math

import torch
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_inceptionnext.inference.label_map_segmentor import at_original_size, network_size, predicts_by_argmax
from mmseg_inceptionnext.models.build import heads_of

_CHUNK = 4  # classes that are up-sampled at a time: few enough for a CPU's cache


class MultiScaleSegmentor(nn.Module):
    """Averages the class probabilities of all views of an image, and predicts the most likely class.

    The result equals that of mmseg's SegTTAModel on the same views. SegTTAModel keeps the logits of all classes and
    views at the size of the original image: 12 views of a 2000×3000 image and 150 classes take 43 GB. Here a view is
    kept as its head left it, at a stride of 4, and up-sampled a few classes at a time, twice: for the softmax's
    denominator, and for the probabilities. Memory at full size does not grow with the number of classes.
    """

    def __init__(self, module: EncoderDecoder):
        super().__init__()
        self.module = module

    @torch.no_grad()
    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict label maps.

        Args:
            data: What mmcv's TestTimeAug and ``pseudo_collate`` return: ``inputs[v][i]`` (3, H, W) and
                ``data_samples[v][i]`` of view v and image i. Sizes may differ between images, too.

        Returns:
            A sample for each image, with ``pred_sem_seg`` (1, height, width), int64, and ``confidence`` (height,
            width), the mean probability of the label.
        """
        views = list(zip(data['inputs'], data['data_samples'], strict=True))
        return [self._predict([(inputs[i], samples[i]) for inputs, samples in views]) for i in range(len(views[0][0]))]

    def _predict(self, views: list[tuple[Tensor, SegDataSample]]) -> SegDataSample:
        model, logits, metas = self.module, [], []
        for image, sample in views:
            data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
            inputs, meta = data['inputs'], data['data_samples'][0].metainfo
            if predicts_by_argmax(model):
                logits.append(model(inputs, mode='tensor')[0])
            else:  # sliding windows, which overwrite the meta, or a head of another kind
                logits.append(model.inference(inputs, [dict(meta)])[0])
            metas.append(meta)
        if model.out_channels == 1:
            label, confidence = _threshold(logits, metas, model.align_corners, heads_of(model)[-1].threshold)
        else:
            label, confidence = multi_scale_prediction(logits, metas, model.align_corners)
        sample = data['data_samples'][0]
        sample.set_data({'pred_sem_seg': PixelData(data=label), 'confidence': confidence})
        return sample


def multi_scale_label_map(logits: list[Tensor], metas: list[dict], align_corners: bool) -> Tensor:
    """Return the labels of :func:`multi_scale_prediction` alone."""
    return multi_scale_prediction(logits, metas, align_corners)[0]


def multi_scale_prediction(logits: list[Tensor], metas: list[dict], align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return the class of the largest mean probability over all views, for every pixel of the original image.

    Args:
        logits: (C, h, w) for each view; sizes may differ.
        metas: ``meta`` of :func:`~mmseg_inceptionnext.inference.label_map_segmentor.label_map` for each view.
        align_corners: Whether up-sampling aligns corners.

    Returns:
        (1, height, width), int64, and that probability, (height, width).
    """
    views = [(view.contiguous(), network_size(meta), meta) for view, meta in zip(logits, metas, strict=True)]
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(logits[0]), _CHUNK)]
    size = tuple(metas[0]['ori_shape'][:2])

    log_denominators = []
    for view, input_size, meta in views:
        total = view.new_full(size, -math.inf, dtype=torch.float32)
        for chunk in chunks:
            x = at_original_size(view[chunk].float(), input_size, meta, align_corners)
            total = torch.logaddexp(total, torch.logsumexp(x, dim=0))
        log_denominators.append(total)

    largest = torch.full_like(total, -math.inf)
    label = torch.zeros(size, dtype=torch.long, device=total.device)
    for chunk in chunks:
        probability = sum(
            (at_original_size(view[chunk].float(), input_size, meta, align_corners) - log_denominator).exp_()
            for (view, input_size, meta), log_denominator in zip(views, log_denominators, strict=True)
        )
        chunk_largest, chunk_label = probability.max(dim=0)
        label = torch.where(chunk_largest > largest, chunk_label + chunk.start, label)
        largest = torch.maximum(chunk_largest, largest)
    return label[None], largest / len(views)


def _threshold(logits: list[Tensor], metas: list[dict], align_corners: bool,
               threshold: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the label map and its probabilities of a head with one channel, the logit of class 1."""
    probability = sum(
        at_original_size(view, network_size(meta), meta, align_corners).sigmoid()
        for view, meta in zip(logits, metas, strict=True)
    )
    probability = probability / len(logits)
    label = probability > threshold
    return label.long(), torch.where(label, probability, 1 - probability)[0]
