"""Options that change what is trained: fine-tuning, class weights, averaged weights, early stopping."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from support import TINY_CONFIG, TINY_UPERNET, variant

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.class_weights import keep_counts, read_counts, use_class_weights
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import load_for_finetuning
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train

SCRATCH = TrainOptions(weights='none', seed=0)


def data_of(roads, **changes) -> dict:
    return {
        'path': str(roads),
        'train': dict(images='images/training', masks='annotations/training'),
        'val': dict(images='images/validation', masks='annotations/validation'),
        'classes': ['road', 'grass'],
        **changes,
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestFinetune:
    @pytest.fixture
    def model(self):
        cfg = Config.fromfile(TINY_CONFIG)
        cfg.model.decode_head.num_classes = 3
        return build_segmentor(cfg)

    def test_rows_of_classes_with_the_same_name_are_taken_over(self, model, trained):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        line = load_for_finetuning(model, trained, ['Road', 'unicorn', 'sky'])
        theirs, ours = read_checkpoint(trained)['state_dict'], model.state_dict()
        for part in ('weight', 'bias'):
            key = f'decode_head.conv_seg.{part}'
            assert torch.equal(ours[key][0], theirs[key][6]) and torch.equal(ours[key][2], theirs[key][2])
            assert torch.equal(ours[key][1], before[key][1])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if 'conv_seg' not in key)
        assert 'rows of 2 of 3 classes (Road, sky)' in line and '\n' not in line

    def test_as_many_classes_of_other_names_are_not_confused(self, trained):
        """With mmengine's load_from, a model with as many classes would take all rows."""
        model = build_segmentor(Config.fromfile(TINY_CONFIG))
        before = model.decode_head.conv_seg.weight.clone()
        line = load_for_finetuning(model, trained, [f'class {i}' for i in range(150)])
        assert torch.equal(model.decode_head.conv_seg.weight, before) and 'rows of 0 of 150' in line

    def test_another_head(self, trained):
        cfg = Config.fromfile(TINY_UPERNET)
        cfg.model.backbone = Config.fromfile(TINY_CONFIG).model.backbone
        line = load_for_finetuning(build_segmentor(cfg), trained, ['a'] * 150)
        assert 'new: ' in line and 'auxiliary_head' not in line.split('left out')[-1] and 'left out: ' in line

    def test_another_backbone_is_refused(self, trained):
        with pytest.raises(UserError, match='has another backbone'):
            load_for_finetuning(build_segmentor(Config.fromfile(TINY_UPERNET)), trained, ['a'] * 150)

    def test_a_run_starts_from_it_and_resumes_without_it(self, roads, trained, tmp_path):
        options = dataclasses.replace(SCRATCH, weights=None, finetune=str(trained))
        cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=data_of(roads), cfg_options={
            'optim_wrapper.optimizer.lr': 0.0, 'train_cfg.max_iters': 1})  # fmt: skip
        runner = train(cfg, options)
        theirs, ours = read_checkpoint(trained)['state_dict'], runner.model.state_dict()
        weights = [key for key in ours if key.startswith('backbone.') and 'running' not in key and 'batches' not in key]
        assert weights and all(torch.equal(ours[key], theirs[key]) for key in weights)
        cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=data_of(roads), cfg_options={'train_cfg.max_iters': 2})
        trained_on = train(cfg, dataclasses.replace(options, resume=True))
        assert trained_on.resumed_from.endswith('iter_1.pth')

    @pytest.mark.parametrize('changes', [dict(weights='none'), dict(strategy='fsdp'), dict(finetune='nowhere.pth')])
    def test_what_does_not_go_together(self, tiny_cfg, trained, changes):
        with pytest.raises(UserError):
            train(tiny_cfg, TrainOptions(**{'finetune': str(trained), **changes}))


class TestClassWeights:
    def test_they_are_the_inverse_root_of_the_frequency(self, tiny_cfg):
        use_class_weights(tiny_cfg, {'a': 100, 'b': 400, 'c': 0})
        weights = tiny_cfg.model.decode_head.loss_decode.class_weight
        assert weights[0] / weights[1] == pytest.approx(2, rel=1e-3) and weights[2] == 1.0
        assert np.mean(weights[:2]) == pytest.approx(1, rel=1e-3)

    def test_a_run_counts_them_keeps_them_and_counts_again_when_a_mask_changes(self, roads, tmp_path):
        def weights() -> list[float]:
            cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=data_of(roads), cfg_options={'train_cfg.max_iters': 1})
            train(cfg, dataclasses.replace(SCRATCH, class_weights='auto'))
            return Config.fromfile(tmp_path / 'w' / 'fpn_tiny.py').model.decode_head.loss_decode.class_weight

        first = weights()  # 24 of 64 columns are road
        assert first[0] / first[1] == pytest.approx((40 / 24) ** 0.5, rel=1e-3)
        kept = json.loads((roads / 'class_counts.json').read_text())
        assert list(kept.values()) == [{'road': 4 * 46 * 24, 'grass': 4 * 46 * 40}]
        mask = roads / 'annotations' / 'training' / '0.png'
        mask.write_bytes((roads / 'annotations' / 'training' / '1.png').read_bytes() + b'\0')
        cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=data_of(roads))
        assert read_counts(cfg) is None

    def test_a_place_that_cannot_be_written_costs_only_the_next_count(self, roads, tmp_path):
        (roads / 'class_counts.json').mkdir()
        cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=data_of(roads))
        keep_counts(cfg, {'road': 1, 'grass': 2})
        assert read_counts(cfg) is None and not list(roads.glob('*.partial*'))

    def test_of_a_config_without_a_data_file(self, tiny_cfg):
        train(variant(tiny_cfg, tiny_cfg.work_dir, **{'train_cfg.max_iters': 1}), dataclasses.replace(
            SCRATCH, class_weights='auto'))  # fmt: skip

    def test_a_loss_that_cannot_be_weighed(self, tiny_cfg):
        tiny_cfg.model.decode_head.loss_decode = dict(type='DiceLoss')
        with pytest.raises(UserError, match='FPNHead has no CrossEntropyLoss'):
            use_class_weights(tiny_cfg, {'a': 1})


@HOOKS.register_module()
class ScoresHook(Hook):
    """Puts other figures into the place of a validation's, before the hooks that use them."""

    priority = 'VERY_HIGH'
    scores = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}

    def after_val_epoch(self, runner, metrics=None):
        if metrics:
            metrics['mIoU'] = self.scores.get(runner.iter, 1.0)


class TestEarlyStop:
    @pytest.fixture
    def cfg(self, tiny_cfg):
        tiny_cfg.custom_hooks += [dict(type='ScoresHook')]
        tiny_cfg.merge_from_dict({'train_cfg.max_iters': 20, 'train_cfg.val_interval': 2})
        tiny_cfg.default_hooks.checkpoint.interval = 5
        return tiny_cfg

    @pytest.mark.slow
    def test_it_stops_with_the_last_state_and_a_resumed_run_stops_where_it_would_have(self, cfg, tmp_path):
        options = dataclasses.replace(SCRATCH, early_stop=2)
        whole = train(variant(cfg, tmp_path / 'whole'), options)
        assert whole.iter == 6 and run_result(whole)['best'] == 5.0
        assert (tmp_path / 'whole' / 'iter_6.pth').is_file()

        short = variant(cfg, tmp_path / 'cut', **{'train_cfg.max_iters': 4})
        assert train(short, options).iter == 4  # ends with one validation that is not better
        resumed = train(variant(cfg, tmp_path / 'cut'), dataclasses.replace(options, resume=True))
        assert resumed.iter == 6 and run_result(resumed)['best'] == 5.0

    @pytest.mark.slow
    def test_a_stopped_run_can_go_on(self, cfg, tmp_path):
        options = dataclasses.replace(SCRATCH, early_stop=2)
        train(variant(cfg, tmp_path / 'w'), options)
        patient = train(variant(cfg, tmp_path / 'w'), dataclasses.replace(options, early_stop=3, resume=True))
        assert patient.iter == 8


@HOOKS.register_module()
class FailingHook(Hook):
    """Lets the validation of iteration 3 fail."""

    failure = None

    def before_val_epoch(self, runner):
        if runner.iter != 3:
            return
        if self.failure == 'signal':
            os.kill(os.getpid(), signal.SIGTERM)
        metric = runner.val_evaluator.metrics[0]
        if self.failure == 'image':
            metric.process = fail_once(metric, 'process', UserError('a broken image'))
        elif self.failure == 'metric':
            metric.compute_metrics = fail_once(metric, 'compute_metrics', RuntimeError('a bug'))


def fail_once(metric, name: str, error: Exception):
    def fail(*args, **kwargs):
        delattr(metric, name)
        raise error

    return fail


class TestEma:
    def test_it_resumes_bit_for_bit(self, tiny_cfg, tmp_path):
        options = dataclasses.replace(SCRATCH, ema=True)
        train(variant(tiny_cfg, tmp_path / 'whole'), options)
        train(variant(tiny_cfg, tmp_path / 'cut'), options)
        for name in ('iter_6.pth', 'best_mIoU_iter_6.pth', 'last_checkpoint'):
            (tmp_path / 'cut' / name).unlink()
        train(variant(tiny_cfg, tmp_path / 'cut'), dataclasses.replace(options, resume=True))
        whole, cut = (read_checkpoint(tmp_path / folder / 'iter_6.pth') for folder in ('whole', 'cut'))
        for key in ('state_dict', 'ema_state_dict'):
            assert same(whole[key], cut[key])
        averaged = whole['state_dict']['decode_head.conv_seg.weight']
        assert not torch.equal(averaged, whole['ema_state_dict']['module.decode_head.conv_seg.weight'])

    @pytest.mark.slow
    def test_a_saved_config_with_the_same_option_averages_once(self, tiny_cfg, tmp_path):
        options = dataclasses.replace(SCRATCH, ema=True, early_stop=9)
        train(variant(tiny_cfg, tmp_path / 'w'), options)
        again = load_config(tmp_path / 'w' / 'fpn_tiny.py', tmp_path / 'again')
        hooks = [type(hook).__name__ for hook in train(again, options).hooks]
        assert hooks.count('EMAHook') == hooks.count('ResumableEarlyStoppingHook') == 1

    def test_a_test_takes_the_averages_once(self, tiny_cfg, tmp_path):
        runner = train(variant(tiny_cfg, tmp_path / 'w'), dataclasses.replace(SCRATCH, ema=True))
        result = run_result(runner)
        cfg = load_config(result['config'], tmp_path / 'w')
        assert evaluate(cfg, result['checkpoint'])['mIoU'] == pytest.approx(result['best'], abs=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize('failure', ['image', 'metric', 'signal'])
    def test_a_validation_that_fails_gives_the_trained_weights_back(self, tiny_cfg, tmp_path, failure, monkeypatch):
        """After a failed validation in the middle, the run ends with the weights of one without that validation."""
        options = dataclasses.replace(SCRATCH, ema=True)
        plain = train(variant(tiny_cfg, tmp_path / 'plain'), options).model.state_dict()
        cfg = variant(tiny_cfg, tmp_path / 'hurt', **{'train_cfg.val_interval': 3})
        monkeypatch.setattr(FailingHook, 'failure', failure)
        cfg.custom_hooks += [dict(type='FailingHook')]
        runner = train(cfg, options)
        assert runner.val_loop.failures.keys() == {3}
        if failure == 'signal':
            assert runner.stopped_by == 'SIGTERM' and runner.iter == 3
            monkeypatch.setattr(FailingHook, 'failure', None)
            runner = train(variant(cfg, tmp_path / 'hurt'), dataclasses.replace(options, resume=True))
            assert runner.val_loop.failures == {}
        assert same(plain, runner.model.state_dict())
