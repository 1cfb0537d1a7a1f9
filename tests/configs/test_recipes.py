"""The recipes on two real ADE20K pairs, where these are beside the checkout."""

import copy
import math

import pytest
import torch
from mmseg.registry import MODELS
from support import ROOT

from mmseg_inceptionnext import optimize_for_inference
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.mini_ade20k import make_mini_ade20k
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train


@pytest.mark.slow
def test_upernet_t_takes_one_step(ade20k_sample, tmp_path):
    """The paper's own config at its crop and batch size: forward, backward, optimizer, and a validation."""
    cfg = load_config(ROOT / 'configs/upernet/inceptionnext_t.py', work_dir=tmp_path, data_root=ade20k_sample)
    cfg.train_cfg.max_iters = 1
    runner = train(cfg, TrainOptions(weights='none', seed=0))
    assert runner.iter == 1
    loss = runner.message_hub.get_scalar('train/decode.loss_ce').current()
    assert loss == pytest.approx(math.log(150), abs=0.7)  # of an untrained classifier
    moments = runner.optim_wrapper.optimizer.state
    assert [name for name, p in runner.model.named_parameters() if not moments[p]['exp_avg'].any()] == []
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() < 5


@pytest.mark.slow
def test_the_mini_config_overfits(ade20k_sample, tmp_path):
    cfg = load_config(ROOT / 'configs/mini/fpn_inceptionnext_a.py', work_dir=tmp_path, data_root=ade20k_sample)
    cfg.merge_from_dict({'train_cfg.max_iters': 400, 'train_cfg.val_interval': 400, 'param_scheduler.1.end': 400})
    train(cfg, TrainOptions(weights='none', seed=0))
    assert evaluate(cfg, tmp_path / 'iter_400.pth')['aAcc'] > 90


@pytest.mark.slow
def test_all_forms_of_a_trained_upernet_agree_on_every_pixel(tmp_path):
    """Trained with our head, read into mmseg's, optimised: on the validation scenes of the embedded data set."""
    make_mini_ade20k(tmp_path / 'data', train=16, val=8, size=256)
    cfg = load_config(
        ROOT / 'configs/mini/upernet_inceptionnext_a.py', work_dir=tmp_path, data_root=tmp_path / 'data',
        cfg_options={'train_cfg.max_iters': 100, 'train_cfg.val_interval': 100, 'param_scheduler.1.end': 100},
    )  # fmt: skip
    runner = train(cfg, TrainOptions(weights='none', seed=0))
    late = runner.model.eval()
    plain_cfg = copy.deepcopy(cfg.model)
    plain_cfg.decode_head.type = 'UPerHead'
    plain = MODELS.build(plain_cfg).eval()
    plain.load_state_dict(late.state_dict(), strict=True)
    fast = optimize_for_inference(late)
    classes = set()
    for data in runner.val_dataloader:
        with torch.no_grad():
            expected, *others = (copy.deepcopy(model.test_step(data)) for model in (plain, late, fast))
        for samples in others:
            for sample, wanted in zip(samples, expected, strict=True):
                assert torch.equal(sample.pred_sem_seg.data, wanted.pred_sem_seg.data)
                classes |= set(sample.pred_sem_seg.data.unique().tolist())
    assert len(classes) > 5
