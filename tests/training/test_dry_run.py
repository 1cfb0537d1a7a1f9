"""What a run will do, before it does it."""

from copy import deepcopy
from pathlib import Path

import pytest

from mmseg_inceptionnext.training.batch import EffectiveBatch
from mmseg_inceptionnext.training.dry_run import Plan
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import plan, train


def test_the_schedule_of_a_config_and_nothing_written(tiny_cfg):
    tiny_cfg.train_cfg.update(max_iters=100, val_interval=30)
    resolved = plan(tiny_cfg, TrainOptions(weights='none'))
    assert (resolved.iterations, resolved.done, resolved.images_seen) == (100, 0, 200)
    assert (resolved.training_images, resolved.validation_images, resolved.validations) == (4, 2, 4)
    assert resolved.lr == [0.002] and resolved.schedulers == ['LinearLR 0–50', 'PolyLR 50–600']
    assert resolved.batch.images == 2 and resolved.batch.recipe == 8
    assert 0 < resolved.seconds_per_iteration < 10 and resolved.seconds > 99 * resolved.seconds_per_iteration
    text = str(resolved)
    assert '200, 50.0 epochs of 4' in text and '--auto-batch keeps it' in text
    assert not Path(tiny_cfg.work_dir).exists() or list(Path(tiny_cfg.work_dir).iterdir()) == []


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


@pytest.mark.parametrize(('done', 'iterations', 'expected'), [(0, 160, 10), (0, 161, 11), (32, 160, 8), (40, 160, 8)])
def test_validations_are_counted_as_mmengine_does(done, iterations, expected):
    """Every 16 iterations and after the last."""
    made = Plan(1, EffectiveBatch(2, 1, 1, None), iterations, done, 5, 7, [1.0], [], 16, 1.0, 2.0, 0.0, 'cpu')
    assert made.validations == expected
    assert made.seconds == iterations - done + expected * 7 * 2 / 2
