"""The recipe for CamVid on its photographs, where these are beside the checkout."""

import pytest
from support import ROOT

from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train


@pytest.mark.slow
def test_a_hundred_steps_learn_what_no_untrained_or_miscoded_model_knows(tmp_path):
    source = ROOT.parent / 'shared' / 'camvid'
    if not source.is_dir():
        pytest.skip('CamVid is not beside this checkout')
    for split, number in (('train', 96), ('val', 24)):
        for folder in (split, f'{split}annot'):
            (tmp_path / 'camvid' / folder).mkdir(parents=True)
            files = sorted((source / folder).iterdir())
            for path in files[:: len(files) // number][:number]:
                (tmp_path / 'camvid' / folder / path.name).symlink_to(path)
    cfg = load_config('camvid/fpn_a_half', tmp_path / 'work', data_root=tmp_path / 'camvid')
    cfg.test_dataloader = cfg.val_dataloader
    options = TrainOptions(iters=100, weights='none', seed=0, ema=True)
    train(cfg, options)
    metrics = evaluate(cfg, tmp_path / 'work' / 'iter_100.pth')
    # 20.3 and 59.3 were measured. One class everywhere has at most 3 and 30.
    assert metrics['mIoU'] > 15 and metrics['aAcc'] > 50
