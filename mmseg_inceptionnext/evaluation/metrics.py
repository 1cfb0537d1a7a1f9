"""Metrics: IoU and accuracy of each class, and which class was taken for which."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.evaluator import BaseMetric
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from PIL import Image

from mmseg_inceptionnext.drawing import save_picture
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.labels import Classes, codes_of_meta, ignore_index_of, label_array

# Metrics of a whole test set, in percent, and their long names.
TITLES = {
    'mIoU': 'mean IoU', 'mAcc': 'mean accuracy', 'mDice': 'mean Dice', 'mFscore': 'mean F-score',
    'mPrecision': 'mean precision', 'mRecall': 'mean recall', 'aAcc': 'pixel accuracy',
    'mBoundaryIoU': 'mean boundary IoU', 'ECE': 'expected calibration error',
}  # fmt: skip
# What mmseg's IoUMetric computes for each name that iou_metrics can ask for, besides aAcc.
FIGURES = {'mIoU': ('mIoU', 'mAcc'), 'mDice': ('mDice', 'mAcc'), 'mFscore': ('mFscore', 'mPrecision', 'mRecall')}


@METRICS.register_module()
class PerClassIoUMetric(IoUMetric):
    """mmseg's IoUMetric, which also keeps the figures of each class.

    - IoU and accuracy are kept whatever ``iou_metrics`` asks for.
    - The label maps that it writes are in the coding of the data set's annotations.
    - A label that is no class is left out, as ``ignore_index`` is; in mmseg's, predictions there enlarge the union.

    Attributes:
        figures (dict): After an evaluation, what :func:`~mmseg_inceptionnext.evaluation.evaluate` returns; on rank 0
            alone.

    Raises:
        UserError: ``iou_metrics`` names an unknown metric.
    """

    figures: dict = {}

    def __init__(self, *args, iou_metrics: Sequence[str] | str = ('mIoU',), **kwargs):
        names = [iou_metrics] if isinstance(iou_metrics, str) else list(iou_metrics)
        if unknown := [name for name in names if name not in FIGURES]:
            raise UserError(f'iou_metrics of the evaluator has {unknown[0]!r}: it can be {", ".join(FIGURES)}')
        super().__init__(*args, iou_metrics=names, **kwargs)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        folder, self.output_dir = self.output_dir, None  # mmseg would write labels + 1, or labels
        names = tuple(self.dataset_meta['classes'])
        super().process(data_batch, [self._without_unknown(sample, len(names)) for sample in data_samples])
        self.output_dir = folder
        if not folder:
            return
        classes = Classes(names, (), codes_of_meta(self.dataset_meta, len(names)))
        for sample in data_samples:
            labels = label_array(sample['pred_sem_seg']['data'])
            path = Path(folder, f'{Path(sample["img_path"]).stem}.png')
            save_picture(Image.fromarray(classes.encode(labels)), path)

    def _without_unknown(self, sample: dict, num_classes: int) -> dict:
        if self.format_only:
            return sample
        truth = sample['gt_sem_seg']['data']
        truth = truth.where(truth < num_classes, self.ignore_index)
        return dict(sample, gt_sem_seg=dict(data=truth))

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if not self.format_only:
            asked = list(dict.fromkeys([*self.metrics, 'mIoU']))
            areas = (sum(areas) for areas in zip(*results, strict=True))
            ratios = self.total_area_to_metrics(*areas, asked, self.nan_to_num, self.beta)
            overall = 100 * float(ratios.pop('aAcc'))
            names = (name.strip() for name in self.dataset_meta['classes'])
            self.figures = {
                **{
                    f'm{kind}': rounded(metrics.get(f'm{kind}', 100 * mean_of_classes(row)))
                    for kind, row in ratios.items()
                },
                'aAcc': rounded(overall),
                'per_class': {
                    name: dict(zip(ratios, (rounded(100 * value) for value in row), strict=True))
                    for name, *row in zip(names, *ratios.values(), strict=True)
                },
            }
        return metrics


def mean_of_classes(of_classes: np.ndarray) -> float:
    """Return the mean over the classes that have a figure; NaN if none has."""
    return np.nan if np.isnan(of_classes).all() else np.nanmean(of_classes)


def rounded(percent: float) -> float | None:
    """Round to two decimals, as mmseg prints; None stands for NaN, which JSON lacks."""
    return None if np.isnan(percent) else round(float(percent), 2)


@dataclass(frozen=True)
class EvaluatedImage:
    """One test image: its label maps, and how many pixels of each class were predicted as which.

    Attributes:
        path: Path of the image.
        truth_png, prediction_png: Label maps at the size of the image, as PNG files; unlabelled pixels have
            :func:`~mmseg_inceptionnext.labels.ignore_index_of` the number of classes.
        pairs: (K, 3) int64: true class, predicted class, pixels. Pairs without pixels are left out.
    """

    path: str
    truth_png: bytes
    prediction_png: bytes
    pairs: np.ndarray

    @property
    def miou(self) -> float:
        """Mean IoU in percent over the classes that the image has in truth or prediction; NaN if all is unlabelled."""
        size = int(self.pairs[:, :2].max(initial=-1)) + 1
        return float(np.nanmean(ious(total_confusion([self], size)))) if size else np.nan

    @property
    def aacc(self) -> float:
        """Percentage of the labelled pixels that are right; NaN if there are none."""
        right = self.pairs[self.pairs[:, 0] == self.pairs[:, 1], 2].sum()
        return float(100 * right / self.pairs[:, 2].sum()) if len(self.pairs) else np.nan


@METRICS.register_module()
class ConfusionMetric(BaseMetric):
    """Keeps an :class:`EvaluatedImage` for each test image; mmseg's IoUMetric keeps only areas.

    Args:
        ignore_index: Label of pixels that are not counted, as that of the IoUMetric.

    Attributes:
        images (list): All images, after an evaluation; on rank 0 alone.
    """

    images: Sequence[EvaluatedImage] = ()

    def __init__(self, ignore_index: int = 255, **kwargs):
        super().__init__(**kwargs)
        self.ignore_index = ignore_index

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        unlabelled = ignore_index_of(len(self.dataset_meta['classes']))
        dtype = np.min_scalar_type(unlabelled)
        for sample in data_samples:
            truth, prediction = (label_array(sample[key]['data']) for key in ('gt_sem_seg', 'pred_sem_seg'))
            is_class = (truth != self.ignore_index) & (truth < len(self.dataset_meta['classes']))
            truth = np.where(is_class, truth, unlabelled).astype(dtype)
            pairs = confused_pairs(truth, prediction, unlabelled)
            self.results.append(EvaluatedImage(sample['img_path'], _png(truth), _png(prediction.astype(dtype)), pairs))

    def compute_metrics(self, results: list[EvaluatedImage]) -> dict:
        self.images = results
        return {}


def confused_pairs(truth: np.ndarray, prediction: np.ndarray, unlabelled: int = 255) -> np.ndarray:
    """Count the pixels of each pair of true and predicted class in two (H, W) label maps; skip unlabelled ones.

    Returns:
        (K, 3) int64: true class, predicted class, pixels.
    """
    labelled = truth != unlabelled
    number = int(prediction.max(initial=0)) + 1
    pixels = np.bincount(truth[labelled].astype(np.int64) * number + prediction[labelled], minlength=1)
    codes = np.flatnonzero(pixels)
    return np.stack([codes // number, codes % number, pixels[codes]], axis=1)


def total_confusion(images: Sequence[EvaluatedImage], num_classes: int) -> np.ndarray:
    """Return (num_classes, num_classes) int64: pixels of a true class (row) that were predicted as a class (column)."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for image in images:
        np.add.at(confusion, (image.pairs[:, 0], image.pairs[:, 1]), image.pairs[:, 2])
    return confusion


def ious(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of each class in percent; NaN for a class that is neither in the truth nor predicted."""
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(100 * hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def _png(labels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(labels).save(file, 'png')
    return file.getvalue()
