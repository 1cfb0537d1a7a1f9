"""Our forms of mmseg's transforms draw the same random numbers and return the same samples, byte for byte."""

from copy import deepcopy

import numpy as np
import pytest
from mmcv.transforms import Compose
from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop
from support import ROOT

from mmseg_inceptionnext import SafeRunner
from mmseg_inceptionnext.config import load_config, read_config
from mmseg_inceptionnext.data.faster_transforms import (
    CountingRandomCrop,
    TablePhotoMetricDistortion,
    count_labels,
    use_faster_transforms,
)


def picture(seed: int, size: tuple[int, int] = (70, 90)) -> dict:
    """A noisy image, and labels of large and small parts, some ignored."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 3, (7, 9)), np.ones((10, 10))).astype(np.uint8)[: size[0], : size[1]]
    labels[rng.random(labels.shape) < 0.02] = 255
    image = rng.integers(256, size=(*size, 3), dtype=np.uint8)
    return dict(img=image, gt_seg_map=labels, img_shape=size, seg_fields=['gt_seg_map'])


def results(transform, sample: dict, seed: int) -> list:
    """What a transform makes of a sample, and the next random number."""
    np.random.seed(seed)
    found = transform(deepcopy(sample))
    return [found['img'], found['gt_seg_map'], found['img_shape'], np.random.random()]


def assert_equal(ours, theirs, sample: dict, seed: int) -> None:
    for found, expected in zip(results(ours, sample, seed), results(theirs, sample, seed), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert getattr(found, 'dtype', None) == getattr(expected, 'dtype', None)


@pytest.mark.parametrize(
    'arguments',
    [dict(cat_max_ratio=0.75), dict(cat_max_ratio=0.4), dict(cat_max_ratio=0.75, ignore_index=1), dict(),
     dict(cat_max_ratio=0.75, ignore_index=300)], ids=str,
)  # fmt: skip
def test_crops(arguments):
    for seed in range(40):
        for size in ((32, 48), (70, 90), (128, 16)):
            ours, theirs = (cls(crop_size=size, **arguments) for cls in (CountingRandomCrop, RandomCrop))
            assert_equal(ours, theirs, picture(seed), seed)


def test_a_crop_of_a_single_class_or_of_none_is_tried_again_as_often():
    sample = picture(0)
    for labels in (np.zeros((70, 90), np.uint8), np.full((70, 90), 255, np.uint8), np.eye(70, 90, dtype=np.int64)):
        sample['gt_seg_map'] = labels
        ours, theirs = (cls(crop_size=(32, 32), cat_max_ratio=0.75) for cls in (CountingRandomCrop, RandomCrop))
        for seed in range(5):
            assert_equal(ours, theirs, sample, seed)


@pytest.mark.parametrize('arguments', [{}, dict(contrast_range=(0, 4), saturation_range=(0, 3), hue_delta=90)], ids=str)
def test_distortions(arguments):
    """With each of the 32 choices that it makes, of a contiguous image and of a mirrored one."""
    ours, theirs = (cls(**arguments) for cls in (TablePhotoMetricDistortion, PhotoMetricDistortion))
    for seed in range(150):
        sample = picture(seed)
        if seed % 2:
            sample['img'] = sample['img'][:, ::-1]
        assert_equal(ours, theirs, sample, seed)


def test_every_colour_is_distorted_as_mmseg_does():
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 3, dtype=np.uint8)] * 3), axis=-1).reshape(86, -1, 3)
    sample = dict(picture(0), img=grid)
    for seed in range(12):
        assert_equal(TablePhotoMetricDistortion(), PhotoMetricDistortion(), sample, seed)


def test_images_of_float32_are_left_to_mmseg():
    sample = picture(0)
    sample['img'] = sample['img'].astype(np.float32) / 255
    for seed in range(20):
        assert_equal(TablePhotoMetricDistortion(), PhotoMetricDistortion(), sample, seed)


@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.uint16])
def test_counts(dtype):
    labels = np.random.default_rng(0).integers(0, 7, (50, 60)).astype(dtype)[::2, ::-1]
    expected = np.bincount(labels.ravel())
    found = count_labels(labels)
    assert np.array_equal(found[: len(expected)], expected) and not found[len(expected) :].any()


@pytest.mark.parametrize('recipe', ['upernet/inceptionnext_t', 'fpn/inceptionnext_t', 'mini/fpn_inceptionnext_a'])
def test_the_samples_of_a_recipe(recipe, mini_root):
    """Through its whole training pipeline, of files."""
    samples = []
    for faster in (False, True):
        dataset = read_config(recipe).train_dataloader.dataset
        if faster:
            use_faster_transforms(dataset)
        pipeline = Compose(dataset.pipeline)
        names = {type(transform).__name__ for transform in pipeline.transforms}
        assert ('CountingRandomCrop' in names) == ('TablePhotoMetricDistortion' in names) == faster
        np.random.seed(3)
        found = [pipeline(sample) for sample in files(mini_root)]
        samples.append([(each['inputs'], each['data_samples'].gt_sem_seg.data) for each in found])
    for ours, theirs in zip(*samples, strict=True):
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def files(root) -> list[dict]:
    return [
        dict(img_path=str(image), seg_map_path=str(root / 'annotations/training' / f'{image.stem}.png'),
             label_map=None, reduce_zero_label=True, seg_fields=[], sample_idx=i)
        for i, image in enumerate(sorted((root / 'images/training').iterdir()) * 5)
    ]  # fmt: skip


def test_a_run_takes_them_and_its_config_keeps_mmsegs_names(tmp_path, mini_root):
    cfg = load_config(ROOT / 'tests/configs/fpn_tiny.py', tmp_path / 'work', mini_root)
    loader = SafeRunner.from_cfg(cfg).build_dataloader(cfg.train_dataloader)
    names = [type(transform).__name__ for transform in loader.dataset.pipeline.transforms]
    assert 'CountingRandomCrop' in names and 'TablePhotoMetricDistortion' in names
    assert 'RandomCrop' in {transform.type for transform in cfg.train_dataloader.dataset.pipeline}
