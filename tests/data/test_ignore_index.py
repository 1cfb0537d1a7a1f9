"""One label of pixels without a class, for loss, padding, metric, report and pictures, wherever a config sets it."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from support import TINY_CONFIG

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.ignore_index import use_one_ignore_index
from mmseg_inceptionnext.data.inspection import inspect_data
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.evaluation.picture_hooks import comparison_of_sample
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train


def config_of(path, root, ignore_index=None):
    """Two classes, whose crops are padded to twice their size."""
    head = dict(num_classes=2) | ({} if ignore_index is None else dict(ignore_index=ignore_index))
    dataset = dict(
        _delete_=True, type='BaseSegDataset', data_root=str(root), img_suffix='.jpg', seg_map_suffix='.png',
        metainfo=dict(classes=('road', 'ground'), palette=[[120, 120, 120], [40, 160, 40]]), reduce_zero_label=False,
    )  # fmt: skip
    loading = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='CheckAnnotation', num_classes=2),
    ]
    text = [f'_base_ = {str(TINY_CONFIG)!r}', f'model = dict(decode_head={head!r})']
    for split, folder in (('train', 'training'), ('val', 'validation'), ('test', 'validation')):
        prefix = dict(img_path=f'images/{folder}', seg_map_path=f'annotations/{folder}')
        steps = [dict(type='RandomCrop', crop_size=(32, 32), cat_max_ratio=0.9)] if split == 'train' else []
        pipeline = [*loading, *steps, dict(type='PackSegInputs')]
        text.append(f'{split}_dataloader = dict(dataset={dataset | dict(data_prefix=prefix, pipeline=pipeline)!r})')
    path.write_text('\n'.join(text))
    return path


@pytest.fixture
def one_past(roads, tmp_path):
    """The same data set, whose unlabelled pixels are 2, not 255."""
    root = tmp_path / 'one_past'
    for path in roads.rglob('*.*'):
        (root / path.relative_to(roads)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(roads)).write_bytes(path.read_bytes())
    for path in (root / 'annotations').rglob('*.png'):
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 2, labels).astype(np.uint8)).save(path)
    return root


@pytest.mark.slow
def test_a_label_of_the_heads_is_ignored_as_255_is(roads, one_past, tmp_path):
    weights, figures, pixels = [], [], []
    for root, ignore_index in ((roads, None), (one_past, 2)):
        name = 'a' if ignore_index is None else 'b'
        path = config_of(tmp_path / f'{name}.py', root, ignore_index)
        cfg = load_config(path, tmp_path / name, cfg_options={'train_cfg.max_iters': 3, 'train_cfg.val_interval': 3})
        found = inspect_data(cfg)
        assert found.ok
        pixels.append((found.splits['train'].ignored_pixels, found.splits['train'].classes))
        train(cfg, TrainOptions(weights='none', seed=0))
        weights.append(read_checkpoint(tmp_path / name / 'iter_3.pth')['state_dict'])
        # The config that the run has saved, and the one that it was given, which says it for the heads alone.
        saved = evaluate(load_config(tmp_path / name / path.name, tmp_path / 't'), tmp_path / name / 'iter_3.pth')
        figures.append(evaluate(load_config(path, tmp_path / 't'), tmp_path / name / 'iter_3.pth'))
        assert saved == figures[-1]
    assert pixels[0] == pixels[1] and pixels[0][0] > 0
    assert figures[0] == figures[1] and figures[0]['mIoU'] > 0
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []


def test_a_class_that_the_metric_leaves_out_is_left_out_of_the_report(mini_root, trained, tmp_path):
    """The headline, the confusion and the figures of each image are of the same pixels."""
    present = np.unique([np.asarray(Image.open(path)) for path in (mini_root / 'annotations' / 'validation').iterdir()])
    left_out = int(present[present > 0][0]) - 1
    options = {'test_evaluator.ignore_index': left_out}
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', mini_root, cfg_options=options)
    figures = evaluate(cfg, trained, report=tmp_path / 'report', show_dir=tmp_path / 'shown')
    report = json.loads((tmp_path / 'report' / 'report.json').read_text())
    name = list(figures['per_class'])[left_out]
    assert report['per_class'][name]['pixels'] == 0 and figures['per_class'][name]['Acc'] is None
    right = sum(row['pixels'] * row['Acc'] for row in report['per_class'].values() if row['Acc'] is not None)
    assert right / sum(row['pixels'] for row in report['per_class'].values()) == pytest.approx(
        figures['aAcc'], abs=0.01
    )
    wrong = sum(pair['pixels'] for pair in report['confused_pairs'])
    total = sum(row['pixels'] for row in report['per_class'].values())
    assert 100 * (1 - wrong / total) == pytest.approx(figures['aAcc'], abs=0.01)
    plain = evaluate(load_config(TINY_CONFIG, tmp_path / 'work', mini_root), trained)
    assert plain['per_class'][name]['Acc'] is not None


def test_pictures_leave_it_unlabelled(tmp_path):
    Image.new('RGB', (8, 8), (255, 255, 255)).save(tmp_path / 'a.png')
    sample = SegDataSample(metainfo=dict(img_path=str(tmp_path / 'a.png')))
    sample.gt_sem_seg = PixelData(data=torch.ones(1, 8, 8, dtype=torch.uint8))
    sample.pred_sem_seg = PixelData(data=torch.zeros(1, 8, 8))  # float32, of a head with one channel
    meta = dict(classes=('a', 'b'), palette=[[255, 0, 0], [0, 0, 255]])
    plain, ignored = (np.asarray(comparison_of_sample(sample, meta, label)) for label in (255, 1))
    assert (plain == (102, 102, 255)).all(2).any() and not (ignored == (102, 102, 255)).all(2).any()
    assert (ignored == (255, 102, 102)).all(2).any()


def test_what_is_set_stays_and_the_rest_follows():
    def built(head: dict, metric: dict) -> tuple:
        cfg = Config(dict(
            model=dict(decode_head=[dict(head), dict()], data_preprocessor=dict(seg_pad_val=255)),
            val_evaluator=dict(type='PerClassIoUMetric', **metric), test_evaluator=[dict(type='IoUMetric')],
            train_dataloader=dict(dataset=dict(dataset=dict(pipeline=[dict(type='RandomCrop')]))),
        ))  # fmt: skip
        use_one_ignore_index(cfg)
        transform = cfg.train_dataloader.dataset.dataset.pipeline[0]
        parts = (*cfg.model.decode_head, cfg.val_evaluator, cfg.test_evaluator[0], transform)
        return (*(part.get('ignore_index') for part in parts), cfg.model.data_preprocessor.seg_pad_val)

    assert built({}, {}) == (None, None, None, None, None, 255)
    assert built(dict(ignore_index=7), {}) == (7, 7, 7, 7, 7, 7)
    assert built({}, dict(ignore_index=7)) == (7, 7, 7, 7, 7, 7)
    assert built(dict(ignore_index=9), dict(ignore_index=7)) == (9, 9, 7, 9, 9, 9)
