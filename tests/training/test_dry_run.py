"""What a run will do, before it does it."""

from copy import deepcopy
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from mmseg_inceptionnext.training.batch import EffectiveBatch
from mmseg_inceptionnext.training.dry_run import Plan
from mmseg_inceptionnext.training.loops import validations_left
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.runner import SafeRunner
from mmseg_inceptionnext.training.train import plan, train


@pytest.mark.slow
def test_the_schedule_of_a_config_and_nothing_written(tiny_cfg):
    tiny_cfg.train_cfg.update(max_iters=100, val_interval=30)
    resolved = plan(tiny_cfg, TrainOptions(weights='none'))
    assert (resolved.iterations, resolved.done, resolved.images_seen) == (100, 0, 200)
    assert (resolved.training_images, resolved.validation_images, resolved.validations) == (4, 2, 4)
    assert resolved.lr == [0.002] and resolved.schedule == 'LinearLR 0–50, PolyLR 50–600'
    assert resolved.batch.images == 2 and resolved.batch.recipe == 8
    assert 0 < resolved.seconds_per_iteration < 10 and resolved.seconds > 99 * resolved.seconds_per_iteration
    text = str(resolved)
    assert '200, 50.0 epochs of 4' in text and '--auto-batch keeps it' in text
    assert not Path(tiny_cfg.work_dir).exists() or list(Path(tiny_cfg.work_dir).iterdir()) == []


@pytest.mark.slow
def test_with_auto_batch_and_resumed(tiny_cfg):
    whole = deepcopy(tiny_cfg)
    whole.train_cfg.max_iters = 3
    train(whole, TrainOptions(seed=0, auto_batch=True))
    resolved = plan(deepcopy(tiny_cfg), TrainOptions(resume=str(Path(whole.work_dir) / 'iter_3.pth'), auto_batch=True))
    assert (resolved.done, resolved.iterations, resolved.batch.images) == (3, 6, 8)
    assert (resolved.batch.per_process, resolved.batch.accumulation) == (2, 4)
    assert resolved.validations == 1 and 'warning' not in str(resolved)
    tiny_cfg.train_cfg.update(max_iters=3, val_interval=1)
    over = plan(tiny_cfg, TrainOptions(resume=str(Path(whole.work_dir) / 'iter_3.pth'), auto_batch=True))
    assert over.seconds is None and 'nothing is left to train' in str(over)


def test_a_config_without_validation(tiny_cfg):
    tiny_cfg.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    resolved = plan(tiny_cfg)
    assert resolved.validations == 0 and 'none' in str(resolved)


@pytest.mark.parametrize(
    ('done', 'changes', 'expected'),
    [(0, dict(max_iters=160), 10), (0, dict(max_iters=161), 11), (32, dict(max_iters=160), 8),
     (40, dict(max_iters=160), 8), (0, dict(max_iters=160, val_begin=100), 4),
     (0, dict(max_iters=100, dynamic_intervals=[(50, 10)]), 9)],
)  # fmt: skip
def test_validations_are_those_of_mmengines_loop(tiny_cfg, monkeypatch, done, changes, expected):
    """Every 16 iterations, with the exceptions of the config, and after the last: counted, and run without training."""
    tiny_cfg.train_cfg.update(dict(val_interval=16, **changes))
    runner = SafeRunner.from_cfg(tiny_cfg)
    loop = runner.build_train_loop(runner._train_loop)
    loop._iter = done
    assert validations_left(loop) == expected and loop.iter == done
    ran = []
    monkeypatch.setattr(loop, 'run_iter', lambda batch: setattr(loop, '_iter', loop._iter + 1))
    loop.dataloader_iterator = MagicMock()
    loop.dataloader_iterator.__next__ = lambda _: {}
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    monkeypatch.setattr(runner._val_loop, 'run', lambda: ran.append(loop.iter))
    monkeypatch.setattr(runner, 'call_hook', lambda *_, **__: None)
    loop.run()
    assert len(ran) == expected


def test_the_time_of_what_is_left():
    made = Plan(1, EffectiveBatch(2, 1, 1, None, 2), 160, 40, 5, 7, [1.0], '', 8, 1.0, 2.0, 0.0, 'cpu')
    assert made.seconds == 120 + 8 * 7 * 2 / 2
