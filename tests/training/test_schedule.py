"""The length of a run, and what follows from it."""

from copy import deepcopy

import pytest
from support import TINY_CONFIG

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.config_files import read_config
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.schedule import (
    schedule_text,
    schedule_warning,
    set_iterations,
    stretch_ends,
    stretch_schedule,
)
from mmseg_inceptionnext.training.train import plan


def test_warm_up_decay_checkpoints_and_validations_follow():
    cfg = read_config('upernet/inceptionnext_t')
    stretch_schedule(cfg, 1600)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (1600, 160)
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [(0, 15), (15, 1600)]
    assert cfg.default_hooks.checkpoint.interval == 40


def test_a_schedule_of_other_kinds():
    cfg = read_config('fpn/inceptionnext_t')
    cfg.param_scheduler = [
        dict(type='MultiStepLR', by_epoch=False, milestones=[20000, 30000]),
        dict(type='CosineAnnealingLR', by_epoch=False, T_max=40000),
        dict(type='StepLR', by_epoch=True, step_size=3),
        dict(type='CosineRestartLR', by_epoch=False, begin=1000, periods=[29000, 10000], restart_weights=[1, 0.7]),
    ]
    cfg.train_cfg.update(val_begin=4000, dynamic_intervals=[(20000, 1000)])
    stretch_schedule(cfg, 4000)
    steps, cosine, epochs, restarts = cfg.param_scheduler
    assert (steps.milestones, cosine.T_max, epochs.step_size) == ([2000, 3000], 4000, 3)
    assert (restarts.begin, restarts.periods) == (100, [2900, 1000])
    assert (cfg.train_cfg.val_begin, cfg.train_cfg.dynamic_intervals) == (400, [(2000, 100)])


def test_a_run_longer_than_its_restarts_is_told(tiny_cfg):
    restarts = dict(type='CosineRestartLR', by_epoch=False, begin=2, periods=[5, 3], restart_weights=[1, 1], eta_min=0)
    tiny_cfg.param_scheduler = [dict(type='LinearLR', by_epoch=False, end=2), restarts]
    tiny_cfg.train_cfg.max_iters = 10
    assert schedule_warning(tiny_cfg) == ''
    tiny_cfg.train_cfg.max_iters = 20
    assert 'ends at iteration 10 of 20' in schedule_warning(tiny_cfg)
    stretch_schedule(tiny_cfg, 40)
    assert schedule_text(tiny_cfg.param_scheduler) == 'LinearLR 0–4, CosineRestartLR 4–20'


@pytest.mark.parametrize('iterations', [7, 100, 333, 12345])
def test_many_restarts_end_with_the_run(tiny_cfg, iterations):
    tiny_cfg.param_scheduler = [dict(type='CosineRestartLR', by_epoch=False, begin=30, periods=[197] * 10)]
    tiny_cfg.train_cfg.max_iters = 2000
    stretch_schedule(tiny_cfg, iterations)
    assert schedule_text(tiny_cfg.param_scheduler).endswith(f'–{iterations}')


def test_a_resumed_run_of_more_iterations_prolongs_the_last_restart(tiny_cfg):
    tiny_cfg.param_scheduler = [dict(type='CosineRestartLR', by_epoch=False, begin=2, periods=[5, 3])]
    tiny_cfg.train_cfg.max_iters = 20
    stretch_ends(tiny_cfg, 10)
    assert tiny_cfg.param_scheduler[0].periods == [5, 13]


def test_a_resumed_run_leaves_the_schedule_of_a_longer_one_as_it_is(tiny_cfg):
    """What lies at the shorter run's last iteration is a boundary of its own then."""
    for schedule in (
        [dict(type='MultiStepLR', by_epoch=False, milestones=[20, 30])],
        [dict(type='LinearLR', by_epoch=False, begin=0, end=20), dict(type='PolyLR', by_epoch=False, begin=20, end=40)],
    ):
        tiny_cfg.param_scheduler, tiny_cfg.train_cfg.max_iters = deepcopy(schedule), 40
        stretch_ends(tiny_cfg, 20)
        assert tiny_cfg.param_scheduler == schedule


def test_a_schedule_longer_than_the_run_is_told(tiny_cfg):
    tiny_cfg.param_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=40)]
    tiny_cfg.train_cfg.max_iters = 30
    assert 'ends at iteration 40, the run at 30' in schedule_warning(tiny_cfg)
    tiny_cfg.train_cfg.max_iters = 40
    assert schedule_warning(tiny_cfg) == ''


@pytest.mark.parametrize(('option', 'ends'), [('power', (15, 1600)), ('eta_min', (15, 1600)), ('end', (1500, 160000))])
def test_a_factor_of_a_scheduler_leaves_its_iterations_to_follow(tmp_path, option, ends):
    given = {f'param_scheduler.1.{option}': 160000 if option == 'end' else 0.5}
    cfg = load_config('upernet/inceptionnext_t', tmp_path, cfg_options=given)
    set_iterations(cfg, TrainOptions(iters=1600))
    assert (cfg.param_scheduler[0].end, cfg.param_scheduler[1].end) == ends
    assert cfg.param_scheduler[1][option] == given[f'param_scheduler.1.{option}']


def test_epochs_are_counted_in_images(tiny_cfg):
    set_iterations(tiny_cfg, TrainOptions(epochs=10))  # 4 images, 2 at a time
    assert tiny_cfg.train_cfg.max_iters == 20
    set_iterations(tiny_cfg, TrainOptions(iters=7))
    assert tiny_cfg.train_cfg.max_iters == 7


def test_a_data_file_sets_the_recipes_epochs(tiny_cfg):
    """Not less than a thousand iterations, and not more than the recipe has."""
    tiny_cfg.train_cfg.max_iters, tiny_cfg.epochs = 40000, 63
    set_iterations(tiny_cfg, TrainOptions())
    assert tiny_cfg.train_cfg.max_iters == 1000 and 'epochs' not in tiny_cfg
    tiny_cfg.train_cfg.max_iters, tiny_cfg.epochs = 40000, 10**6
    set_iterations(tiny_cfg, TrainOptions())
    assert tiny_cfg.train_cfg.max_iters == 40000


def test_what_the_options_set_stays(tmp_path, mini_root):
    given = {'train_cfg.val_interval': 7, 'default_hooks.checkpoint.interval': 9}
    cfg = load_config(TINY_CONFIG, tmp_path, mini_root, cfg_options=given)
    set_iterations(cfg, TrainOptions(iters=60))
    assert (cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval) == (7, 9)
    assert 'kept_by_iters' not in cfg


def test_what_a_config_sets_without_the_iterations_stays(tmp_path):
    """Otherwise it is made for the config's iterations, and keeps its share of them."""
    for setting, interval in (('val_interval=50', 50), ('max_iters=100, val_interval=50', 30)):
        (tmp_path / 'own.py').write_text(
            f"_base_ = 'mmseg_inceptionnext::fpn/inceptionnext_t.py'\ntrain_cfg = dict({setting})\n"
        )
        cfg = read_config(tmp_path / 'own.py')
        set_iterations(cfg, TrainOptions(iters=60))
        assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (60, interval)


def test_the_dry_run_shows_it(tmp_path, mini_root):
    cfg = load_config(TINY_CONFIG, tmp_path, mini_root)
    resolved = plan(cfg, TrainOptions(weights='none', epochs=5))
    assert resolved.iterations == 10 and 'iterations       10\n' in str(resolved)


@pytest.mark.parametrize('options', [dict(epochs=0), dict(iters=-1), dict(epochs=1, iters=1), dict(early_stop=0)])
def test_what_does_not_go_together(tiny_cfg, options):
    with pytest.raises(UserError, match=next(iter(options))):
        plan(tiny_cfg, TrainOptions(**options))
