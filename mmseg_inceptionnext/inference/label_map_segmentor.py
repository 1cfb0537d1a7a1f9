"""EncoderDecoder that returns label maps without holding the logits of all classes at full size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_inceptionnext.inference.confidence import ClassLogits
from mmseg_inceptionnext.inference.tiles import Grid, Window, mean_logits
from mmseg_inceptionnext.models.build import heads_of


@MODELS.register_module()
class LabelMapSegmentor(EncoderDecoder):
    """mmseg's EncoderDecoder whose ``predict`` returns ``pred_sem_seg`` and ``class_logits``, without ``seg_logits``.

    mmseg up-samples the logits of all classes to the size of the network's input and again to that of the original
    image, keeps them in the sample, and takes the argmax. Here one class at a time is up-sampled, which stays in the
    cache, and only the largest logit and its class are kept. The label maps are equal, because the arithmetic of each
    pixel and class is the same. Where both sizes are equal, the second up-sampling changes nothing and is skipped.
    Sliding windows are kept as the head left them, and averaged one class at a time as well.

    mmseg's ``predict`` runs for ``test_cfg=dict(return_logits=True)``, which its SegTTAModel needs, a single output
    channel with a threshold, and a head with its own ``predict``.
    """

    label_map: Callable[..., Tensor] | None = None  # a kernel, which use_kernels puts here

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Predict label maps.

        Args:
            inputs: (N, 3, H, W).
            data_samples: Original size, padding and flip of each image. Default: the label maps are H×W.

        Returns:
            A sample for each image, with ``pred_sem_seg`` (1, height, width), int64, and ``class_logits``, a
            :class:`~mmseg_inceptionnext.inference.confidence.ClassLogits` of that size.
        """
        if self.test_cfg.get('return_logits') or self.out_channels == 1 or not _predicts_from_one_head(self):
            return super().predict(inputs, data_samples)

        if data_samples is None:
            meta = dict(ori_shape=inputs.shape[2:], img_shape=inputs.shape[2:])
            data_samples = [SegDataSample(metainfo=meta) for _ in inputs]
        results = self._slide if self.test_cfg.get('mode', 'whole') == 'slide' else self._whole
        found = results(inputs, [sample.metainfo for sample in data_samples])
        for (label, logits), sample in zip(found, data_samples, strict=True):
            sample.set_data({'pred_sem_seg': PixelData(data=label), 'class_logits': logits})
        return data_samples

    def _whole(self, inputs: Tensor, metas: list[dict]) -> Iterator[tuple[Tensor, ClassLogits]]:
        logits = self.decode_head.forward(self.extract_feat(inputs))
        size = network_size(metas[0])
        for image_logits, meta in zip(logits, metas, strict=True):
            arguments = image_logits, size, meta, self.align_corners
            found = class_logits(*arguments)
            yield self.label_map(*arguments) if self.label_map else found.label_map(), found

    def _slide(self, inputs: Tensor, metas: list[dict]) -> Iterator[tuple[Tensor, ClassLogits]]:
        size = tuple(inputs.shape[2:])
        regions = list(Grid(size, tuple(self.test_cfg.crop_size), tuple(self.test_cfg.stride)).windows())
        logits = [window_logits(self, inputs[..., r.top : r.bottom, r.left : r.right]) for r in regions]
        for i, meta in enumerate(metas):
            windows = [Window(r, x[i].contiguous(), self.align_corners) for r, x in zip(regions, logits, strict=True)]
            mean = mean_logits(windows, size)

            def at_original(channel: int, mean=mean, meta=meta) -> Tensor:
                return at_original_size(mean(channel)[None], size, meta, self.align_corners)[0]

            found = ClassLogits(len(windows[0].logits), at_original)
            yield found.label_map(), found


def predicts_by_argmax(model: EncoderDecoder) -> bool:
    """Return whether a segmentor's prediction is the argmax of its only head's up-sampled logits, and nothing else."""
    return model.out_channels > 1 and len(heads_of(model)) == 1 and predicts_from_logits(model)


def predicts_from_logits(model: EncoderDecoder) -> bool:
    """Return whether a segmentor's prediction follows from the up-sampled logits of its last head, for whole images."""
    return model.test_cfg.get('mode', 'whole') == 'whole' and _up_samples_logits(model)


def window_logits(model: EncoderDecoder, inputs: Tensor) -> Tensor:
    """Return the logits of parts of images, (N, C, h, w): as the head left them, or of the size of ``inputs``."""
    if _predicts_from_one_head(model):
        logits = model(inputs, mode='tensor')
    else:
        logits = model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])] * len(inputs))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # of autocast


def _predicts_from_one_head(model: EncoderDecoder) -> bool:
    return len(heads_of(model)) == 1 and _up_samples_logits(model)


def _up_samples_logits(model: EncoderDecoder) -> bool:
    return all(
        type(head).predict in (BaseDecodeHead.predict, BaseCascadeDecodeHead.predict)
        and type(head).predict_by_feat is BaseDecodeHead.predict_by_feat
        for head in heads_of(model)
    )


def network_size(meta: dict) -> tuple[int, int]:
    """Return the size that mmseg's heads up-sample all logits of a batch to, from its first sample's ``meta``."""
    size = meta['img_shape']
    if not isinstance(size, torch.Size):
        size = meta.get('pad_shape', size)
    return tuple(size[:2])


def label_map(logits: Tensor, input_size: tuple[int, int], meta: dict, align_corners: bool) -> Tensor:
    """Return the most likely class of every pixel of the original image, (1, height, width), int64.

    Arguments are those of :func:`class_logits`.
    """
    return class_logits(logits, input_size, meta, align_corners).label_map()


def class_logits(logits: Tensor, input_size: tuple[int, int], meta: dict, align_corners: bool) -> ClassLogits:
    """Return the logits of every pixel of the original image.

    Args:
        logits: (C, h, w), a head's output. Those of half precision are up-sampled in float32.
        input_size: Height and width of the network's input.
        meta: 'ori_shape', and optionally 'img_padding_size' or 'padding_size' (left, right, top, bottom) and 'flip'
            with 'flip_direction', as mmseg's ``postprocess_result`` reads them.
        align_corners: Whether both up-samplings align corners.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    meta = dict(meta)

    def at_original(channel: int) -> Tensor:
        return at_original_size(logits[channel : channel + 1], input_size, meta, align_corners)[0]

    return ClassLogits(len(logits), at_original)


def at_original_size(logits: Tensor, input_size: tuple[int, int], meta: dict, align_corners: bool) -> Tensor:
    """Up-sample the logits of some classes to the original image as mmseg does, in two steps; undo padding and flip.

    Args:
        logits: (C, h, w), a head's output.
        input_size, meta, align_corners: Arguments of :func:`class_logits`.

    Returns:
        (C, height, width).
    """
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    flipped = {'horizontal': [-1], 'vertical': [-2]}[meta['flip_direction']] if meta.get('flip') else []
    x = _resize(logits[None], input_size, align_corners)
    x = x[..., top : input_size[0] - bottom, left : input_size[1] - right]
    return _resize(x.flip(flipped) if flipped else x, tuple(meta['ori_shape'][:2]), align_corners)[0]


def _resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if x.shape[2:] == size:
        return x
    return resize(x, size=size, mode='bilinear', align_corners=align_corners, warning=False)
