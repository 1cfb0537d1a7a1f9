"""Boundary IoU: the IoU of what lies near the contours of truth and prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS

from mmseg_inceptionnext.labels import ignore_index_of, label_array

SHARE = 0.02  # of the image's diagonal


@METRICS.register_module()
class BoundaryIoUMetric(BaseMetric):
    """Boundary IoU of each class (Cheng et al., CVPR 2021): of its pixels up to 2 % of the diagonal from its contour.

    Intersections and unions are summed over all images, as for the IoU. Unlabelled pixels are taken out of both maps;
    their border is a contour, as is that of the image.

    Args:
        ignore_index: Label of pixels that are not counted, as that of the IoUMetric.

    Attributes:
        ious (numpy.ndarray): Of each class in percent, after an evaluation; NaN where it is in neither map. On rank 0
            alone.
    """

    ious: np.ndarray = np.empty(0)

    def __init__(self, ignore_index: int = 255, **kwargs):
        super().__init__(**kwargs)
        self.ignore_index = ignore_index

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        number = len(self.dataset_meta['classes'])
        unlabelled = ignore_index_of(number)
        dtype = np.min_scalar_type(unlabelled)
        for sample in data_samples:
            truth, prediction = (label_array(sample[key]['data']) for key in ('gt_sem_seg', 'pred_sem_seg'))
            is_class = (truth != self.ignore_index) & (truth < number)
            maps = [np.where(is_class, labels, unlabelled).astype(dtype) for labels in (truth, prediction)]
            self.results.append(boundary_areas(*maps, number))

    def compute_metrics(self, results: list[np.ndarray]) -> dict:
        intersection, of_truth, of_prediction = sum(results)
        union = of_truth + of_prediction - intersection
        self.ious = np.divide(100 * intersection, union, out=np.full(len(union), np.nan), where=union > 0)
        return {}


def boundary_areas(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the pixels near contours of each class, (3, num_classes) int64: in both maps, in truth, in the prediction.

    Args:
        truth, prediction: (H, W) uint8 or uint16; other labels than those of classes are not counted.
        num_classes: Number of classes.
    """
    distance = max(round(SHARE * math.hypot(*truth.shape)), 1)
    near_truth, near_prediction = (near_contours(labels, distance) for labels in (truth, prediction))
    in_both = near_truth & near_prediction & (truth == prediction)
    counted = truth[in_both], truth[near_truth], prediction[near_prediction]
    return np.stack([np.bincount(labels, minlength=num_classes)[:num_classes] for labels in counted])


def near_contours(labels: np.ndarray, distance: int) -> np.ndarray:
    """Return which pixels (H, W) have another label, or the end of the image, within a chessboard distance.

    Eroding the mask of each class ``distance`` times by 3×3 would leave the others. Here it is done for all classes at
    once: a pixel is inside if the least and the largest label of its window are equal.
    """
    kernel = np.ones((3, 3), np.uint8)
    least, largest = (each(labels, kernel, iterations=distance) for each in (cv2.erode, cv2.dilate))
    near = least != largest
    near[:distance] = near[-distance:] = near[:, :distance] = near[:, -distance:] = True
    return near
