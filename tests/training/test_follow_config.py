"""A resumed run has the rates that its config says, and the user is told what differs from the run before."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mmseg_inceptionnext.training import train as train_module
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import plan, train

RATES: dict[int, float] = {}


@HOOKS.register_module(force=True)
class RecordRatesHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        group = runner.optim_wrapper.param_groups[0]
        RATES[batch_idx] = (group['lr'], group['weight_decay'])


@pytest.fixture
def cfg(tiny_cfg):
    """Six iterations: two of warm-up, then a decay to 0."""
    tiny_cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
        dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=2, end=6),
    ]
    tiny_cfg.custom_hooks = [*tiny_cfg.get('custom_hooks', []), dict(type='RecordRatesHook')]
    tiny_cfg.merge_from_dict({'model.backbone.init_cfg': None, 'optim_wrapper.optimizer.lr': 0.01})
    return tiny_cfg


@pytest.fixture
def said(monkeypatch):
    """What the user is told."""
    lines = []
    for module in (train_module, 'runner', 'schedule'):
        name = module if isinstance(module, str) else 'train'
        monkeypatch.setattr(f'mmseg_inceptionnext.training.{name}.say', lambda text, *_: lines.append(text))
    return lines


def rates_of(cfg, **options) -> dict[int, tuple]:
    RATES.clear()
    train(cfg, TrainOptions(seed=0, **options))
    return dict(RATES)


def changed(cfg, **changes):
    cfg = deepcopy(cfg)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return cfg


LONGER = dict(train_cfg__max_iters=12)
CASES = {
    'longer': (LONGER, ['train_cfg.max_iters=6', '12', 'PolyLR 2–6', 'PolyLR 2–12']),
    'rate': (dict(optim_wrapper__optimizer__lr=0.05), ['optim_wrapper.optimizer.lr=0.01', '0.05']),
    'decay': (dict(optim_wrapper__optimizer__weight_decay=0.3), ['optim_wrapper.optimizer.weight_decay=', '0.3']),
    'another schedule': (
        dict(param_scheduler=[dict(type='CosineAnnealingLR', T_max=6, by_epoch=False, end=6)]),
        ['PolyLR 2–6', 'CosineAnnealingLR 0–6'],
    ),
    'batch': (dict(train_dataloader__batch_size=1), ['train_dataloader.batch_size=2', '1']),
}


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=[] if case == 'rate' else pytest.mark.slow) for case in CASES]
)
def test_rates_are_those_of_a_run_that_began_with_the_config(cfg, said, case):
    changes, parts = CASES[case]
    first = rates_of(deepcopy(cfg))
    assert first[5][0] < first[2][0] == pytest.approx(0.01)
    checkpoint = str(Path(cfg.work_dir) / 'iter_3.pth')

    now = changed(cfg, **changes)
    if case == 'longer':
        whole = changed(now, work_dir=f'{cfg.work_dir}_whole')
        whole.param_scheduler[1].end = 12
    else:
        whole = changed(now, work_dir=f'{cfg.work_dir}_whole')
    expected = rates_of(whole)
    assert expected[3] != first[3] or case == 'batch'
    said.clear()
    assert rates_of(deepcopy(now), resume=checkpoint) == {i: rate for i, rate in expected.items() if i >= 3}
    (line,) = [line for line in said if 'The run that saved the checkpoint had' in line]
    for part in parts:
        assert part in line
    assert 'From iteration 3 on' in line


@pytest.mark.slow
def test_nothing_is_said_where_nothing_differs(cfg, said):
    rates_of(deepcopy(cfg))
    again = rates_of(deepcopy(cfg), resume=str(Path(cfg.work_dir) / 'iter_3.pth'))
    assert list(again) == [3, 4, 5] and not [line for line in said if 'saved the checkpoint' in line]


@pytest.mark.slow
def test_the_dry_run_shows_what_will_be(cfg):
    rates_of(deepcopy(cfg))
    now = changed(cfg, optim_wrapper__optimizer__lr=0.05, **LONGER)
    text = str(plan(now, TrainOptions(resume=str(Path(cfg.work_dir) / 'iter_3.pth'))))
    assert 'learning rate    0.05; LinearLR 0–2, PolyLR 2–12' in text and '12, 3 of them done' in text


@pytest.mark.slow
def test_iters_stretches_all_of_the_schedule(cfg):
    rates_of(deepcopy(cfg))
    expected = rates_of(changed(cfg, work_dir=f'{cfg.work_dir}_whole'), iters=12)
    found = rates_of(deepcopy(cfg), iters=12, resume=str(Path(cfg.work_dir) / 'iter_3.pth'))
    assert found == {i: rate for i, rate in expected.items() if i >= 3}


def test_a_schedule_that_ends_before_the_run_is_a_warning(cfg, said):
    rates_of(changed(cfg, train_cfg__max_iters=8))
    assert [line for line in said if line.startswith('param_scheduler ends at iteration 6 of 8')]


def test_a_config_in_a_checkpoint_is_not_run(cfg, said, tmp_path):
    """Its text is a program: what is more than a literal is left out."""
    rates_of(deepcopy(cfg))
    path = Path(cfg.work_dir) / 'iter_3.pth'
    checkpoint = torch.load(path, weights_only=False)
    bad = tmp_path / 'ran'
    checkpoint['meta']['cfg'] = f"model = open({str(bad)!r}, 'w')\ntrain_cfg = dict(max_iters=7)\n"
    torch.save(checkpoint, path)
    rates_of(deepcopy(cfg), resume=str(path))
    assert not bad.exists() and any('train_cfg.max_iters=7' in line for line in said)


@pytest.mark.slow
def test_a_momentum_that_is_scheduled_goes_on_exactly(cfg):
    """With Adam it is the first of the betas, which the checkpoint brings, and which the config's would replace."""
    cfg.param_scheduler = [
        dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, begin=0, end=6),
        dict(type='PolyLR', eta_min=0.0, by_epoch=False, begin=0, end=6),
    ]
    betas = []
    for options in ({}, dict(resume=str(Path(cfg.work_dir) / 'iter_3.pth'))):
        for lr in (0.01, 0.02) if options else (0.01,):
            runner = train(changed(cfg, optim_wrapper__optimizer__lr=lr), TrainOptions(seed=0, **options))
            group = runner.optim_wrapper.param_groups[0]
            betas.append((group['betas'], group['momentum']))
    assert len(set(betas)) == 1 and betas[0][0][0] > 0.8
