import pickle
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmseg.registry import DATASETS, HOOKS
from PIL import Image
from support import TINY_CONFIG, variant
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmseg_inceptionnext import SafeCheckpointHook, TolerantValLoop, UserError, ValidationSamplesHook
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.mixed_precision import amp_optim_wrapper
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.reproducible import ReproducibleInfiniteSampler, SampleDraw, SeedAugmentation
from mmseg_inceptionnext.training.resume import belongs_to
from mmseg_inceptionnext.training.train import plan, run_result, train


def state_of(work_dir: Path, iteration: int) -> dict:
    return read_checkpoint(work_dir / f'iter_{iteration}.pth')['state_dict']


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny_cfg, tmp_path):
    """Bit for bit, with random augmentation, dropout and stochastic depth, and whatever the number of workers."""
    train(variant(tiny_cfg, tmp_path / 'whole', **{'train_dataloader.num_workers': 2}), TrainOptions(seed=5))
    train(variant(tiny_cfg, tmp_path / 'parts', **{'train_cfg.max_iters': 3}), TrainOptions(seed=5))
    resumed = variant(tiny_cfg, tmp_path / 'parts', **{'train_dataloader.num_workers': 1})
    resumed.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='https://not.reached/again.pth')
    train(resumed, TrainOptions(resume=True))  # the seed comes from the checkpoint
    assert_equal_states(state_of(tmp_path / 'parts', 6), state_of(tmp_path / 'whole', 6))
    other = train(variant(tiny_cfg, tmp_path / 'other'), TrainOptions(seed=6)).model.state_dict()
    assert not torch.equal(other['backbone.stem.0.weight'], state_of(tmp_path / 'whole', 6)['backbone.stem.0.weight'])


@pytest.mark.slow
def test_resume_of_a_named_checkpoint_and_after_a_move(tiny_cfg, tmp_path):
    train(variant(tiny_cfg, tmp_path / 'a', **{'train_cfg.max_iters': 3}), TrainOptions(seed=5))
    runner = train(variant(tiny_cfg, tmp_path / 'b'), TrainOptions(resume=str(tmp_path / 'a' / 'iter_3.pth')))
    (tmp_path / 'a').rename(tmp_path / 'moved')
    moved = train(variant(tiny_cfg, tmp_path / 'moved'), TrainOptions(resume=True))
    assert runner.iter == moved.iter == 6
    assert_equal_states(runner.model.state_dict(), moved.model.state_dict())
    assert len(list((tmp_path / 'moved').glob('best_*.pth'))) == 1  # the one before was replaced, or is still the best


@pytest.mark.slow
def test_what_a_resumed_run_writes_is_tested_as_it_is(tiny_cfg, mini_root):
    """Its config beside its checkpoint: nothing in it goes on from another one."""
    work_dir = Path(tiny_cfg.work_dir)
    train(variant(tiny_cfg, work_dir, **{'train_cfg.max_iters': 3}), TrainOptions(seed=5))
    end = run_result(train(variant(tiny_cfg, work_dir), TrainOptions(resume=True)))
    written = load_config(end['config'], work_dir)
    assert not written.get('resume') and written.get('load_from') is None
    written.update(resume=True, load_from='/nowhere/iter_3.pth')  # as mmengine's own tools write it
    figures = evaluate(written, work_dir / 'iter_6.pth')
    assert figures == evaluate(load_config(TINY_CONFIG, work_dir, mini_root), work_dir / 'iter_6.pth')


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny_cfg):
    assert (
        train(variant(tiny_cfg, Path(tiny_cfg.work_dir), **{'train_cfg.max_iters': 1}), TrainOptions(resume=True)).iter
        == 1
    )


def test_to_resume_removes_no_checkpoint(tiny_cfg, trained):
    """Who keeps the best one alone cannot go on from it, but has it."""
    best = Path(tiny_cfg.work_dir, 'best_mIoU_iter_3.pth')
    best.parent.mkdir(exist_ok=True)
    shutil.copy(trained, best)
    (best.parent / 'last_checkpoint').write_text(str(best.parent / 'iter_3.pth'))
    tiny_cfg.default_hooks.checkpoint.save_best = None
    train(variant(tiny_cfg, best.parent, **{'train_cfg.max_iters': 1}), TrainOptions(resume=True))
    assert best.read_bytes() == trained.read_bytes()


def test_a_checkpoint_from_elsewhere_replaces_no_run(tiny_cfg, trained, tmp_path):
    there = Path(tiny_cfg.work_dir, 'iter_9.pth')
    there.parent.mkdir(exist_ok=True)
    there.write_bytes(b'')
    with pytest.raises(UserError, match='has checkpoints of another run, such as iter_9.pth'):
        train(tiny_cfg, TrainOptions(resume=str(trained)))
    # But one that the run in the work dir could only save elsewhere goes on.
    content = torch.load(trained, weights_only=False)
    content['message_hub']['runtime_info']['last_ckpt'] = str(there)
    torch.save(content, tmp_path / 'work_iter_3.pth')
    assert belongs_to(tmp_path / 'work_iter_3.pth', tiny_cfg.work_dir) and belongs_to(there, tiny_cfg.work_dir)
    assert not belongs_to(trained, tiny_cfg.work_dir)


def test_in_another_folder_the_best_is_the_best_there(tiny_cfg, trained, tmp_path):
    content = torch.load(trained, weights_only=False)
    info = content['message_hub']['runtime_info']
    info.update(best_ckpt=str(trained.parent / 'best_mIoU_iter_2.pth'), best_score=99.0, keep_ckpt_ids=[1, 2])
    torch.save(content, tmp_path / 'iter_3.pth')
    options = {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 1}
    end = run_result(
        train(variant(tiny_cfg, tmp_path / 'b', **options), TrainOptions(resume=str(tmp_path / 'iter_3.pth')))
    )
    assert end['checkpoint'].is_file() and end['checkpoint'].parent == tmp_path / 'b' and end['best'] < 99


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('default_hooks.checkpoint.max_keep_ckpt', 5, "no 'max_keep_ckpt': did you mean 'max_keep_ckpts'?"),
        ('optim_wrapper.optimizer.lr', [0, 1], 'optim_wrapper.optimizer='),
        ('optim_wrapper.optimizer.lr', -1, 'optim_wrapper.optimizer=.*Invalid learning rate'),
        ('optim_wrapper.optimizer.weight_decya', 0.1, 'optim_wrapper.optimizer=.*weight_decya'),
    ],
)
def test_what_would_fail_in_the_first_step_or_save_is_said_before(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_dict({key: value})
    for start in (plan, train):
        with pytest.raises(UserError, match=message):
            start(tiny_cfg, TrainOptions(weights='none'))


def test_bare_weights_cannot_be_resumed(tiny_cfg, tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='cannot be resumed, it lacks meta'):
        train(tiny_cfg, TrainOptions(resume=str(tmp_path / 'w.pth')))


def test_a_draw_survives_the_way_to_a_worker():
    draw = pickle.loads(pickle.dumps(SampleDraw(7, seed=3, position=11)))
    assert (draw, draw.seed, draw.position) == (7, 3, 11)
    assert [10, 20, 30, 40, 50, 60, 70, 80][draw] == 80


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset'])
def test_a_draw_survives_the_way_through_a_wrapper(tiny_cfg, wrapper):
    """Which turns the index into one of the data set inside."""
    inner = dict(tiny_cfg.train_dataloader.dataset, pipeline=[])
    cfg = dict(times=3, dataset=inner) if wrapper == 'RepeatDataset' else dict(datasets=[inner] * 3)
    dataset = DATASETS.build(dict(type=wrapper, **cfg))
    draw = dataset[SampleDraw(9, seed=3, position=11)]['sample_idx']
    assert (draw, draw.seed, draw.position) == (1, 3, 11)


def test_the_order_of_samples_is_mmengines():
    ours, reference = (iter(cls(range(5), seed=9)) for cls in (ReproducibleInfiniteSampler, InfiniteSampler))
    drawn = [next(ours) for _ in range(12)]
    assert drawn == [next(reference) for _ in range(12)]
    assert [draw.position for draw in drawn] == list(range(12))


def test_augmentation_depends_on_seed_and_position_only():
    def random_number(sample_idx) -> float:
        SeedAugmentation()(dict(sample_idx=sample_idx))
        return np.random.rand()

    first = random_number(SampleDraw(7, seed=3, position=11))
    assert random_number(SampleDraw(2, seed=3, position=11)) == first
    assert (
        len(
            {
                first,
                random_number(SampleDraw(7, seed=3, position=12)),
                random_number(SampleDraw(7, seed=4, position=11)),
            }
        )
        == 3
    )
    assert random_number(7) != random_number(7)  # an index that nobody drew leaves the generator alone


@HOOKS.register_module()
class PoisonHook(Hook):
    """Makes the weights of the head infinite, or the input, before one iteration."""

    def __init__(self, at: int, target: str):
        self.at, self.target = at, target

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.at and self.target == 'loss_weight':
            runner.model.decode_head.loss_decode.loss_weight = float('nan')
        if batch_idx == self.at and self.target == 'input':
            data_batch['inputs'] = [x.float().fill_(float('nan')) for x in data_batch['inputs']]


@pytest.mark.parametrize('target', ['loss_weight', pytest.param('input', marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_sound_checkpoint(tiny_cfg, target):
    tiny_cfg.custom_hooks = [*tiny_cfg.custom_hooks, dict(type='PoisonHook', at=4, target=target)]
    with pytest.raises(UserError, match=r'not finite at iteration 5 \(decode\.loss_ce=nan\), on .*_0000000\d\.jpg, '):
        train(tiny_cfg, TrainOptions(seed=5))
    work_dir = Path(tiny_cfg.work_dir)
    assert Path((work_dir / 'last_checkpoint').read_text()).name == 'iter_4.pth'

    tiny_cfg.custom_hooks = tiny_cfg.custom_hooks[:-1]
    train(tiny_cfg, TrainOptions(resume=True))
    whole = variant(tiny_cfg, work_dir.parent / 'whole', resume=False, load_from=None)
    assert_equal_states(state_of(work_dir, 6), dict(train(whole, TrainOptions(seed=5)).model.state_dict()))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_once_is_left_out(tiny_cfg, tmp_path):
    """Weights, running statistics and the optimizer's moments stay as they are; twice in a row is too much."""
    hooks = [hook for hook in tiny_cfg.custom_hooks if hook['type'] != 'StopOnNonFiniteLossHook']
    hooks.append(dict(type='StopOnNonFiniteLossHook', in_a_row=2))
    tiny_cfg.custom_hooks = [*hooks, dict(type='PoisonHook', at=4, target='input')]
    tiny_cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    train(tiny_cfg, TrainOptions(seed=5))
    before, after = (read_checkpoint(Path(tiny_cfg.work_dir, f'iter_{i}.pth')) for i in (4, 5))
    assert_equal_states(before['state_dict'], after['state_dict'])
    for key, state in before['optimizer']['state'].items():
        assert all(torch.equal(value, after['optimizer']['state'][key][name]) for name, value in state.items())

    twice = variant(tiny_cfg, tmp_path / 'twice')
    twice.custom_hooks = [*hooks, *(dict(type='PoisonHook', at=at, target='input') for at in (3, 4))]
    with pytest.raises(UserError, match='iteration 5, 2 times in a row'):
        train(twice, TrainOptions(seed=5))
    assert read_checkpoint(tmp_path / 'twice' / 'iter_4.pth')['meta']['iter'] == 4


def test_amp_trains_in_bfloat16_on_a_cpu(tiny_cfg):
    seen = []
    tiny_cfg.train_cfg.max_iters = 2
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        runner = train(tiny_cfg, TrainOptions(amp=True))
    finally:
        handle.remove()
    training, validation = set(seen[:60]), set(seen[-60:])
    assert training == {torch.bfloat16} and validation == {torch.float32}
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())


def test_amp_scales_the_loss_on_a_gpu_without_bfloat16(tiny_cfg, monkeypatch):
    monkeypatch.setattr('mmseg_inceptionnext.training.mixed_precision.get_device', lambda: 'cuda')
    for supported in (True, False):
        monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation, s=supported: s)
        cfg = deepcopy(tiny_cfg)
        cfg.optim_wrapper.update(amp_optim_wrapper())
        expected = ['BFloat16OptimWrapper', None, None] if supported else ['AmpOptimWrapper', 'float16', 'dynamic']
        assert [cfg.optim_wrapper.get(key) for key in ('type', 'dtype', 'loss_scale')] == expected


def test_amp_does_not_replace_another_wrapper(tiny_cfg):
    tiny_cfg.optim_wrapper.type = 'AmpOptimWrapper'
    with pytest.raises(UserError, match='the config has AmpOptimWrapper'):
        train(tiny_cfg, TrainOptions(amp=True))


@pytest.mark.slow
def test_weights_none_and_weights_replace_the_configs(tiny_cfg, tmp_path):
    tiny_cfg.train_cfg.max_iters = 1
    tiny_cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='/nowhere/w.pth')
    with pytest.raises(UserError, match='/nowhere/w.pth'):
        train(variant(tiny_cfg, tmp_path / 'a'))
    train(variant(tiny_cfg, tmp_path / 'b'), TrainOptions(weights='none'))
    with pytest.raises(UserError, match='/else/w.pth'):
        train(variant(tiny_cfg, tmp_path / 'c'), TrainOptions(weights='/else/w.pth'))


def test_a_config_without_validation(tiny_cfg):
    tiny_cfg.merge_from_dict({'train_cfg.max_iters': 1, 'default_hooks.checkpoint.save_best': None})
    tiny_cfg.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    assert train(tiny_cfg).iter == 1


def test_fine_tuning_from_a_segmentor_is_all_or_nothing(tiny_cfg, tmp_path):
    tiny_cfg.train_cfg.max_iters = 1
    runner = train(variant(tiny_cfg, tmp_path / 'a'))
    torch.save({'state_dict': runner.model.state_dict()}, tmp_path / 'whole.pth')
    train(variant(tiny_cfg, tmp_path / 'b', load_from=str(tmp_path / 'whole.pth')))
    torch.save({'state_dict': runner.model.backbone.state_dict()}, tmp_path / 'part.pth')
    with pytest.raises(UserError, match='part.pth does not fit the config'):
        train(variant(tiny_cfg, tmp_path / 'c', load_from=str(tmp_path / 'part.pth')))


def test_seeds_that_numpy_cannot_take(tiny_cfg):
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match='seed='):
            train(tiny_cfg, TrainOptions(seed=seed))


def test_a_config_that_is_no_recipe(tiny_cfg):
    tiny_cfg.pop('train_dataloader')
    with pytest.raises(UserError, match='lacks train_dataloader'):
        train(tiny_cfg)


def test_scalars_and_pictures_are_in_tensorboard(tiny_cfg):
    """Loss, learning rate and mIoU by iteration; the same validation images at each validation."""
    tiny_cfg.train_cfg.val_interval = 3
    runner = train(tiny_cfg, TrainOptions(weights='none', seed=5))
    folder = Path(runner.visualizer._vis_backends['TensorboardVisBackend']._save_dir)
    events = EventAccumulator(str(folder)).Reload()
    for tag, steps in (('loss', range(1, 7)), ('lr', range(1, 7)), ('mIoU', (3, 6))):
        assert [event.step for event in events.Scalars(tag)] == list(steps)
    mean = runner.message_hub.get_scalar('train/loss').mean()  # as mmengine logs it
    assert events.Scalars('loss')[-1].value == pytest.approx(mean)
    for name in ('val_ADE_val_00000001', 'val_ADE_val_00000002'):
        assert [event.step for event in events.Images(name)] == [3, 6]
        picture = Image.open(folder / 'vis_image' / f'{name}_6.png')
        assert picture.width > 3 * 96  # image, truth and prediction


@pytest.mark.parametrize(('total', 'expected'), [(16, [0, 5, 10, 15]), (2, [0, 1]), (1, [0])])
def test_validation_samples_are_spread_evenly(total, expected):
    hook = ValidationSamplesHook(num_images=4)
    hook.before_val(SimpleNamespace(val_dataloader=[None] * total))
    assert sorted(hook.chosen) == expected


def test_the_summary_names_the_best_checkpoint(tiny_cfg):
    tiny_cfg.train_cfg.val_interval = 2
    end = run_result(train(tiny_cfg, TrainOptions(weights='none', seed=5)))
    assert end['checkpoint'].name == f'best_mIoU_iter_{end["iteration"]}.pth' and end['checkpoint'].is_file()
    assert end['config'].is_file() and end['best'] >= 0


def test_the_summary_of_a_run_without_validation(tiny_cfg):
    tiny_cfg.merge_from_dict({'default_hooks.checkpoint.save_best': None})
    tiny_cfg.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    end = run_result(train(tiny_cfg, TrainOptions(weights='none', seed=5)))
    assert (end['best'], end['iteration'], end['checkpoint'].name) == (None, 6, 'iter_6.pth')


@pytest.mark.slow
def test_the_saved_config_says_what_was_written(tiny_cfg, trained, mini_root):
    """Not what this machine makes of it: it serves on a GPU, and where this package is not installed."""
    tiny_cfg.default_hooks.checkpoint.type, tiny_cfg.val_cfg = 'CheckpointHook', dict(type='ValLoop')
    tiny_cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(trained))
    tiny_cfg.load_from, tiny_cfg.train_cfg.max_iters = str(trained), 2
    runner = train(tiny_cfg, TrainOptions(seed=5))
    assert isinstance(runner.checkpoint_hook, SafeCheckpointHook) and isinstance(runner.val_loop, TolerantValLoop)
    path = Path(runner.work_dir, Path(tiny_cfg.filename).name)
    saved = path.read_text()
    for longer in (True, False):
        cfg = Config.fromfile(path)
        assert cfg.model.backbone.init_cfg.checkpoint == cfg.load_from == str(trained)
        assert (cfg.default_hooks.checkpoint.type, cfg.val_cfg.type) == ('CheckpointHook', 'ValLoop')
        assert 'SyncBN' in saved and "type='BN'" not in saved and cfg.randomness.seed == 5
        assert 'model_wrapper_cfg' not in cfg and not cfg.get('resume')
        if longer:
            cfg.train_cfg.max_iters = 3
            assert train(cfg, TrainOptions(resume=True)).iter == 3
            cfg = load_config(path, work_dir=runner.work_dir, data_root=mini_root)
            saved = path.read_text()
            evaluate(cfg, Path(runner.work_dir, 'iter_3.pth'), tta=True)
            assert path.read_text() == saved  # a test, whose pipeline is another, leaves it alone
