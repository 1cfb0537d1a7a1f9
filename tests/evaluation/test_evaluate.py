import copy
import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.runner import Runner
from PIL import Image
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import PerClassIoUMetric, UserError
from mmseg_inceptionnext.errors import UnreadableFile
from mmseg_inceptionnext.evaluation import evaluate, picture_hooks
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train


@pytest.fixture
def checkpoint(tiny_cfg, tmp_path):
    """An untrained model, saved as mmengine does."""
    model = Runner.from_cfg(tiny_cfg).model
    model.init_weights()
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'iter_0.pth')
    return tmp_path / 'iter_0.pth'


def test_figures_are_those_of_the_label_maps_that_are_written(tiny_cfg, checkpoint, mini_root, tmp_path):
    """mIoU, mAcc, aAcc and every class, counted anew from the PNGs, which have the annotations' coding."""
    figures = evaluate(tiny_cfg, checkpoint, out=tmp_path / 'out')
    confusion = np.zeros((151, 151))
    for path in sorted((mini_root / 'annotations' / 'validation').iterdir()):
        truth, prediction = np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / 'out' / path.name))
        assert prediction.shape == truth.shape and prediction.min() >= 1 and prediction.max() <= 150
        np.add.at(confusion, (truth, prediction), 1)
    confusion = confusion[1:, 1:]
    hit, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid='ignore'):
        iou, acc = 100 * hit / (true + predicted - hit), 100 * hit / true
    assert figures['mIoU'] == pytest.approx(np.nanmean(iou), abs=0.006)
    assert figures['mAcc'] == pytest.approx(np.nanmean(acc), abs=0.006)
    assert figures['aAcc'] == pytest.approx(100 * hit.sum() / true.sum(), abs=0.006)
    assert len(figures['per_class']) == 150
    for i, figure in enumerate(figures['per_class'].values()):
        for key, expected in (('IoU', iou[i]), ('Acc', acc[i])):
            assert figure[key] is None if np.isnan(expected) else figure[key] == pytest.approx(expected, abs=0.006)


def test_mmsegs_own_metric_in_a_config_is_no_obstacle(tiny_cfg, checkpoint):
    tiny_cfg.test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU'])]
    assert len(evaluate(tiny_cfg, checkpoint)['per_class']) == 150


def test_a_config_without_an_iou_metric(tiny_cfg, checkpoint):
    tiny_cfg.test_evaluator = [dict(type='CityscapesMetric', output_dir='x')]
    with pytest.raises(UserError, match='test_evaluator has no IoU metric'):
        evaluate(tiny_cfg, checkpoint)


def test_pictures_are_written(tiny_cfg, checkpoint, tmp_path):
    evaluate(tiny_cfg, checkpoint, show_dir=tmp_path / 'pictures')
    pictures = sorted((tmp_path / 'pictures').iterdir())
    assert [p.name for p in pictures] == ['ADE_val_00000001.png', 'ADE_val_00000002.png']
    assert all(Image.open(p).size[0] > 3 * 96 for p in pictures)


def test_outputs_replace_nothing(tiny_cfg, checkpoint, mini_root, tmp_path):
    with pytest.raises(UserError, match='one folder, where files of one name would clash'):
        evaluate(tiny_cfg, checkpoint, out=tmp_path / 'out', show_dir=tmp_path / 'x' / '..' / 'out')
    root = shutil.copytree(mini_root, tmp_path / 'data')
    tiny_cfg.test_dataloader.dataset.data_root = str(root)
    masks = root / 'annotations' / 'validation'
    before = {path: path.read_bytes() for path in masks.iterdir()}
    (tmp_path / 'link').symlink_to(masks)
    for options in (dict(out=masks), dict(show_dir=tmp_path / 'link'), dict(out=root / 'images' / 'validation')):
        with pytest.raises(UserError, match='validation is a folder of the data set'):
            evaluate(tiny_cfg, checkpoint, **options)
    assert {path: path.read_bytes() for path in masks.iterdir()} == before


def test_a_report_that_fails_costs_no_figures(tiny_cfg, checkpoint, tmp_path, tool_here, mini_root, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device', 'index.html')

    monkeypatch.setattr('mmseg_inceptionnext.evaluation.report._heat_map', full)
    process = tool_here('test', TINY_CONFIG, checkpoint, '--data-root', mini_root, '--report', 'r', '--json', 'f.json')
    assert_user_error(process, 'index.html: No space left on device')
    assert 'mIoU' in process.stdout and 'mIoU' in json.loads((tmp_path / 'f.json').read_text())


def test_an_image_that_is_no_picture_is_left_out_of_the_report(tiny_cfg, checkpoint, tmp_path, monkeypatch):
    def unreadable(path):
        raise UnreadableFile(f'{path}: not an image')

    monkeypatch.setattr('mmseg_inceptionnext.evaluation.report.read_picture', unreadable)
    assert evaluate(tiny_cfg, checkpoint, report=tmp_path / 'r')['per_class']
    assert (tmp_path / 'r' / 'index.html').stat().st_size


def test_images_of_the_same_name_would_overwrite_each_other(tiny_cfg, checkpoint, mini_root, tmp_path):
    root = shutil.copytree(mini_root, tmp_path / 'data')
    for kind, suffix in (('images', '.jpg'), ('annotations', '.png')):
        folder = root / kind / 'validation'
        (folder / 'sub').mkdir()
        (folder / f'ADE_val_00000002{suffix}').rename(folder / 'sub' / f'ADE_val_00000001{suffix}')
    tiny_cfg.test_dataloader.dataset.data_root = str(root)
    assert evaluate(tiny_cfg, checkpoint)['per_class']
    with pytest.raises(UserError, match='have the same name'):
        evaluate(tiny_cfg, checkpoint, out=tmp_path / 'out')


def damaged(checkpoint, how: str):
    content = torch.load(checkpoint, weights_only=True)
    state_dict = content['state_dict']
    if how == 'classes':
        state_dict['decode_head.conv_seg.weight'] = torch.zeros(21, 16, 1, 1)
    elif how == 'arch':
        for key in [key for key in state_dict if key.startswith('backbone.')]:
            del state_dict[key]
        small = timm.create_model('inception_next_small').state_dict()
        state_dict |= {f'backbone.{key}': value for key, value in small.items()}
    elif how == 'keys':
        del state_dict['decode_head.conv_seg.bias']
    torch.save(content, checkpoint)
    if how == 'truncated':
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('classes', 'was trained for 21 classes, the config has 150'),
        ('arch', 'this is inception_next_small'),
        ('keys', '1 keys are missing, such as decode_head.conv_seg.bias'),
        ('truncated', 'truncated'),
    ],
)
def test_a_checkpoint_that_does_not_fit(tiny_cfg, checkpoint, how, message):
    damaged(checkpoint, how)
    with pytest.raises(UserError, match=message):
        evaluate(tiny_cfg, checkpoint)


def test_per_class_figures_of_a_case_counted_by_hand():
    metric = PerClassIoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=['a ', 'b', 'c', 'd'])
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    prediction = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 3]])
    metric.process({}, [dict(pred_sem_seg=dict(data=prediction[None]), gt_sem_seg=dict(data=truth[None]))])
    figures = metric.evaluate(1)
    assert metric.figures['per_class'] == {
        'a': {'IoU': 66.67, 'Acc': 66.67},
        'b': {'IoU': 50.0, 'Acc': 66.67},
        'c': {'IoU': 0.0, 'Acc': None},
        'd': {'IoU': None, 'Acc': None},
    }
    assert figures['aAcc'] == pytest.approx(66.67)


def test_the_fast_path_gives_the_same_figures_and_maps(tiny_cfg, tmp_path):
    """On a trained model: every pixel of every label map."""
    tiny_cfg.merge_from_dict({'train_cfg.max_iters': 39, 'train_cfg.val_interval': 39})
    train(tiny_cfg, TrainOptions(weights='none', seed=0))
    checkpoint = Path(tiny_cfg.work_dir) / 'iter_39.pth'
    figures = {
        fast: evaluate(copy.deepcopy(tiny_cfg), checkpoint, out=tmp_path / str(fast), fast=fast)
        for fast in (True, False)
    }
    assert figures[True] == figures[False]
    maps = sorted((tmp_path / 'True').iterdir())
    assert len(maps) == 2
    for path in maps:
        assert path.read_bytes() == (tmp_path / 'False' / path.name).read_bytes()
        assert len(np.unique(np.array(Image.open(path)))) > 1


def test_multi_scale_gives_other_figures_and_whole_maps(tiny_cfg, checkpoint, mini_root, tmp_path):
    figures = evaluate(copy.deepcopy(tiny_cfg), checkpoint, out=tmp_path / 'out', show_dir=tmp_path / 'show', tta=True)
    assert figures != evaluate(tiny_cfg, checkpoint)
    for path in (mini_root / 'annotations' / 'validation').iterdir():
        assert Image.open(tmp_path / 'out' / path.name).size == Image.open(path).size
    assert len(list((tmp_path / 'show').iterdir())) == 2


_SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ('no prefix', 'no folder')]


@pytest.mark.parametrize('how', ['format_only', *_SLOW])
@pytest.mark.parametrize('tta', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_label_maps_without_ground_truth(tiny_cfg, checkpoint, mini_root, tmp_path, how, tta):
    expected = tmp_path / 'expected'
    evaluate(copy.deepcopy(tiny_cfg), checkpoint, out=expected, tta=tta)
    shutil.copytree(mini_root, tmp_path / 'data')
    dataset_cfg = tiny_cfg.test_dataloader.dataset
    if how == 'format_only':
        tiny_cfg.test_evaluator.format_only = True
    elif how == 'no prefix':
        dataset_cfg.data_prefix.seg_map_path = None
    else:
        shutil.rmtree(tmp_path / 'data' / 'annotations' / 'validation')
    dataset_cfg.data_root = str(tmp_path / 'data')

    with pytest.raises(UserError, match='no folder .*annotations|names no seg_map_path|format_only is set'):
        evaluate(copy.deepcopy(tiny_cfg), checkpoint)
    folders = dict(out=tmp_path / 'out', show_dir=tmp_path / 'show')
    assert evaluate(copy.deepcopy(tiny_cfg), checkpoint, **folders, tta=tta, need_figures=False) is None
    for path in expected.iterdir():
        assert path.read_bytes() == (tmp_path / 'out' / path.name).read_bytes()
    picture = Image.open(tmp_path / 'show' / 'ADE_val_00000001.png')
    assert 2 * 96 < picture.width < 3 * 96  # no panel of truth
    if not tta:
        assert evaluate(tiny_cfg, checkpoint, show_dir=tmp_path / 'alone', need_figures=False) is None
        assert len(list((tmp_path / 'alone').iterdir())) == 2


def test_multi_scale_needs_an_encoder_decoder(tiny_cfg, checkpoint, monkeypatch):
    monkeypatch.setattr(sys.modules['mmseg_inceptionnext.evaluation.evaluate'], 'EncoderDecoder', dict)
    with pytest.raises(UserError, match='tta=True is for an EncoderDecoder'):
        evaluate(tiny_cfg, checkpoint, tta=True)


def test_pictures_that_fail_cost_no_figures(tiny_cfg, trained, tmp_path, monkeypatch):
    """Neither those of a test nor those of a validation; a line says how many are missing, and why."""
    said = []

    def fail(*_):
        raise IndexError('out of bounds')

    monkeypatch.setattr(picture_hooks, 'draw_comparison', fail)
    monkeypatch.setattr(picture_hooks, 'say', lambda text, *_: said.append(text))
    assert evaluate(tiny_cfg, trained, show_dir=tmp_path / 'shown')['mIoU'] is not None
    tiny_cfg.train_cfg.update(max_iters=1, val_interval=1)
    runner = train(tiny_cfg, TrainOptions(weights='none'))
    assert runner.val_loop.failures == {} and run_result(runner)['best'] is not None
    assert len(said) == 2 and all('2 pictures are missing' in line and 'out of bounds' in line for line in said)
