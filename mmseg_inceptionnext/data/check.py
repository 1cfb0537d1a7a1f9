"""Check that a data set fits its config, before training starts."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mmengine import fileio
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_inceptionnext.config_files import heads
from mmseg_inceptionnext.data.mask_coding import mask_counts
from mmseg_inceptionnext.data.mask_dataset import MaskDataset
from mmseg_inceptionnext.data.pipeline import displayed_path, leaf_datasets
from mmseg_inceptionnext.data.sampling import evenly_spread
from mmseg_inceptionnext.data.unnamed_codes import UnnamedCodes
from mmseg_inceptionnext.errors import BadSample, MissingFile, UserError

_HOW_TO_GET_ADE20K = (
    'pass data_root=DIR, or unpack ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu) there; '
    '`python -m mmseg_inceptionnext mini-ade20k --out DIR` makes a small data set to try'
)
_SAMPLE = 32  # masks that are read before a training, evenly spread


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data sets of some dataloaders exist, and have as many classes as the heads.

    Args:
        cfg: A whole config.
        splits: Some of 'train', 'val' and 'test'; those that the config does not have are skipped.

    Raises:
        UserError: No data root, no image in a split, an image without annotation, or another number of classes.
    """
    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        for dataset_cfg in leaf_datasets(dataloader.dataset) if dataloader else ():
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
    if isinstance(dataset, MaskDataset):
        _check_masks(dataset, [sample for sample in samples if 'seg_map_path' in sample])


def _check_masks(dataset: MaskDataset, samples: list[dict]) -> None:
    """Read a sample of masks: what the data file does not name is an error before anything is trained."""
    unnamed = UnnamedCodes(dataset.coding)
    for sample in evenly_spread(samples, _SAMPLE):
        path = sample['seg_map_path']
        try:
            with Image.open(path) as mask:
                counts = mask_counts(mask, dataset.coding.is_colour)
        except BadSample as error:
            raise BadSample(f'{path} {error}') from error
        except Exception:  # damaged; training names the file, or replaces it if it is asked to
            continue
        unnamed.add(sample['img_path'], path, counts)
    if faults := unnamed.faults():
        raise UserError(f'{"; ".join(faults)} (a sample was read: `check` reads all)')


def open_dataset(dataset_cfg: dict) -> BaseSegDataset:
    """Build the data set of a config without its pipeline; its files are not listed yet.

    Raises:
        UserError: Its root, one of its folders or its list of images does not exist.
    """
    backend = dict(backend_args=dataset_cfg.get('backend_args'))
    root = dataset_cfg.get('data_root')
    if root and not fileio.isdir(root, **backend):
        raise MissingFile(f'no data set at {displayed_path(root)}: {_how_to_get(dataset_cfg)}')
    dataset = DATASETS.build(dict(dataset_cfg, pipeline=[], lazy_init=True))
    for folder in (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path')):
        if folder and not fileio.isdir(folder, **backend):
            raise MissingFile(f'no folder {displayed_path(folder)} in the data set: {_how_to_get(dataset_cfg)}')
    if dataset.ann_file and not fileio.exists(dataset.ann_file, **backend):
        raise MissingFile(f'no list of images at {displayed_path(dataset.ann_file)}: correct ann_file')
    return dataset


def _how_to_get(dataset_cfg: dict) -> str:
    is_ade20k = str(dataset_cfg.get('type')).endswith('ADE20KDataset')
    return _HOW_TO_GET_ADE20K if is_ade20k else 'pass data_root=DIR, or correct the folders in the config'


def list_samples(dataset: BaseSegDataset) -> list[dict]:
    """List mmseg's info of each sample, with ``img_path`` and, if the data set has annotations, ``seg_map_path``.

    Raises:
        UserError: There is no sample.
    """
    samples = dataset.load_data_list()
    if not samples:
        suffix = '' if isinstance(dataset, MaskDataset) else f'*{dataset.img_suffix} '
        raise MissingFile(f'no {suffix}image in {displayed_path(dataset.data_prefix["img_path"])}')
    return samples


def list_annotations(dataset: BaseSegDataset) -> set[str]:
    """List the paths of all files in a data set's folder of annotations, in the form of ``seg_map_path``."""
    folder = dataset.data_prefix.get('seg_map_path')
    listed = dict(list_dir=False, suffix='', recursive=True, backend_args=dataset.backend_args)
    if isinstance(dataset, MaskDataset):
        return dataset.list_masks() if folder is not None else set()
    names = fileio.list_dir_or_file(folder, **listed) if folder else ()
    return {os.path.join(folder, name) for name in names}


def head_faults(model_cfg: dict, num_classes: int) -> Iterator[str]:
    """Yield a line for each of a model's heads that has another number of classes than the data set."""
    for name, head in heads(model_cfg):
        if head.get('num_classes') != num_classes:
            yield f'model.{name}.num_classes is {head.get("num_classes")}, but the data set has {num_classes} classes'
