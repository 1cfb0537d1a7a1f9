"""The recipe's batch on any number of GPUs: an iteration stays an optimizer step."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support import ROOT, TINY_UPERNET

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.batch import effective_batch
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.schedule import count_images
from mmseg_inceptionnext.training.train import apply, train

UPERNET = ROOT / 'configs' / 'upernet' / 'inceptionnext_t.py'


def config(processes: int, per_process: int, monkeypatch) -> Config:
    cfg = Config.fromfile(UPERNET)
    cfg.train_dataloader.batch_size = per_process
    if processes > 1:
        cfg.launcher = 'pytorch'
        monkeypatch.setenv('WORLD_SIZE', str(processes))
    return cfg


@pytest.mark.parametrize(
    ('processes', 'per_process', 'accumulation', 'images_at_once'),
    [(1, 2, 8, 2), (8, 2, 1, 2), (2, 4, 2, 4), (1, 16, 1, 16), (16, 2, 1, 1), (4, 8, 1, 4), (1, 1, 16, 1)],
)
def test_the_recipes_batch_holds(processes, per_process, accumulation, images_at_once, monkeypatch):
    cfg = config(processes, per_process, monkeypatch)
    before = deepcopy(cfg)
    apply(cfg, TrainOptions(auto_batch=True))
    batch = effective_batch(cfg)
    assert (batch.processes, batch.per_process, batch.accumulation) == (processes, images_at_once, accumulation)
    assert batch.images == batch.recipe == 16 and batch.warning is None
    assert cfg.param_scheduler == before.param_scheduler
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 16000)
    assert cfg.default_hooks == before.default_hooks


@pytest.mark.parametrize('auto_batch', [False, True])
def test_epochs_count_the_images_of_an_iteration(auto_batch, tiny_cfg):
    """mmengine counts each part of an accumulated batch as an iteration; the loop of auto_batch does not."""
    tiny_cfg.train_dataloader.batch_size = 2
    tiny_cfg.auto_scale_lr = dict(base_batch_size=8)
    if not auto_batch:
        tiny_cfg.optim_wrapper.accumulative_counts = 4
    images = count_images(tiny_cfg)
    apply(tiny_cfg, TrainOptions(auto_batch=auto_batch, epochs=3))
    assert effective_batch(tiny_cfg).images == 8
    assert tiny_cfg.train_cfg.max_iters == -(-3 * images // (8 if auto_batch else 2))


def test_another_batch_is_said(monkeypatch):
    assert effective_batch(config(8, 2, monkeypatch)).warning is None
    warning = effective_batch(config(4, 2, monkeypatch)).warning
    assert warning.startswith('the effective batch is 8 = 4 × 2 × 1') and 'for 16: --auto-batch' in warning


@pytest.mark.parametrize(
    ('processes', 'per_process', 'change', 'message'),
    [
        (3, 2, {}, '16 cannot be divided by 3 processes'),
        (32, 2, {}, '16 cannot be divided by 32 processes'),
        (1, 3, {}, r'3 at a time: set train_dataloader.batch_size to one of \[1, 2, 4, 8, 16\]'),
        (1, 2, {'auto_scale_lr': None}, 'set auto_scale_lr.base_batch_size'),
        (1, 2, {'optim_wrapper.accumulative_counts': 4}, 'the config has IterBasedTrainLoop and 4'),
        (1, 2, {'train_cfg.type': 'EpochBasedTrainLoop'}, 'the config has EpochBasedTrainLoop and 1'),
    ],
)
def test_batches_that_cannot_be_made(processes, per_process, change, message, monkeypatch):
    cfg = config(processes, per_process, monkeypatch)
    cfg.merge_from_dict(change)
    with pytest.raises(UserError, match=message):
        apply(cfg, TrainOptions(auto_batch=True))


def states(cfg: Config, folder: Path, **changes) -> tuple[dict, dict]:
    cfg = deepcopy(cfg)
    cfg.work_dir = str(folder)
    cfg.merge_from_dict(changes)
    train(cfg, TrainOptions(seed=3, auto_batch='train_dataloader.batch_size' in changes))
    content = read_checkpoint(folder / 'iter_4.pth')
    return content['state_dict'], content['param_schedulers']


def test_accumulated_gradients_train_as_the_whole_batch_does(tiny_cfg, tmp_path):
    """Without batch statistics, dropout and stochastic depth, which depend on the images that go together."""
    tiny_cfg.merge_from_dict({
        'model.backbone.norm_eval': True, 'model.backbone.drop_path_rate': 0.0, 'model.decode_head.dropout_ratio': 0.0,
        'model.neck.norm_cfg': None, 'model.decode_head.norm_cfg': None,
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4, 'default_hooks.checkpoint.interval': 2,
        'auto_scale_lr.base_batch_size': 4,
    })  # fmt: skip
    tiny_cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    tiny_cfg.train_dataloader.batch_size = 4
    whole, schedule = states(tiny_cfg, tmp_path / 'whole')
    parts, same_schedule = states(tiny_cfg, tmp_path / 'parts', **{'train_dataloader.batch_size': 1})
    assert [s['last_step'] for s in schedule] == [s['last_step'] for s in same_schedule]
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6, msg=key)
    untrained, _ = states(tiny_cfg, tmp_path / 'slow', **{'optim_wrapper.optimizer.lr': 0.0})
    assert not torch.allclose(untrained['decode_head.conv_seg.bias'], whole['decode_head.conv_seg.bias'], atol=1e-3)

    resumed = deepcopy(tiny_cfg)
    resumed.work_dir = str(tmp_path / 'parts')
    resumed.train_dataloader.batch_size = 1
    train(resumed, TrainOptions(resume=str(tmp_path / 'parts' / 'iter_2.pth'), auto_batch=True))
    again = read_checkpoint(tmp_path / 'parts' / 'iter_4.pth')['state_dict']
    assert [key for key in parts if not torch.equal(parts[key], again[key])] == []


def test_a_batch_norm_without_statistics_is_said_in_a_line(tmp_path, mini_root):
    """UperNet pools to 1×1, and one image then has one value a channel."""
    cfg = load_config(TINY_UPERNET, tmp_path, mini_root, cfg_options={'train_dataloader.batch_size': 1})
    with pytest.raises(UserError, match='set train_dataloader.batch_size to 2 or more'):
        train(cfg, TrainOptions(weights='none'))
