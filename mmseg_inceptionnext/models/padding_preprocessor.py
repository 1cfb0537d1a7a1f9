"""mmseg's preprocessor, which also pads images of several sizes into one batch."""

from __future__ import annotations

import torch
from mmseg.models import SegDataPreProcessor


class PaddingPreprocessor(SegDataPreProcessor):
    """SegDataPreProcessor whose ``test_cfg=dict(size_divisor=32)`` also takes a test batch of several sizes.

    mmseg pads by ``test_cfg``, but first asserts that all images have one size. Here each is padded to the largest
    height and width of the batch, rounded up to the divisor.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        images, samples = data['inputs'], data.get('data_samples')
        sides = [tuple(image.shape[-2:]) for image in images]
        if training or not self.test_cfg or not samples or len(set(sides)) == 1:
            return super().forward(data, training)
        divisor = self.test_cfg.get('size_divisor') or 1
        size = self.test_cfg.get('size') or [-(-max(side) // divisor) * divisor for side in zip(*sides, strict=True)]
        before, self.test_cfg = self.test_cfg, dict(size=tuple(size))
        try:
            parts = [
                super(PaddingPreprocessor, self).forward(dict(inputs=[image], data_samples=[sample]))
                for image, sample in zip(images, samples, strict=True)
            ]
        finally:
            self.test_cfg = before
        return dict(
            inputs=torch.cat([part['inputs'] for part in parts]),
            data_samples=[part['data_samples'][0] for part in parts],
        )
