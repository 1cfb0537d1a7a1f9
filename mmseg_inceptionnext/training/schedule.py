"""Change the number of iterations of a run, and all that depends on it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmseg_inceptionnext.config_files import (
    SCHEDULE_KEYS,
    SCHEDULER_COUNTS,
    dotted_keys,
    is_classifier,
    own_settings,
    read_config,
)
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.data.pipeline import leaf_datasets
from mmseg_inceptionnext.training.batch import effective_batch
from mmseg_inceptionnext.training.options import TrainOptions

_FEWEST_ITERATIONS = 1000  # of a run whose length follows from its data


def set_iterations(cfg: Config, options: TrainOptions) -> None:
    """Set the number of iterations that options or a data file ask for, in place; it needs the effective batch."""
    from_data, kept = cfg.pop('epochs', None), cfg.pop('kept_by_iters', [])
    epochs = options.epochs or from_data
    if not options.iters and not epochs:
        return
    own = dotted_keys(own_settings(read_config(cfg.filename)))
    if 'train_cfg.max_iters' not in own:  # otherwise the intervals are made for that, and follow
        kept = [*kept, *(own & set(SCHEDULE_KEYS))]
    if options.iters:
        stretch_schedule(cfg, options.iters, kept)
    else:
        images, batch = count_images(cfg), effective_batch(cfg).per_iteration
        iterations = math.ceil(epochs * images / batch)
        if not options.epochs:
            iterations = min(max(iterations, _FEWEST_ITERATIONS), cfg.train_cfg.max_iters)
        stretch_schedule(cfg, iterations, kept)
        say(f'{iterations} iterations of {batch} images: {iterations * batch / images:.0f} epochs')


def count_images(cfg: Config) -> int:
    """Count the training images of a config."""
    leaves = leaf_datasets(cfg.train_dataloader.dataset)
    if is_classifier(cfg):
        init_default_scope(cfg.default_scope)
        return sum(len(DATASETS.build(dict(leaf, pipeline=[]))) for leaf in leaves)
    return sum(len(list_samples(open_dataset(leaf))) for leaf in leaves)


def stretch_schedule(cfg: Config, iterations: int, kept: Sequence[str] = ()) -> None:
    """Set the number of iterations, in place; warm-up, decay, checkpoints and validations keep their share of them.

    Args:
        cfg: A whole config.
        iterations: The number of iterations.
        kept: Those of :data:`~mmseg_inceptionnext.config_files.SCHEDULE_KEYS` that stay as they are.
    """
    ratio = iterations / cfg.train_cfg.max_iters
    last = cfg.train_cfg.max_iters
    cfg.train_cfg.max_iters = iterations

    def stretched(count: int) -> int:
        return iterations if count == last else math.ceil(count * ratio)

    if 'param_scheduler' not in kept:
        _change_counts(cfg, stretched)
    for where in set(SCHEDULE_KEYS) - {'param_scheduler', *kept}:
        *sections, key = where.split('.')
        section = functools.reduce(lambda found, name: found.get(name) or {}, sections, cfg)
        if isinstance(section.get(key), int) and section[key] > 0:
            section[key] = max(1, stretched(section[key]))
    if cfg.train_cfg.get('val_begin'):
        cfg.train_cfg.val_begin = max(1, stretched(cfg.train_cfg.val_begin))
    if cfg.train_cfg.get('dynamic_intervals'):
        cfg.train_cfg.dynamic_intervals = [
            (stretched(begin), max(1, stretched(interval))) for begin, interval in cfg.train_cfg.dynamic_intervals
        ]


def stretch_ends(cfg: Config, last: int) -> None:
    """Let schedulers that end with the last iteration of a shorter run end with this one's, in place."""
    if last >= cfg.train_cfg.max_iters:
        return
    counts: list[int] = []
    _change_counts(cfg, lambda count: counts.append(count) or count)
    if any(count > last for count in counts):  # it is a longer run's
        return
    before = schedule_text(cfg.get('param_scheduler'))
    _change_counts(cfg, lambda count: cfg.train_cfg.max_iters if count == last else count)
    if schedule_text(cfg.get('param_scheduler')) != before:
        say(f'param_scheduler is stretched to the {cfg.train_cfg.max_iters} iterations of this run, from {last}')


def schedule_warning(cfg: Config) -> str:
    """Say that one of the schedulers ends after the run, or that all end before; an empty string if not."""
    ends = [_end(scheduler) for scheduler in _schedulers(cfg.get('param_scheduler'))]
    last = cfg.train_cfg.get('max_iters')
    if late := [end for end in ends if isinstance(end, int) and last and end > last]:
        return (
            f'param_scheduler ends at iteration {max(late)}, the run at {last}: the learning rate does not come to its '
            'end (`--iters N`, in the place of train_cfg.max_iters, shrinks it)'
        )
    if not ends or not last or not all(isinstance(end, int) and end < last for end in ends):
        return ''
    return (
        f'param_scheduler ends at iteration {max(ends)} of {last}: from there on, the learning rate stays as it is '
        'then (`--iters N`, in the place of train_cfg.max_iters, stretches it)'
    )


def schedule_text(schedulers: dict | Sequence[dict] | None) -> str:
    """Describe parameter schedulers: types, and the iterations that they begin and end with."""
    parts = [f'{s["type"]} {s.get("begin", 0)}–{_end(s)}' for s in _schedulers(schedulers)]
    return ', '.join(parts) or 'none'


def _schedulers(schedulers: dict | Sequence[dict] | None) -> Sequence[dict]:
    return [schedulers] if isinstance(schedulers, dict) else schedulers or []


def _end(scheduler: dict) -> int | str:
    """Where a parameter scheduler ends; an empty string if it goes on as long as the run."""
    ends = [scheduler['end']] if 'end' in scheduler else []
    if 'periods' in scheduler:  # CosineRestartLR changes nothing after them
        ends.append(scheduler.get('begin', 0) + sum(scheduler['periods']))
    return min(ends, default='')


def _change_counts(cfg: Config, change: Callable[[int], int]) -> None:
    """Apply a function to every number of iterations in the parameter schedulers of a config, in place."""
    for scheduler in _schedulers(cfg.get('param_scheduler')):
        if scheduler.get('by_epoch', True):
            continue
        if 'periods' in scheduler:  # where each ends is what counts: rounded one by one, they would add up to more
            ends = itertools.accumulate(scheduler['periods'], initial=scheduler.get('begin', 0))
            scheduler['periods'] = [end - begin for begin, end in itertools.pairwise(map(change, ends))]
        for key in set(SCHEDULER_COUNTS) - {'periods'}:
            value = scheduler.get(key)
            if isinstance(value, (list, tuple)):
                scheduler[key] = [change(count) for count in value]
            elif isinstance(value, int):
                scheduler[key] = change(value)
