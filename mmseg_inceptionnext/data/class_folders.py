"""Check the images of a classifier: a folder for each class."""

from __future__ import annotations

from mmengine import fileio
from mmengine.config import Config

from mmseg_inceptionnext.data.pipeline import displayed_path, leaf_datasets
from mmseg_inceptionnext.errors import MissingFile, UserError

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # mmpretrain's


def check_class_folders(cfg: Config, *splits: str) -> None:
    """Check the data sets of some dataloaders of a classifier, where they are folders; lists of images are not read.

    Args:
        cfg: A whole config.
        splits: Some of 'train', 'val' and 'test'; those that the config does not have are skipped.

    Raises:
        UserError: No data root, no folders of classes, no image, another number of classes than the head has, or other
            classes than another split.
    """
    number = cfg.model.head.num_classes
    for name in ('val_evaluator', 'test_evaluator'):
        evaluators = cfg.get(name) or []
        for metric in [evaluators] if isinstance(evaluators, dict) else evaluators:
            topk = metric.get('topk') or ()
            if max([topk] if isinstance(topk, int) else topk, default=0) > number:
                raise UserError(f'{name}.topk={topk} needs as many classes, there are {number}: set it to 1')
    found: dict[str, list[str]] = {}
    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        for dataset_cfg in leaf_datasets(dataloader.dataset) if dataloader else ():
            if dataset_cfg.type == 'CustomDataset' and not dataset_cfg.get('ann_file'):
                found[_folder(dataset_cfg)] = classes = _classes(dataset_cfg)
                if len(classes) != number:
                    raise UserError(
                        f'model.head.num_classes is {number}, but {displayed_path(_folder(dataset_cfg))} has '
                        f'{len(classes)} folders, one for each class: pass `--cfg-options '
                        f'model.head.num_classes={len(classes)}`'
                    )
    (first, classes), *others = found.items() or [('', [])]
    for folder, names in others:
        if odd := sorted(set(names) ^ set(classes)):
            raise UserError(
                f'{displayed_path(folder)} has other classes than {displayed_path(first)}, such as {odd[0]!r}: labels '
                'are numbered by the names of the folders, so both need the same ones'
            )


def _folder(dataset_cfg: dict) -> str:
    prefix = dataset_cfg.get('data_prefix', '')
    prefix = prefix.get('img_path', '') if isinstance(prefix, dict) else prefix
    return fileio.join_path(dataset_cfg.get('data_root') or '', prefix)


def _classes(dataset_cfg: dict) -> list[str]:
    """List the folders of the classes of a data set."""
    root, folder = dataset_cfg.get('data_root'), _folder(dataset_cfg)
    how = 'pass data_root=DIR, the folder of train and val, each with a folder of images for each class'
    if root and not fileio.isdir(root):
        raise MissingFile(f'no data set at {displayed_path(root)}: {how}')
    if not fileio.isdir(folder):
        raise MissingFile(f'no folder {displayed_path(folder)} in the data set: {how}')
    classes = sorted(fileio.list_dir_or_file(folder, list_file=False))
    if not classes:
        raise MissingFile(f'{displayed_path(folder)} has no folders of classes: {how}')
    for name in classes:
        files = fileio.list_dir_or_file(fileio.join_path(folder, name), list_dir=False, recursive=True)
        if not any(file.lower().endswith(_SUFFIXES) for file in files):
            raise MissingFile(f'{displayed_path(fileio.join_path(folder, name))} has no image: remove it, or add some')
    return classes
