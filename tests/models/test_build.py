"""One function makes a segmentor of a config."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from support import ROOT, TINY_CONFIG, TINY_UPERNET

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.models.build import build_segmentor


@pytest.mark.parametrize('path', [TINY_CONFIG, TINY_UPERNET], ids=lambda path: path.stem)
def test_sync_bn_becomes_bn_and_the_config_stays(path):
    cfg = Config.fromfile(path)
    assert 'norm_cfg' not in cfg.model.backbone  # whose own default is SyncBN, too
    before = copy.deepcopy(cfg)
    model = build_segmentor(cfg)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()) > 10
    assert cfg.to_dict() == before.to_dict()


def test_a_checkpoint_is_loaded_whole_or_not_at_all(trained):
    model = build_segmentor(Config.fromfile(TINY_CONFIG), trained)
    for name, tensor in read_checkpoint(trained)['state_dict'].items():
        assert torch.equal(model.state_dict()[name], tensor)
    with pytest.raises(UserError, match='does not fit the config'):
        build_segmentor(Config.fromfile(TINY_UPERNET), trained)


def test_nothing_else_in_the_package_builds_one():
    calls = [
        path.name
        for path in (ROOT / 'mmseg_inceptionnext').rglob('*.py')
        if re.search(r'MODELS\.build\(|build_segmentor\(cfg\.model', path.read_text())
    ]
    assert calls == ['build.py']
