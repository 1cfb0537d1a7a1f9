"""The label of pixels without a class, which loss, metric, crop, padding and checks must agree on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmseg.registry import METRICS

from mmseg_inceptionnext.config_files import dicts_inside, heads
from mmseg_inceptionnext.labels import IGNORE_INDEX

_TRANSFORMS = ('CheckAnnotation', 'RandomCrop')


def use_one_ignore_index(cfg: Config) -> None:
    """Let the ``ignore_index`` that a config sets for its heads or its metrics hold everywhere, in place.

    mmseg has a setting of that name for each loss, metric, crop and padding, all 255 by default: where one is changed
    alone, others count those pixels as errors of a class, or fail. What the config sets for heads and what it sets for
    metrics stays, even if the two differ; a metric follows the heads where it sets nothing, and the heads a metric.
    Crop, padding and :class:`~mmseg_inceptionnext.CheckAnnotation` follow the heads.
    """
    losses = [head for _, head in heads(cfg.get('model') or {})]
    metrics = [metric for name in ('val_evaluator', 'test_evaluator') for metric in _metrics(cfg.get(name))]
    found = [part['ignore_index'] for part in (*losses, *metrics) if 'ignore_index' in part]
    if not found:
        return
    for part in (*losses, *metrics):
        part.setdefault('ignore_index', found[0])
    label = losses[0]['ignore_index'] if losses else found[0]
    if label == IGNORE_INDEX:
        return
    if cfg.model.get('data_preprocessor'):
        cfg.model.data_preprocessor.seg_pad_val = label
    for split in ('train', 'val', 'test'):
        for transform in dicts_inside(cfg.get(f'{split}_dataloader')):
            if transform.get('type') in _TRANSFORMS:
                transform['ignore_index'] = label


def _metrics(evaluator: Any) -> Iterator[dict]:
    """Yield the configs of the metrics that have an ``ignore_index``."""
    for metric in dicts_inside(evaluator):
        kind = METRICS.get(metric['type']) if isinstance(metric.get('type'), str) else metric.get('type')
        if kind and any('ignore_index' in inspect.signature(c.__init__).parameters for c in kind.__mro__[:-1]):
            yield metric
