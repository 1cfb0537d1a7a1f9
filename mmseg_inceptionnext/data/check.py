"""Refuse a data set that does not fit before it costs a training run."""

from __future__ import annotations

from pathlib import Path

import mmengine
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from mmseg_inceptionnext.data.pipeline import leaves
from mmseg_inceptionnext.errors import BadSample, UserError

_HOW_TO_GET = (
    'pass --data-root, or unpack ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu) there; '
    'tools/make_mini_ade20k.py makes a small data set to try'
)


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
            if stored.mode[0] in 'IF' and stored.getextrema()[1] > 255:
                raise BadSample(f'{path} has label {stored.getextrema()[1]}: an annotation has 8 bits')
        if labels.ndim < 2:  # LoadAnnotations squeezes them
            raise BadSample(f'{path} is one pixel wide or high: correct the annotation')
        if labels.ndim != 2:
            raise BadSample(f'{path} has {labels.shape[2]} channels: an annotation has one, which holds class ids')
        if labels.shape != tuple(results['ori_shape']):
            height, width = results['ori_shape']
            raise BadSample(
                f'{path} is {labels.shape[1]}×{labels.shape[0]}, but {results["img_path"]} is {width}×{height}'
            )
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        wrong = [int(label) for label in present if self.num_classes <= label < 255]
        if wrong:
            shift = 1 if results['reduce_zero_label'] else 0
            raise BadSample(
                f'{path} has label {wrong[0] + shift}, outside {shift} … {self.num_classes - 1 + shift} of '
                f'{self.num_classes} classes: correct the annotation, or set num_classes'
            )
        return results


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
    if root := dataset_cfg.get('data_root'):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f'no data set at {root.absolute()}: {_HOW_TO_GET}')
    dataset = DATASETS.build(dict(dataset_cfg, pipeline=[], lazy_init=True))
    images, annotations = (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    for folder in filter(None, (images, annotations)):
        if not Path(folder).is_dir():
            raise UserError(f'no folder {Path(folder).absolute()} in the data set: {_HOW_TO_GET}')

    samples = dataset.load_data_list()
    if not samples:
        raise UserError(f'no *{dataset.img_suffix} image in {Path(images).absolute()}')
    if annotations:
        found = set(mmengine.list_dir_or_file(annotations, list_dir=False, suffix='', recursive=True))
        missing = [s for s in samples if str(Path(s['seg_map_path']).relative_to(annotations)) not in found]
        if missing:
            raise UserError(
                f'{len(missing)} of {len(samples)} images have no annotation, the first {missing[0]["img_path"]}: '
                f'expected {missing[0]["seg_map_path"]}'
            )

    num_classes = len(dataset.metainfo['classes'])
    for name in ('decode_head', 'auxiliary_head'):
        heads = model_cfg.get(name) or []
        for head in heads if isinstance(heads, list) else [heads]:
            if head.get('num_classes') != num_classes:
                raise UserError(
                    f'model.{name}.num_classes is {head.get("num_classes")}, but the data set has {num_classes} classes'
                )
