"""Check that a data set fits its config, before training starts."""

from __future__ import annotations

import difflib
import itertools
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from mmseg_inceptionnext.config_files import heads, is_classifier
from mmseg_inceptionnext.data.class_folders import check_class_folders
from mmseg_inceptionnext.data.mask_coding import mask_counts, named_errors, open_mask
from mmseg_inceptionnext.data.mask_dataset import MaskDataset
from mmseg_inceptionnext.data.pipeline import displayed_path, leaf_datasets
from mmseg_inceptionnext.data.sampling import evenly_spread
from mmseg_inceptionnext.data.unnamed_codes import UnnamedCodes
from mmseg_inceptionnext.errors import BadSample, MissingFile, UnreadableFile, UserError
from mmseg_inceptionnext.folders import check_links
from mmseg_inceptionnext.images import local_or_content

_HOW_TO_GET_ADE20K = (
    'pass data_root=DIR, or unpack ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu) there; '
    '`python -m mmseg_inceptionnext mini-ade20k --out DIR` makes a small data set to try'
)
_MOST_LISTED = 10000  # files of a folder whose suffixes are counted
_META_KEYS = ('classes', 'palette')
_SAMPLE = 32  # masks that are read before a training, evenly spread


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data sets of some dataloaders exist, and have as many classes as the heads.

    Args:
        cfg: A whole config.
        splits: Some of 'train', 'val' and 'test'; those that the config does not have are skipped.

    Raises:
        UserError: No data root, no image in a split, an image without annotation, or another number of classes; for a
            classifier, what :func:`~mmseg_inceptionnext.data.class_folders.check_class_folders` finds.
    """
    if is_classifier(cfg):
        check_class_folders(cfg, *splits)
        return
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
    check_links([s['img_path'] for s in samples])
    check_links([s['seg_map_path'] for s in samples if 'seg_map_path' in s])
    for fault in head_faults(model_cfg, len(dataset.metainfo['classes'])):
        raise UserError(fault)
    _check_masks(dataset, [sample for sample in samples if 'seg_map_path' in sample])


def _check_masks(dataset: BaseSegDataset, samples: list[dict]) -> None:
    """Open a sample of masks: what changes ids, or is not named in the data file, is an error before a training."""
    unnamed = UnnamedCodes(dataset.coding) if isinstance(dataset, MaskDataset) else None
    for sample in evenly_spread(samples, _SAMPLE):
        path = sample['seg_map_path']
        try:
            with named_errors(path), open_mask(local_or_content(path, dataset.backend_args)) as mask:
                if unnamed:
                    unnamed.add(sample['img_path'], path, mask_counts(mask, dataset.coding.is_colour))
        except Exception as error:  # damaged: training names the file, or replaces it if it is asked to
            if isinstance(error, BadSample) and not isinstance(error, UnreadableFile):
                raise
    if unnamed and (faults := unnamed.faults()):
        raise UserError(f'{"; ".join(faults)} (a sample was read: `check` reads all)')


def open_dataset(dataset_cfg: dict) -> BaseSegDataset:
    """Build the data set of a config without its pipeline; its files are not listed yet.

    Raises:
        UserError: Its root, one of its folders or its list of images does not exist, or its ``metainfo`` is wrong.
    """
    _check_metainfo(dataset_cfg)
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


def _check_metainfo(dataset_cfg: dict) -> None:
    """Check the names and colours that a config gives; mmengine takes a string for the path of a file, or its letters.

    Names must be those of the data set's class, if that has any: mmseg takes them for a choice among them.
    """
    meta, kind = dataset_cfg.get('metainfo') or {}, DATASETS.get(dataset_cfg['type'])
    names, palette = meta.get('classes'), meta.get('palette')
    for key in meta:
        if key not in _META_KEYS and (close := difflib.get_close_matches(key.lower(), _META_KEYS, n=1)):
            raise UserError(f'metainfo has the key {key!r}, which nobody reads: did you mean {close[0]!r}?')
    if isinstance(names, str) and not os.path.isfile(names):
        raise UserError(f'metainfo.classes={names!r} is a string, and no file: write a list, [{names!r}]')
    if names is None or isinstance(names, str):
        return
    if len(set(names)) < len(names):
        raise UserError(f'metainfo.classes names {next(n for n in names if list(names).count(n) > 1)!r} twice')
    known = (getattr(kind, 'METAINFO', None) or {}).get('classes')
    if known and (odd := [name for name in names if name not in known]):
        close = difflib.get_close_matches(str(odd[0]), list(known), n=1)
        meant = f'did you mean {close[0]!r}? ' if close else ''
        raise UserError(
            f'metainfo.classes has {odd[0]!r}, which is no class of {kind.__name__}: {meant}For other classes take '
            '`--data FILE`, or type=BaseSegDataset'
        )
    if palette is None:
        return
    if len(palette) not in (len(names), len(known or names)):
        raise UserError(f'metainfo.palette has {len(palette)} colours for {len(names)} classes: give one for each')
    for colour in palette:
        if np.shape(colour) != (3,) or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise UserError(f'metainfo.palette has {colour!r}: a colour is [red, green, blue], each from 0 to 255')


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
        folder = dataset.data_prefix['img_path']
        raise MissingFile(f'no {suffix}image in {displayed_path(folder)}{_what_is_there(dataset, folder)}')
    return samples


def _what_is_there(dataset: BaseSegDataset, folder: str) -> str:
    """Say which suffixes the files in a folder have."""
    files = fileio.list_dir_or_file(folder, list_dir=False, recursive=True, backend_args=dataset.backend_args)
    suffixes = Counter(os.path.splitext(name)[1] or 'no suffix' for name in itertools.islice(files, _MOST_LISTED))
    if not suffixes:
        return ', which is empty'
    there = ', '.join(f'{number} × {suffix}' for suffix, number in suffixes.most_common(5))
    hint = '' if isinstance(dataset, MaskDataset) else ': set img_suffix'
    return f', where there are {there}{hint}'


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
