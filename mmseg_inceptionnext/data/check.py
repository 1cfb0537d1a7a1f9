"""Refuse a data set that does not fit before it costs a training run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import mmengine
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from mmseg_inceptionnext.data.pipeline import leaves
from mmseg_inceptionnext.errors import BadSample, UserError

_HOW_TO_GET = (
    'pass --data-root, or unpack ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu) there; '
    '`python -m mmseg_inceptionnext mini-ade20k --out DIR` makes a small data set to try'
)

# LoadAnnotations squeezes what it reads.
THIN_FAULT = 'is one pixel wide or high: correct the annotation'


@TRANSFORMS.register_module()
class CheckAnnotation(BaseTransform):
    """Stands after LoadAnnotations and stops on a label map that would fail later, or worse, not fail.

    On a GPU, a label out of range ends in a device-side assert that names nothing.

    Args:
        num_classes: Labels 0 … num_classes - 1 are valid, and 255 is ignored.

    Raises:
        BadSample: naming the file, if it has several channels, another size than its image, or other labels.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict:
        labels, path = results['gt_seg_map'], results['seg_map_path']
        with Image.open(path) as stored:  # LoadAnnotations has cast it to 8 bits, whatever it was
            if fault := depth_fault(stored):
                raise BadSample(f'{path} {fault}')
        if labels.ndim < 2:
            raise BadSample(f'{path} {THIN_FAULT}')
        if labels.ndim > 2:
            raise BadSample(f'{path} {channels_fault(labels.shape[2])}')
        if labels.shape != tuple(results['ori_shape']):
            raise BadSample(f'{path} {size_fault(labels.shape[::-1], results["img_path"], results["ori_shape"][::-1])}')
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        wrong = [int(label) for label in present if self.num_classes <= label < 255]
        if wrong:
            shift = int(results['reduce_zero_label'])
            raise BadSample(f'{path} {label_fault(wrong[0] + shift, self.num_classes, shift)}')
        return results


def depth_fault(stored: Image.Image) -> str | None:
    """What is wrong with an annotation whose labels do not fit into 8 bits; None if they do."""
    if stored.mode[0] in 'IF' and stored.getextrema()[1] > 255:
        return f'has label {stored.getextrema()[1]}: an annotation has 8 bits'
    return None


def channels_fault(channels: int) -> str:
    return f'has {channels} channels: an annotation has one, which holds class ids'


def size_fault(size: Sequence[int], image: str, image_size: Sequence[int]) -> str:
    """Of sizes (width, height)."""
    return f'is {size[0]}×{size[1]}, but {image} is {image_size[0]}×{image_size[1]}'


def label_fault(label: int, num_classes: int, first: int) -> str:
    """Of a label as it is in the file, where the classes begin with ``first``."""
    return (
        f'has label {label}, outside {first} … {num_classes - 1 + first} of {num_classes} classes: '
        'correct the annotation, or set num_classes'
    )


def check_data(cfg: Config, *splits: str) -> None:
    """Make sure that the data sets of some dataloaders are there and that the heads have as many classes.

    Args:
        cfg: A whole config.
        splits: Of 'train', 'val' and 'test'; one that the config does not have is left out.

    Raises:
        UserError: no data root, no image in a split, an image without its annotation, or another number of classes.
    """
    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        for dataset_cfg in leaves(dataloader.dataset) if dataloader else ():
            _check_dataset(dataset_cfg, cfg.model)


def _check_dataset(dataset_cfg: dict, model_cfg: dict) -> None:
    dataset = open_dataset(dataset_cfg)
    samples, annotations = list_samples(dataset), list_annotations(dataset)
    missing = [s for s in samples if 'seg_map_path' in s and s['seg_map_path'] not in annotations]
    if missing:
        raise UserError(
            f'{len(missing)} of {len(samples)} images have no annotation, the first {missing[0]["img_path"]}: '
            f'expected {missing[0]["seg_map_path"]}'
        )
    for fault in head_faults(model_cfg, len(dataset.metainfo['classes'])):
        raise UserError(fault)


def open_dataset(dataset_cfg: dict) -> BaseSegDataset:
    """The data set of a config, without pipeline and not listed yet.

    Raises:
        UserError: its root, one of its folders or its list of images is not there.
    """
    if root := dataset_cfg.get('data_root'):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f'no data set at {root.absolute()}: {_HOW_TO_GET}')
    dataset = DATASETS.build(dict(dataset_cfg, pipeline=[], lazy_init=True))
    for folder in (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path')):
        if folder and not Path(folder).is_dir():
            raise UserError(f'no folder {Path(folder).absolute()} in the data set: {_HOW_TO_GET}')
    if dataset.ann_file and not Path(dataset.ann_file).exists():
        raise UserError(f'no list of images at {Path(dataset.ann_file).absolute()}: correct ann_file')
    return dataset


def list_samples(dataset: BaseSegDataset) -> list[dict]:
    """mmseg's description of each pair, with ``img_path`` and, if the data set has annotations, ``seg_map_path``.

    Raises:
        UserError: there is none.
    """
    samples = dataset.load_data_list()
    if not samples:
        raise UserError(f'no *{dataset.img_suffix} image in {Path(dataset.data_prefix["img_path"]).absolute()}')
    return samples


def list_annotations(dataset: BaseSegDataset) -> set[str]:
    """Paths of all files in a data set's folder of annotations, in the form of ``seg_map_path``."""
    folder = dataset.data_prefix.get('seg_map_path')
    names = mmengine.list_dir_or_file(folder, list_dir=False, suffix='', recursive=True) if folder else ()
    return {os.path.join(folder, name) for name in names}


def head_faults(model_cfg: dict, num_classes: int) -> Iterator[str]:
    """Which of a model's heads have another number of classes than the data set."""
    for name in ('decode_head', 'auxiliary_head'):
        heads = model_cfg.get(name) or []
        for head in heads if isinstance(heads, list) else [heads]:
            if head.get('num_classes') != num_classes:
                yield (
                    f'model.{name}.num_classes is {head.get("num_classes")}, but the data set has {num_classes} classes'
                )
