"""mmseg's transforms in less time: the same random numbers are drawn, and the same pixels come out."""

from __future__ import annotations

import cv2
import mmcv
import numpy as np
from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop
from mmseg.registry import TRANSFORMS

from mmseg_inceptionnext.config_files import dicts_inside

_VALUES = np.arange(256, dtype=np.uint8)
_EXACT = 2**24  # up to here OpenCV's counts, float32, are exact


def use_faster_transforms(dataset_cfg: dict) -> None:
    """Replace mmseg's transforms by those of this module everywhere inside a data set's config, in place.

    The configs name mmseg's, which other programs look for by these names.
    """
    faster = {'RandomCrop': CountingRandomCrop, 'PhotoMetricDistortion': TablePhotoMetricDistortion}
    for node in dicts_inside(dataset_cfg):
        if (kind := node.get('type')) in faster:
            node['type'] = faster[kind].__name__


def count_labels(labels: np.ndarray) -> np.ndarray:
    """Return the number of pixels of each label, from label 0 on, as ``np.bincount`` does.

    Args:
        labels: (H, W), not negative.
    """
    if labels.dtype != np.uint8 or labels.size > _EXACT:
        return np.bincount(labels.ravel())
    return cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(np.int64)


@TRANSFORMS.register_module()
class CountingRandomCrop(RandomCrop):
    """mmseg's RandomCrop, which sorts the labels of every crop that it tries: here they are counted."""

    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """Return the crop's rows and columns: start and stop of each."""
        labels = results.get('gt_seg_map')
        if self.cat_max_ratio >= 1 or labels.dtype != np.uint8:
            return super().crop_bbox(results)
        box = self._random_box(results['img'])
        for _ in range(10):
            counts = count_labels(self.crop(labels, box))
            if 0 <= self.ignore_index < len(counts):
                counts[self.ignore_index] = 0
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
            box = self._random_box(results['img'])
        return box

    def _random_box(self, image: np.ndarray) -> tuple[int, int, int, int]:
        top, left = (
            np.random.randint(0, max(side - crop, 0) + 1)
            for side, crop in zip(image.shape, self.crop_size, strict=False)
        )
        return top, top + self.crop_size[0], left, left + self.crop_size[1]


@TRANSFORMS.register_module()
class TablePhotoMetricDistortion(PhotoMetricDistortion):
    """mmseg's PhotoMetricDistortion, which computes every pixel in float32: here a table of 256 values is.

    Images of another dtype than uint8 are left to mmseg's.
    """

    def transform(self, results: dict) -> dict:
        image = results['img']
        if image.strides[1] < 0:  # a mirrored view, which OpenCV's functions copy value by value
            results['img'] = cv2.flip(image[:, ::-1], 1)
        return super().transform(results)

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        if img.dtype != np.uint8:
            return super().convert(img, alpha, beta)
        return cv2.LUT(img, super().convert(_VALUES, alpha, beta))

    def saturation(self, img: np.ndarray) -> np.ndarray:
        if img.dtype != np.uint8:
            return super().saturation(img)
        if np.random.randint(2):
            alpha = np.random.uniform(self.saturation_lower, self.saturation_upper)
            return _in_hsv(img, 1, super().convert(_VALUES, alpha))
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        if img.dtype != np.uint8:
            return super().hue(img)
        if np.random.randint(2):
            shift = np.random.randint(-self.hue_delta, self.hue_delta)
            return _in_hsv(img, 0, ((_VALUES.astype(int) + shift) % 180).astype(np.uint8))
        return img


def _in_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Replace the values of a channel, 0 for hue and 1 for saturation, by those of a table."""
    hsv = mmcv.bgr2hsv(image)
    return mmcv.hsv2bgr(cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel))
