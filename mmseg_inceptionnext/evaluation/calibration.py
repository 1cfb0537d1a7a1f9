"""Whether labels are right as often as they are probable: calibration errors, and the temperature that mends them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS
from scipy.optimize import minimize_scalar

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.confidence import ClassLogits, class_logits_of
from mmseg_inceptionnext.labels import label_array

ECE_BINS = 15  # of Guo et al., On Calibration of Modern Neural Networks, ICML 2017
_FINE = 100  # bins in each of these, of which coverage is read
_PIXELS = 200_000  # that a temperature is fitted on
_SMALLEST, _LARGEST = 0.05, 20.0


@METRICS.register_module()
class CalibrationMetric(BaseMetric):
    """Counts the labelled pixels, the right ones among them and the sum of their confidence, in bins of confidence.

    Args:
        ignore_index: Label of pixels that are not counted, as that of the IoUMetric.
        temperature: Logits are divided by it.

    Attributes:
        figures (dict): After an evaluation, what :func:`calibration` returns; on rank 0 alone.
    """

    figures: dict = {}

    def __init__(self, ignore_index: int = 255, temperature: float = 1, **kwargs):
        super().__init__(**kwargs)
        self.ignore_index, self.temperature = ignore_index, temperature

    @torch.inference_mode()
    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            truth, prediction = (label_array(sample[key]['data']) for key in ('gt_sem_seg', 'pred_sem_seg'))
            is_class = (truth != self.ignore_index) & (truth < len(self.dataset_meta['classes']))
            if 'confidence' in sample:  # of a multi-scale test
                confidence = sample['confidence']
            else:
                labels = torch.as_tensor(sample['pred_sem_seg']['data'])[0]
                confidence, _ = _logits_of(sample).confidence_and_entropy(labels, self.temperature)
            confidence = confidence.cpu().numpy()[is_class]
            self.results.append(histogram(confidence, (truth == prediction)[is_class]))

    def compute_metrics(self, results: list[np.ndarray]) -> dict:
        self.figures = calibration(sum(results))
        return {}


def histogram(confidence: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Return (3, bins) float64: number of pixels, of right ones, and sum of the confidence, in bins ``(low, high]``.

    Args:
        confidence: (N,) from 0 to 1.
        is_right: (N,) bool.
    """
    number = ECE_BINS * _FINE
    index = np.clip(np.ceil(confidence.astype(np.float64) * number).astype(int) - 1, 0, number - 1)
    weights = None, is_right.astype(np.float64), confidence.astype(np.float64)
    return np.stack([np.bincount(index, weight, number) for weight in weights])


def calibration(counts: np.ndarray) -> dict:
    """Return how accuracy follows confidence, given the sum of :func:`histogram` over all images.

    Returns:
        ``{'ECE', 'reliability': [{'low', 'high', 'pixels', 'confidence', 'accuracy'}], 'coverage': [{'min_confidence',
        'coverage', 'accuracy'}]}``. The expected calibration error is the mean distance of accuracy and confidence over
        15 bins of equal width, weighted by their pixels; in percent, as all figures are; None without pixels.
        ``coverage`` is the share of the pixels that are left if those of less confidence are not used, and ``accuracy``
        that of the right ones among them.
    """
    pixels, right, confidence = counts.reshape(3, ECE_BINS, _FINE).sum(2)
    total = pixels.sum()
    bins = [
        dict(
            low=i / ECE_BINS, high=(i + 1) / ECE_BINS, pixels=int(pixels[i]),
            confidence=_percent(confidence[i], pixels[i]), accuracy=_percent(right[i], pixels[i]),
        )
        for i in range(ECE_BINS)
    ]  # fmt: skip
    left, left_right = (np.cumsum(values[::-1])[::-1] for values in counts[:2])
    coverage = [
        dict(
            min_confidence=round(i / (ECE_BINS * _FINE), 4), coverage=_percent(left[i], total),
            accuracy=_percent(left_right[i], left[i]),
        )
        for i in range(0, ECE_BINS * _FINE, ECE_BINS)
    ]  # fmt: skip
    return dict(ECE=_percent(np.abs(right - confidence).sum(), total), reliability=bins, coverage=coverage)


def _percent(part: float, whole: float) -> float | None:
    return round(float(100 * part / whole), 2) if whole else None


def _logits_of(sample: Mapping) -> ClassLogits:
    logits = class_logits_of(sample)
    if logits is None:
        raise UserError('the segmentor returns labels alone: without logits, there are no probabilities')
    return logits


@METRICS.register_module()
class TemperatureMetric(BaseMetric):
    """Fits the temperature by which logits are divided, so that the probability of the truth is largest.

    Args:
        ignore_index: Label of pixels that are not counted.

    Attributes:
        fitted (dict): ``{'temperature', 'nll_before', 'nll_after', 'pixels'}``, after an evaluation; on rank 0 alone.
    """

    fitted: dict = {}

    def __init__(self, ignore_index: int = 255, **kwargs):
        super().__init__(**kwargs)
        self.ignore_index, self.number = ignore_index, _PIXELS

    def spread_over(self, images: int) -> None:
        """Draw so many pixels of each image, always the same, that there are at most 200,000."""
        self.number = max(_PIXELS // images, 1)

    @torch.inference_mode()
    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            truth = label_array(sample['gt_sem_seg']['data'])
            found = np.flatnonzero((truth != self.ignore_index) & (truth < len(self.dataset_meta['classes'])))
            if len(found) > self.number:
                found = np.sort(np.random.default_rng(0).choice(found, self.number, replace=False))
            logits, index = _logits_of(sample), torch.from_numpy(found)
            rows = [logits.of(i).flatten().cpu()[index].float() for i in range(logits.channels)]
            self.results.append((torch.stack(rows, 1).numpy(), truth.ravel()[found]))

    def compute_metrics(self, results: list[tuple[np.ndarray, np.ndarray]]) -> dict:
        logits, truth = (np.concatenate(parts) for parts in zip(*results, strict=True))
        self.fitted = fit_temperature(torch.from_numpy(logits), torch.from_numpy(truth))
        return {}


def fit_temperature(logits: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return the temperature of the smallest mean negative log-likelihood, which is convex in its inverse.

    Args:
        logits: (N, classes).
        truth: (N,) int64.

    Raises:
        UserError: There are no pixels, or the smallest is beyond 0.05 or 20.
    """
    if not len(truth):
        raise UserError("temperature='fit': the validation set has no labelled pixels: check its masks")

    def nll(inverse: float) -> float:
        return torch.nn.functional.cross_entropy(logits * inverse, truth).item()

    inverse = minimize_scalar(nll, bounds=(1 / _LARGEST, 1 / _SMALLEST), method='bounded', options=dict(xatol=1e-5)).x
    temperature = round(1 / inverse, 4)
    if not 1.01 * _SMALLEST < temperature < 0.99 * _LARGEST:
        raise UserError(
            f'no temperature from {_SMALLEST} to {_LARGEST} fits: the best is at the border, as of a model that has '
            'learned nothing, or all by heart'
        )
    return dict(temperature=temperature, nll_before=nll(1), nll_after=nll(1 / temperature), pixels=len(truth))
