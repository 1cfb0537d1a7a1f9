"""EncoderDecoder that returns label maps without holding the logits of all classes at full size."""

from __future__ import annotations

import math

import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor


@MODELS.register_module()
class LabelMapSegmentor(EncoderDecoder):
    """mmseg's EncoderDecoder whose ``predict`` yields ``pred_sem_seg`` alone, not ``seg_logits``.

    mmseg up-samples the logits of all classes to the size of the network's input and once more to that of the original
    image, keeps them in the sample, and takes the argmax. Here both are done for a class at a time, which stays in the
    cache, and only the largest logit and its class are kept: the maps are equal on every pixel, for each pixel's and
    class's arithmetic is the same. Where the two sizes are equal the second up-sampling changes nothing and is left
    out.

    ``test_cfg=dict(return_logits=True)`` gives the logits, too, by mmseg's own way, as test-time augmentation needs. So
    do sliding windows, a single output channel with a threshold, and a head with a ``predict`` of its own.
    """

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Predict label maps.

        Args:
            inputs: (N, 3, H, W).
            data_samples: Of each image, with its original size, padding and flip; else the maps are H×W.

        Returns:
            A sample of each image, with ``pred_sem_seg`` (1, height, width), int64.
        """
        if not self._takes_classes_apart():
            return super().predict(inputs, data_samples)

        logits = self.decode_head.forward(self.extract_feat(inputs))
        if data_samples is None:
            meta = dict(ori_shape=inputs.shape[2:], img_shape=inputs.shape[2:])
            data_samples = [SegDataSample(metainfo=meta) for _ in inputs]
        # mmseg's rule of the first up-sampling: all images of a batch to the size that the first one's says.
        first = data_samples[0].metainfo
        size = first['img_shape']
        if not isinstance(size, torch.Size):
            size = first.get('pad_shape', size)
        for image_logits, sample in zip(logits, data_samples, strict=True):
            label = label_map(image_logits, tuple(size[:2]), sample.metainfo, self.align_corners)
            sample.set_data({'pred_sem_seg': PixelData(data=label)})
        return data_samples

    def _takes_classes_apart(self) -> bool:
        head = type(self.decode_head)
        return (
            not self.test_cfg.get('return_logits')
            and self.test_cfg.get('mode', 'whole') == 'whole'
            and self.out_channels > 1
            and head.predict is BaseDecodeHead.predict
            and head.predict_by_feat is BaseDecodeHead.predict_by_feat
        )


def label_map(logits: Tensor, input_size: tuple[int, int], meta: dict, align_corners: bool) -> Tensor:
    """The most likely class of every pixel of the original image.

    Args:
        logits: (C, h, w), of a head.
        input_size: Height and width of the network's input.
        meta: 'ori_shape', and if there are any 'img_padding_size' or 'padding_size' (left, right, top, bottom) and
            'flip' with 'flip_direction', as mmseg's ``postprocess_result`` reads them.
        align_corners: Of both up-samplings.

    Returns:
        (1, height, width), int64.
    """
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    size = tuple(meta['ori_shape'][:2])
    flipped = {'horizontal': [-1], 'vertical': [-2]}[meta['flip_direction']] if meta.get('flip') else []

    logits = logits.contiguous()
    largest = logits.new_full(size, -math.inf)
    label = torch.zeros(size, dtype=torch.int16, device=logits.device)  # a quarter of the memory traffic of int64
    for index in range(len(logits)):
        logit = _resize(logits[None, index, None], input_size, align_corners)
        logit = logit[..., top : input_size[0] - bottom, left : input_size[1] - right]
        logit = _resize(logit.flip(flipped) if flipped else logit, size, align_corners)[0, 0]
        label.masked_fill_(logit > largest, index)
        torch.maximum(logit, largest, out=largest)
    return label[None].long()


def _resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if x.shape[2:] == size:
        return x
    return resize(x, size=size, mode='bilinear', align_corners=align_corners, warning=False)
