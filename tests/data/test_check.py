import shutil
from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import DATASETS
from PIL import Image
from support import TINY_CONFIG

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.check import check_data


@pytest.fixture
def root(mini_root, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(mini_root, tmp_path / 'data')


@pytest.fixture
def cfg(root, tmp_path):
    return load_config(TINY_CONFIG, work_dir=tmp_path / 'work', data_root=root)


def annotation(root: Path) -> Path:
    return root / 'annotations' / 'training' / 'ADE_train_00000002.png'


def load_all(cfg) -> None:
    """Run the training and the test pipeline on every sample."""
    for split in ('train', 'test'):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        for i in range(len(dataset)):
            dataset[i]


def test_a_sound_data_set_passes(cfg):
    check_data(cfg, 'train', 'val', 'test')
    load_all(cfg)


def test_real_ade20k_passes(ade20k_sample, tmp_path):
    cfg = load_config(TINY_CONFIG, work_dir=tmp_path / 'work', data_root=ade20k_sample)
    check_data(cfg, 'train', 'val', 'test')
    load_all(cfg)


def test_missing_root_says_where_and_how(root, cfg):
    shutil.rmtree(root)
    with pytest.raises(UserError) as caught:
        check_data(cfg, 'train')
    assert str(root) in str(caught.value) and 'ADEChallengeData2016.zip' in str(caught.value)


def test_missing_split(root, cfg):
    shutil.rmtree(root / 'annotations' / 'validation')
    check_data(cfg, 'train')
    with pytest.raises(UserError, match='annotations/validation'):
        check_data(cfg, 'val')


def test_split_without_images(root, cfg):
    for path in (root / 'images' / 'training').iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r'no \*\.jpg image in .*images/training'):
        check_data(cfg, 'train')


def test_image_without_annotation(root, cfg):
    annotation(root).unlink()
    with pytest.raises(UserError, match=r'1 of 4 images have no annotation, the first .*ADE_train_00000002\.jpg'):
        check_data(cfg, 'train')


def test_inside_wrappers_too(root, cfg):
    annotation(root).unlink()
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=dataset)]
    )
    with pytest.raises(UserError, match='no annotation'):
        check_data(cfg, 'train')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda labels: labels[:-8], r'is 96×88, but .*ADE_train_00000002\.jpg is 96×96'),
        (lambda labels: np.where(labels == labels.max(), 151, labels), 'has label 151, outside 1 … 150'),
        (lambda labels: np.stack([labels] * 3, axis=-1), 'has 3 channels'),
    ],
    ids=['size', 'label', 'channels'],
)
def test_bad_annotation_is_named(root, cfg, damage, message):
    labels = np.asarray(Image.open(annotation(root)))
    Image.fromarray(damage(labels).astype(np.uint8)).save(annotation(root))
    with pytest.raises(UserError, match=rf'ADE_train_00000002\.png {message}'):
        load_all(cfg)


def test_sixteen_bits_do_not_wrap_around(root, cfg):
    """mmseg casts annotations to 8 bits: 257 would be read as 1."""
    labels = np.asarray(Image.open(annotation(root))).astype(np.uint16)
    Image.fromarray(labels).save(annotation(root))
    load_all(cfg)
    Image.fromarray(labels + 256).save(annotation(root))
    with pytest.raises(UserError, match=r'ADE_train_00000002\.png has label \d+: an annotation has 8 bits'):
        load_all(cfg)


@pytest.mark.parametrize('head', ['decode_head', 'auxiliary_head'])
@pytest.mark.parametrize('several', [False, True])
def test_another_number_of_classes(cfg, head, several):
    wrong = dict(cfg.model.decode_head, num_classes=21)
    cfg.model[head] = [cfg.model.decode_head, wrong] if several else wrong
    with pytest.raises(UserError, match=f'model.{head}.num_classes is 21, but the data set has 150'):
        check_data(cfg, 'train')
