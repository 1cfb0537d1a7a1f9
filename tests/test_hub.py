"""Shipped configs and their models by name, through mmengine and through the package."""

from pathlib import Path

import mmengine.hub
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from support import ROOT, TINY_CONFIG
from torch import nn

from mmseg_inceptionnext import UserError, get_config, get_model
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

NAME = 'mmseg_inceptionnext::upernet/inceptionnext_t.py'


def test_mmengine_finds_the_configs_that_the_package_finds():
    file = ROOT / 'configs' / 'upernet' / 'inceptionnext_t.py'
    for cfg in (get_config('upernet/inceptionnext_t'), mmengine.hub.get_config(NAME)):
        assert Path(cfg.filename).resolve() == file
        assert cfg.to_dict() == Config.fromfile(file).to_dict()


def test_a_config_that_inherits_by_name_builds_the_same_model(tmp_path):
    (tmp_path / 'own.py').write_text(f"_base_ = '{NAME}'\nmodel = dict(decode_head=dict(num_classes=7))\n")
    model = MODELS.build(Config.fromfile(tmp_path / 'own.py').model)
    expected = MODELS.build(get_config('upernet/inceptionnext_t').model)
    assert model.decode_head.conv_seg.out_channels == 7
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if 'conv_seg' not in key}
    assert shapes == {k: tensor.shape for k, tensor in expected.state_dict().items() if 'conv_seg' not in k}


def test_a_config_that_inherits_by_name_trains(tmp_path, mini_root):
    """Every part of a run is built from dicts of the scope that mmengine has put into them."""
    (tmp_path / 'own.py').write_text(
        "_base_ = 'mmseg_inceptionnext::mini/fpn_inceptionnext_a.py'\n"
        'train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)\n'
        'train_cfg = dict(max_iters=2, val_interval=2)\n'
    )
    runner = train(load_config(tmp_path / 'own.py', tmp_path / 'work', mini_root), TrainOptions(weights='none', seed=0))
    assert runner.iter == 2 and (tmp_path / 'work' / 'iter_2.pth').is_file()
    assert list((tmp_path / 'work').glob('best_mIoU_*.pth'))


def test_get_model_holds_the_weights_of_a_checkpoint(trained):
    model = get_model(TINY_CONFIG, trained, device='cpu')
    assert not model.training
    saved = torch.load(trained, weights_only=False)['state_dict']
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[key], rtol=0, atol=0)


def test_get_model_without_a_checkpoint_trains_in_one_process():
    """SyncBN would refuse."""
    model = get_model('mini/fpn_inceptionnext_a', device='cpu').train()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    sum(output.mean() for output in [model(torch.rand(2, 3, 64, 64), mode='tensor')]).backward()


def test_mistakes_are_named(trained, tmp_path):
    with pytest.raises(UserError, match='no config at'):
        get_config('upernet/nothing')
    with pytest.raises(UserError, match='no checkpoint at'):
        get_model(TINY_CONFIG, tmp_path / 'none.pth', 'cpu')
    with pytest.raises(UserError, match="device='abacus' cannot be used here"):
        get_model(TINY_CONFIG, trained, 'abacus')
    with pytest.raises(UserError, match='does not fit'):
        get_model('mini/upernet_inceptionnext_a', trained, 'cpu')
