"""Mistakes in a config or a command end in one line that names them and the way out, before anything is computed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY_CONFIG, assert_user_error

ROADS = """
_base_ = {base!r}
num_classes = 2
model = dict(decode_head=dict(num_classes=2))
dataset = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=False,
    metainfo=dict(classes=('road', 'ground'), palette=[[120, 120, 120], [40, 160, 40]]),
)
train_dataloader = dict(dataset=dict(_delete_=True, **dataset, data_prefix=dict(
    img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='CheckAnnotation', num_classes=2),
              dict(type='RandomCrop', crop_size=(48, 64)), dict(type='PackSegInputs')]))
val_dataloader = dict(dataset=dict(_delete_=True, **dataset, data_prefix=dict(
    img_path='images/validation', seg_map_path='annotations/validation'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
test_dataloader = val_dataloader
del dataset
train_cfg = dict(max_iters=2, val_interval=2)
"""


@pytest.fixture
def own(roads, tmp_path) -> Path:
    """A config for a data set of one's own, written by hand."""
    path = tmp_path / 'own.py'
    path.write_text(ROADS.format(base=str(TINY_CONFIG), root=str(roads)))
    return path


def training(config, *options) -> tuple:
    return ('train', config, '--weights', 'none', '--work-dir', 'work', *options)


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (
            "visualizer = dict(vis_backends=[dict(type='WandbVisBackend')])",
            ['needs wandb', 'vis_backends'],
        ),
        ("visualizer = dict(vis_backends=[dict(type='MLflowVisBackend')])", ['needs mlflow: pip install mlflow']),
        ("visualizer = dict(vis_backends=[dict(type='AimVisBackend')])", ['needs aim']),
        (['model.neck.in_channels=[1,2,3,4]'], ['[1, 2, 3, 4]', 'InceptionNeXt', '[16, 32, 48, 64]']),
        (['model.decode_head.in_channels=[8,8,8,8]'], ['[8, 8, 8, 8]', 'FPN', '[16, 16, 16, 16]']),
        (['model.decode_head.in_index=[0,1,2,4]'], ['in_index=[0, 1, 2, 4]', 'FPN returns 4 maps']),
        (['train_dataloader.dataset.metainfo.classes=road'], ["classes='road' is a string", "['road']"]),
        (['train_dataloader.dataset.metainfo.palette=[[1,2,3]]'], ['1 colours for 2 classes']),
        (['train_dataloader.dataset.metainfo.palette=[[1,2,3],[1,2]]'], ['palette has [1, 2]', 'red, green, blue']),
        (
            "train_dataloader['dataset']['metainfo'] = dict(CLASSES=['a', 'b'])",
            ["'CLASSES'", "mean 'classes'?"],
        ),
        (['train_dataloader.dataset.img_suffix=.JPG'], ['no *.JPG image in', '4 × .jpg', 'img_suffix']),
        (['val_evaluator.iou_metrics=[mIou]'], ["'mIou'", 'mIoU, mDice, mFscore']),
    ],
    ids=lambda value: None if isinstance(value, list) and len(value) > 1 else str(value)[:40],
)
@pytest.mark.parametrize('dry', [[], ['--dry-run']], ids=['', 'dry run'])
def test_a_config(options, parts, dry, own, tool_here, tmp_path):
    if isinstance(options, str):
        own.write_text(f'{own.read_text()}{options}\n')
        options = []
    process = tool_here(*training(own, *dry), *(['--cfg-options', *options] if options else []))
    assert_user_error(process, *parts)
    assert not [path for path in tmp_path.rglob('*') if path.is_dir() and not list(path.iterdir())]


def test_names_that_a_data_set_does_not_have(tool_here, mini_root, tmp_path):
    config = tmp_path / 'subset.py'
    config.write_text(
        f'_base_ = {str(TINY_CONFIG)!r}\nmodel = dict(decode_head=dict(num_classes=2))\n'
        f'train_dataloader = dict(dataset=dict(data_root={str(mini_root)!r}, '
        "metainfo=dict(classes=('sky', 'buildng'))))"
    )
    process = tool_here(*training(config))
    assert_user_error(process, "'buildng'", 'no class of ADE20KDataset', "did you mean 'building'?")


def test_a_data_root_of_ones_own_is_not_ade20ks(own, tool_here):
    process = tool_here(*training(own, '--data-root', 'nowhere'))
    assert_user_error(process, 'no data set at', 'nowhere', '--data-root DIR')
    assert 'ADE' not in process.stderr


@pytest.mark.parametrize('value', ['[1,2', '(1,[2)', 'dict(a=1,b=2)', '[dict(a=1,b=2)]', "{'a': 1}", '[{"a":1}]'])
def test_cfg_options_that_mmengine_cannot_read(own, tool_here, value):
    process = tool_here(*training(own), '--cfg-options', 'model.x=3', f'model.decode_head.loss_decode={value}')
    assert_user_error(
        process, '--cfg-options', repr(f'model.decode_head.loss_decode={value}'), 'a config that inherits'
    )


def test_no_workers(own, tool_here):
    """The recipes keep workers and prefetch, of which torch wants to hear nothing without workers."""
    options = [f'{split}_dataloader.{key}' for split in ('train', 'val')
               for key in ('num_workers=0', 'persistent_workers=True', 'prefetch_factor=4')]  # fmt: skip
    process = tool_here(*training(own), '--cfg-options', *options)
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.slow
def test_a_batch_of_several_sizes(own, roads, tool_here, tmp_path):
    for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
        path = roads / kind / 'validation' / f'1.{suffix}'
        with Image.open(path) as image:
            image.crop((0, 0, 40, 33)).save(path)
    sizes = ('0.jpg is 64×48', '1.jpg in the same batch is 40×33', 'batch_size=1', 'size_divisor=32')
    process = tool_here(*training(own), '--cfg-options', 'val_dataloader.batch_size=2')
    assert process.returncode == 0
    for part in sizes:
        assert part in process.stderr.strip().splitlines()[-1]
    checkpoint = tmp_path / 'work' / 'iter_2.pth'
    batch = ('--cfg-options', 'test_dataloader.batch_size=2')
    assert_user_error(tool_here('test', own, checkpoint, '--work-dir', 't', *batch), *sizes)
    maps = []
    for options in (['model.data_preprocessor.test_cfg.size_divisor=32'], ['test_dataloader.batch_size=1']):
        out = f'maps{len(maps)}'
        process = tool_here('test', own, checkpoint, '--work-dir', 't', '--out', out, *batch, *options)
        assert process.returncode == 0, process.stderr
        maps.append([np.asarray(Image.open(tmp_path / out / f'{i}.png')) for i in range(2)])
    for padded, alone in zip(*maps, strict=True):
        assert padded.shape == alone.shape


@pytest.mark.parametrize('start', ['tools', 'module'])
def test_a_module_beside_the_config(start, own, tool_here, run_here, tmp_path):
    imports = "custom_imports = dict(imports=['mmseg_inceptionnext', 'my_{}'], allow_failed_imports=False)\n"
    own.write_text(own.read_text() + imports.format(start))

    def run():
        if start == 'tools':
            return tool_here(*training(own))
        return run_here('-m', 'mmseg_inceptionnext', *training(own))

    assert_user_error(run(), f"No module named 'my_{start}'", str(tmp_path), 'PYTHONPATH')
    (tmp_path / f'my_{start}.py').write_text(
        'from mmseg.models.decode_heads import FPNHead\nfrom mmseg.registry import MODELS\n'
        f'@MODELS.register_module()\nclass MyHead{start}(FPNHead):\n    pass\n'
    )
    own.write_text(own.read_text() + f"model['decode_head']['type'] = 'MyHead{start}'\n")
    process = run()
    assert process.returncode == 0, process.stderr
    assert f'MyHead{start}' in process.stdout


def test_a_second_run_into_a_work_dir(own, tool_here, tmp_path):
    assert tool_here(*training(own)).returncode == 0
    first = (tmp_path / 'work' / 'iter_2.pth').read_bytes()
    parts = ('checkpoints of another run', '--resume', '--overwrite', '--work-dir')
    assert_user_error(tool_here(*training(own)), *parts)
    assert 'warning: work has checkpoints of another run' in tool_here(*training(own, '--dry-run')).stdout
    assert (tmp_path / 'work' / 'iter_2.pth').read_bytes() == first
    process = tool_here(*training(own, '--overwrite', '--iters', 1))
    assert process.returncode == 0, process.stderr
    assert [path.name for path in sorted((tmp_path / 'work').glob('iter_*'))] == ['iter_1.pth']


def test_what_a_run_starts_from_is_not_replaced(own, tool_here, tmp_path):
    assert tool_here(*training(own)).returncode == 0
    process = tool_here(
        'train', own, '--work-dir', 'work', '--finetune', 'work/iter_2.pth', '--overwrite', '--iters', 1
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'work' / 'iter_2.pth').is_file()


def test_another_number_of_classes_under_load_from(own, tool_here, trained):
    process = tool_here(*training(own), '--cfg-options', f'load_from={trained}')
    assert_user_error(process, 'was trained for 150 classes, the config has 2', f'--finetune {trained}')


def test_devices(own, tool_here, tmp_path):
    assert_user_error(tool_here(*training(own, '--device', 'cuda:7')), '--device cuda:7 cannot be used here')
    process = tool_here(*training(own, '--device', 'cpu'))
    assert process.returncode == 0 and 'device: cpu' in process.stdout
    checkpoint = tmp_path / 'work' / 'iter_2.pth'
    assert tool_here('test', own, checkpoint, '--work-dir', 't', '--device', 'cpu').returncode == 0
    assert_user_error(tool_here('test', own, checkpoint, '--work-dir', 't', '--device', 'gpu'), '--device gpu')
    out = ('export', own, checkpoint, '--out', 'm.pt2', '--shape', 48, 64, '--verify', 1)
    assert tool_here(*out, '--device', 'cpu').returncode == 0
    assert_user_error(tool_here(*out, '--device', 'cuda'), '--device cuda cannot be used')


def test_metrics_go_by_the_names_of_the_config(own, tool_here, tmp_path):
    """In the lines of training, in the name of the best checkpoint, and in all that a test writes."""
    options = ('--cfg-options', 'val_evaluator.iou_metrics=[mDice]', 'default_hooks.checkpoint.save_best=mDice')
    process = tool_here(*training(own), *options)
    assert process.returncode == 0 and re.search(r'^mDice [\d.]+ at iteration 2\.', process.stdout, re.MULTILINE)
    (best,) = (tmp_path / 'work').glob('best_mDice_iter_2.pth')
    options = ('--cfg-options', 'test_evaluator.iou_metrics=[mDice,mFscore]')
    process = tool_here('test', own, best, '--work-dir', 't', '--json', 'f.json', '--report', 'report', *options)
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / 'f.json').read_text())
    assert {'mDice', 'mFscore', 'mPrecision', 'mRecall', 'mIoU', 'mAcc', 'aAcc'} <= set(figures)
    assert f'mDice {figures["mDice"]}' in process.stdout
    assert set(figures['per_class']['road']) >= {'Dice', 'Fscore', 'IoU', 'Acc'}
    assert json.loads((tmp_path / 'report' / 'report.json').read_text())['mDice'] == figures['mDice']
    iou = np.array([row['IoU'] for row in figures['per_class'].values()]) / 100
    assert figures['mDice'] == pytest.approx(100 * np.mean(2 * iou / (1 + iou)), abs=0.02)


def test_a_failed_test_leaves_no_folders(own, tool_here, tmp_path):
    folders = ('--out', 'out/maps', '--show-dir', 'shown', '--report', 'report', '--json', 'json/f.json')
    assert_user_error(tool_here('test', own, 'no.pth', '--work-dir', 'a/b', *folders), 'no checkpoint')
    assert not [name for name in ('out', 'shown', 'report', 'json', 'a') if (tmp_path / name).exists()]
