"""Heads, output channels and images of other kinds, each through the whole chain: what trains has a way out."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from mmengine.config import Config
from PIL import Image
from support import TINY_CONFIG, TINY_UPERNET

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.inference.predict import predict
from mmseg_inceptionnext.inference.sources import Output, find_sources
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train

LAST_MAP = dict(in_channels=64, in_index=3, channels=16, num_classes=150, align_corners=False,
                loss_decode=dict(type='CrossEntropyLoss'), norm_cfg=dict(type='SyncBN'))  # fmt: skip
ALL_MAPS = LAST_MAP | dict(in_channels=[16, 32, 48, 64], in_index=[0, 1, 2, 3])
HEADS = {
    'SegformerHead': dict(type='SegformerHead', **ALL_MAPS),
    'PSPHead': dict(type='PSPHead', pool_scales=(1, 2), **LAST_MAP),
    'ASPP': dict(type='DepthwiseSeparableASPPHead', dilations=(1, 2), c1_in_channels=16, c1_channels=8, **LAST_MAP),
    'FCNHead': dict(type='FCNHead', num_convs=1, concat_input=False, **LAST_MAP),
    'cascade': [
        dict(type='FCNHead', num_convs=1, concat_input=False, **LAST_MAP),
        dict(type='OCRHead', ocr_channels=8, **LAST_MAP),
    ],
}


def config_of_heads(path, name: str, data_root):
    """Write the config of a variant; the heads that the recipes have come from them."""
    model = {}
    if name in HEADS:
        model = dict(neck=None, decode_head=HEADS[name])
        if name == 'cascade':
            model.update(type='CascadeEncoderDecoder', num_stages=2)
        else:
            model['decode_head'] = dict(_delete_=True, **HEADS[name])
    cfg = dict(_base_=str(TINY_UPERNET if name == 'UPerHead' else TINY_CONFIG), model=model)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'] = dict(dataset=dict(data_root=str(data_root)))
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    return path


def run_chain(config, tmp_path, data=None, shape=(96, 96), **changes) -> dict:
    """Train, resume, test, test at several scales, draw, predict, count and export; return the figures."""
    options = {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 1, **changes}
    cfg = load_config(config, tmp_path / 'work', data=data, cfg_options=options)
    train(cfg, TrainOptions(weights='none', seed=0))
    cfg = load_config(config, tmp_path / 'work', data=data, cfg_options=options)
    runner = train(cfg, TrainOptions(weights='none', seed=0, resume=str(tmp_path / 'work' / 'iter_1.pth')))
    assert runner.val_loop.failures == {}
    end = run_result(runner)
    saved, checkpoint = end['config'], end['checkpoint']

    folders = {name: tmp_path / name for name in ('out', 'show_dir', 'report')}
    for folder in folders.values():
        folder.mkdir()
    figures = evaluate(load_config(saved, tmp_path / 'test'), checkpoint, **folders)
    plain = evaluate(load_config(saved, tmp_path / 'test'), checkpoint, fast=False)
    per_class = plain.pop('per_class')
    assert plain.items() <= figures.items() and per_class.keys() == figures['per_class'].keys()
    assert all(values.items() <= figures['per_class'][name].items() for name, values in per_class.items())
    assert evaluate(load_config(saved, tmp_path / 'test'), checkpoint, tta=True)['aAcc'] is not None
    pictures = sorted(folders['show_dir'].iterdir())
    assert len(pictures) == len(list(folders['out'].iterdir())) == 2

    sources = sorted(images_of(cfg))
    assert (
        predict(
            Segmentor(saved, checkpoint, precision='fp32'),
            find_sources(sources, tmp_path / 'p'),
            Output(tmp_path / 'p'),
        )
        == {}
    )
    expected = Segmentor(saved, checkpoint, precision='fp32')(sources)
    for source, result in zip(sources, expected, strict=True):
        written = np.asarray(Image.open(folders['out'] / f'{source.stem}.png'))
        assert np.array_equal(written, np.asarray(result.label_image()))
    assert measure_complexity(saved, (64, 64)).gmacs > 0

    dtype = 'float32' if sources[0].suffix == '.tif' else 'uint8'
    export(saved, checkpoint, tmp_path / 'logits.onnx', shape, dtype=dtype, verify=1, images=sources)
    export(saved, checkpoint, tmp_path / 'labels.pt2', shape, labels=True, verify=1)
    for plain, ours in zip(expected, Segmentor(tmp_path / 'logits.onnx')(sources), strict=True):
        assert np.mean(plain.labels == ours.labels) > 0.999
    return figures


def images_of(cfg: Config) -> list[Path]:
    return [Path(sample['img_path']) for sample in list_samples(open_dataset(cfg.test_dataloader.dataset))]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['UPerHead', 'FPNHead', *HEADS])
def test_a_head(name, tmp_path, mini_root):
    run_chain(config_of_heads(tmp_path / 'config.py', name, mini_root), tmp_path)


def data_of(folder: Path, store, suffix: str, channels: int) -> dict:
    """Write images of a dark half and a bright one, whose masks are 0 and 1, and return the content of a data file."""
    for split in ('train', 'val'):
        for i in range(2):
            labels = np.zeros((64, 96), np.uint8)
            labels[:, 40 + 10 * i :] = 1
            labels[0] = 255
            for kind in ('images', 'masks'):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            store(folder / 'images' / split / f'{i}{suffix}', np.where(labels, 180, 60).astype(np.uint8))
            Image.fromarray(labels).save(folder / 'masks' / split / f'{i}.png')
    splits = {split: dict(images=f'images/{split}', masks=f'masks/{split}') for split in ('train', 'val')}
    return dict(path=str(folder), **splits, classes=dict(enumerate(('dark', 'bright'))), channels=channels)


def grey(path, values):
    Image.fromarray(values).save(path)


def bands(path, values):
    """Five bands of 16 bits, one after the other, as GIS programs store them."""
    planes = np.stack([values.astype(np.uint16) * factor for factor in (10, 20, 30, 200, 300)])
    tifffile.imwrite(path, planes, photometric='minisblack', planarconfig='separate', compression='lzw')


def rgba(path, values):
    Image.fromarray(np.stack([values, values, values, 255 - values], axis=2)).save(path)


@pytest.mark.parametrize(
    ('store', 'suffix', 'channels'), [
        pytest.param(grey, '.png', 1, marks=pytest.mark.slow), pytest.param(rgba, '.png', 4, marks=pytest.mark.slow),
        pytest.param(bands, '.tif', 5, marks=pytest.mark.slow),
    ],
    ids=['grey', 'RGBA', 'bands of 16 bits'],
)  # fmt: skip
def test_channels(store, suffix, channels, tmp_path):
    data = data_of(tmp_path / 'data', store, suffix, channels)
    run_chain(TINY_CONFIG, tmp_path, data, (64, 96))


@pytest.mark.slow
def test_one_output_channel(tmp_path):
    """A sigmoid and a threshold in the place of the argmax."""
    data = data_of(tmp_path / 'data', grey, '.png', 3)
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)
    changes = {'model.decode_head.out_channels': 1, 'model.decode_head.loss_decode': loss}
    figures = run_chain(TINY_CONFIG, tmp_path, data, (64, 96), **changes)
    assert set(figures['per_class']) == {'dark', 'bright'}
