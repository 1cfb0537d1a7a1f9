"""Check that settings of a config that must agree do, before a run starts: libraries fail late, or in riddles."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation.metrics import FIGURES


def check_agreement(cfg: Config) -> None:
    """Check the loaders of a training config, what belongs to a validation, and the metrics that hooks wait for.

    Raises:
        UserError: Two settings contradict each other, or a number is out of range.
    """
    for split in ('train', 'val'):
        loader = cfg.get(f'{split}_dataloader') or {}
        for key, least in (('num_workers', 0), ('batch_size', 1)):
            value = loader.get(key, least)
            if not isinstance(value, int) or value < least:
                kind = 'a positive whole number' if least else 'a whole number from 0 on'
                raise UserError(f'{split}_dataloader.{key}={value!r} must be {kind}')
    for key in ('max_iters', 'val_interval'):
        value = cfg.train_cfg.get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise UserError(f'train_cfg.{key}={value!r} must be a positive whole number')

    parts = {key: cfg.get(key) for key in ('val_dataloader', 'val_evaluator', 'val_cfg')}
    lacking = [key for key, value in parts.items() if value is None]
    if lacking and len(lacking) < len(parts):
        given = [key for key in parts if key not in lacking]
        raise UserError(
            f'{" and ".join(lacking)} of the config is None, but {" and ".join(given)} is not: a '
            'validation needs all three, and a run without one has all None'
        )
    computed = _computed(cfg)
    for setting, name in _awaited(cfg):
        if parts['val_evaluator'] is not None and computed and name not in computed:
            raise UserError(
                f'{setting}={name!r}, but val_evaluator computes {", ".join(computed)}: correct the name, or add it to '
                'val_evaluator.iou_metrics'
            )


def _computed(cfg: Config) -> list[str]:
    """Return the names of the metrics that a validation computes; none if they are not known."""
    evaluator = cfg.get('val_evaluator') or []
    names = []
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        if metric.get('type') not in ('IoUMetric', 'PerClassIoUMetric'):
            return []
        asked = metric.get('iou_metrics', 'mIoU')
        asked = [asked] if isinstance(asked, str) else asked
        if set(asked) - set(FIGURES):
            return []  # the metric says so
        found = ['aAcc', *(name for key in asked for name in FIGURES[key])]
        prefix = f'{metric["prefix"]}/' if metric.get('prefix') else ''
        names += [f'{prefix}{name}' for name in dict.fromkeys(found)]
    return names


def _awaited(cfg: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting, name) for each metric that a hook selects checkpoints by, or stops a run by."""
    best = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('save_best') or []
    for name in [best] if isinstance(best, str) else best:
        if name != 'auto':
            yield 'default_hooks.checkpoint.save_best', name
    for hook in cfg.get('custom_hooks') or []:
        if 'EarlyStoppingHook' in str(hook.get('type')) and hook.get('monitor'):
            yield 'monitor of the EarlyStoppingHook', hook['monitor']
