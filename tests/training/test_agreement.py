"""Settings that contradict each other, and a checkpoint that contradicts the config, are said before a run starts."""

from copy import deepcopy
from pathlib import Path

import pytest

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.labels import check_same_classes
from mmseg_inceptionnext.training import train as train_module
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import check, run_result, train

STOP = dict(type='EarlyStoppingHook', monitor='mFscore')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'default_hooks.checkpoint.save_best': 'mDice'},
            "save_best='mDice', but val_evaluator computes aAcc, mIoU",
        ),
        ({'default_hooks.checkpoint.save_best': ['mIoU', 'mRecall']}, "save_best='mRecall'"),
        ({'custom_hooks': [STOP]}, "monitor of the EarlyStoppingHook='mFscore'"),
        ({'val_evaluator.prefix': 'val'}, "save_best='mIoU', but val_evaluator computes val/aAcc, val/mIoU"),
        ({'val_evaluator': None}, 'val_evaluator of the config is None, but .* is not: a validation needs all three'),
        ({'train_dataloader.num_workers': -1}, 'train_dataloader.num_workers=-1 must be a whole number from 0 on'),
        ({'val_dataloader.batch_size': 0}, 'val_dataloader.batch_size=0 must be a positive whole number'),
    ],
    ids=str,
)
def test_settings(tiny_cfg, changes, message):
    check(deepcopy(tiny_cfg), TrainOptions())
    tiny_cfg.merge_from_dict(changes)
    with pytest.raises(UserError, match=message):
        check(tiny_cfg, TrainOptions())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.decode_head.out_channels': 7}, 'cannot be built; decode_head.py: .*out_channels'),
        ({'model.neck.num_outs': 2}, 'cannot be built; fpn.py: assert'),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_built(tiny_cfg, changes, message):
    tiny_cfg.merge_from_dict(changes)
    with pytest.raises(UserError, match=message):
        train(tiny_cfg, TrainOptions(weights='none'))


def test_the_first_metric_is_named_where_the_config_leaves_it_open(tiny_cfg):
    tiny_cfg.train_cfg.update(max_iters=1, val_interval=1)
    tiny_cfg.default_hooks.checkpoint.save_best = 'auto'
    result = run_result(train(tiny_cfg, TrainOptions(weights='none')))
    assert result['metric'] == 'aAcc' and result['checkpoint'].name == 'best_aAcc_iter_1.pth'


def test_seed_and_averages_of_the_checkpoint(tiny_cfg, monkeypatch):
    said = []
    monkeypatch.setattr(train_module, 'say', lambda text, *_: said.append(text))
    train(deepcopy(tiny_cfg), TrainOptions(weights='none', seed=3, ema=True))
    said.clear()
    train(deepcopy(tiny_cfg), TrainOptions(weights='none', seed=4, resume=str(Path(tiny_cfg.work_dir) / 'iter_3.pth')))
    assert any('seed 3 of the checkpoint holds, not 4' in line for line in said)
    assert any('averaged weights' in line and '--ema' in line for line in said)


def test_classes_in_another_order(tiny_cfg, trained):
    """As many, but each of them is another: every figure would be of the wrong class."""
    content = read_checkpoint(trained)
    names = list(content['meta']['dataset_meta']['classes'])
    check_same_classes(content, trained, names)
    check_same_classes(content, trained, [*names[:-1], 'something else'])  # a warning
    order = [names[1], names[0], *names[2:]]
    with pytest.raises(UserError, match="'wall' is 'building' here, and all are in another order"):
        check_same_classes(content, trained, order)
    tiny_cfg.test_dataloader.dataset.metainfo = dict(classes=order)
    with pytest.raises(UserError, match='in another order'):
        evaluate(tiny_cfg, trained)
