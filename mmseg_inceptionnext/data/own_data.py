"""Fit a recipe to the data set of a data file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict

from mmseg_inceptionnext.config_files import dicts_inside, heads, own_settings, require
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.data.class_weights import losses_of
from mmseg_inceptionnext.data.data_file import SPLITS, DataFile, Folders, read_data_file
from mmseg_inceptionnext.data.ignore_index import use_one_ignore_index
from mmseg_inceptionnext.data.pipeline import GROUND_TRUTH_TRANSFORMS, IMAGE_LOADERS, leaf_datasets
from mmseg_inceptionnext.data.sampling import evenly_spread
from mmseg_inceptionnext.errors import UnreadableFile, UserError
from mmseg_inceptionnext.images import image_size, read_image
from mmseg_inceptionnext.labels import IGNORE_INDEX, ignore_index_of
from mmseg_inceptionnext.models.archs import resolve_metanext_arch

_SIZES_READ = 200  # images whose sizes are read to find the usual one
_IMAGES_READ = 32  # images whose values are read to find their mean
_ADE20K_IMAGES = 20210  # on which a recipe trains that does not say on how many: mmseg's own


def use_data_file(cfg: Config, source: str | Path | Mapping[str, Any]) -> list[str]:
    """Fit a config to a data set, in place: all that follows from the classes, the images and their number.

    Crop, test scale and iterations stay as they are where the config sets them itself, that is, where it differs from
    the configs that it inherits from.

    Args:
        cfg: A whole config, as it was read from its file.
        source: Data file, see :func:`~mmseg_inceptionnext.data.data_file.read_data_file`.

    Returns:
        What was set, a line each.

    Raises:
        UserError: The data file is wrong, or a split has no image.
    """
    data = read_data_file(source)
    require(cfg, 'model', *(f'{split}_dataloader' for split in SPLITS), 'val_evaluator', 'test_evaluator', 'train_cfg')
    own = own_settings(cfg)
    recipe_images = cfg.pop('train_images', _ADE20K_IMAGES)
    _set_datasets(cfg, data)
    samples = {split: list_samples(open_dataset(cfg[f'{split}_dataloader'].dataset)) for split in SPLITS}
    numbers = ', '.join(f'{len(listed)} {split}' for split, listed in samples.items())
    held_out = f', {data.val_fraction:.0%} of them held out for validation' if data.val_fraction else ''
    lines = [f'data {data.path}: {numbers} images{held_out}']
    lines += [
        *_set_classes(cfg, data),
        *_drop_class_weights(cfg, data, own),
        *_set_channels(cfg, data.channels, samples['train']),
    ]
    lines += _set_sizes(cfg, _usual_size(samples['train']), own)
    if not ({'train_cfg', 'param_scheduler'} & own.keys()):
        lines += _set_epochs(cfg, recipe_images)
    return lines


def fit_channels(model: ConfigDict) -> None:
    """Set ``in_channels`` of neck and heads to the backbone's output channels, in place; MetaNeXt's alone."""
    if model.backbone.get('type') not in ('InceptionNeXt', 'MetaNeXt'):
        return
    arch = resolve_metanext_arch(model.backbone.get('arch', 'tiny'))
    outputs = [arch.channels[i] for i in model.backbone.get('out_indices') or arch.default_out_indices]
    if model.get('neck'):
        if 'in_channels' in model.neck:
            model.neck.in_channels = outputs
        return
    for _, head in heads(model):
        index = head.get('in_index', -1)
        if 'in_channels' in head:
            head.in_channels = outputs[index] if isinstance(index, int) else [outputs[i] for i in index]


def _set_datasets(cfg: Config, data: DataFile) -> None:
    pipelines = {split: leaf_datasets(cfg[f'{split}_dataloader'].dataset)[0].pipeline for split in SPLITS}
    metainfo = dict(
        classes=[cls.name for cls in data.classes],
        palette=[list(cls.color) for cls in data.classes],
        labels=[_plain(cls.codes) for cls in data.classes],
        ignored=_plain(data.ignored),
    )
    for split in pipelines:
        chosen = split if split in data.splits else 'val' if 'val' in data.splits else 'train'
        dataset = dict(
            type='MaskDataset',
            data_root=str(data.path),
            **_prefix(data.splits[chosen]),
            metainfo=metainfo,
            ignore_index=ignore_index_of(len(data.classes)),
            pipeline=_read_masks(pipelines[split], data.channels),
        )
        if data.val_fraction and chosen == 'train':
            dataset.update(part='train' if split == 'train' else 'val', val_fraction=data.val_fraction)
        # A copy: recipes take the same dataloader for validation and test.
        cfg[f'{split}_dataloader'] = dict(copy.deepcopy(cfg[f'{split}_dataloader']), dataset=dataset)
    cfg.pop('train_pipeline', None)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # which mmseg's inference_model reads
    if cfg.get('tta_pipeline'):
        cfg.tta_pipeline = [dict(type='MultiScaleTest', pipeline=cfg.test_dataloader.dataset.pipeline)]


def _plain(codes: tuple) -> list:
    return [list(code) if isinstance(code, tuple) else code for code in codes]


def _prefix(folders: Folders) -> dict:
    """Return the arguments of MaskDataset that say where images and masks lie."""
    masks, listed = folders.masks, dict(ann_file=folders.list) if folders.list else {}
    if '{' not in masks:
        return dict(data_prefix=dict(img_path=folders.images, seg_map_path=masks), **listed)
    fixed = masks.partition('{')[0].rpartition('/')[0]
    prefix = dict(img_path=folders.images, seg_map_path=fixed or folders.images)
    return dict(data_prefix=prefix, mask_template=masks, **listed)


def _read_masks(pipeline: list[dict], channels: int) -> list[dict]:
    """Return a pipeline that reads masks of a MaskDataset, and images of some channels."""
    changed = []
    for transform in pipeline:
        if transform['type'] in GROUND_TRUTH_TRANSFORMS:
            if not any(done['type'] == 'ReadMask' for done in changed):
                changed.append(dict(type='ReadMask'))
        elif channels != 3 and transform['type'] == 'PhotoMetricDistortion':
            continue  # of colours
        elif transform['type'] in IMAGE_LOADERS and channels != 3:
            changed.append(dict(transform, type='ReadImage', channels=channels))
        else:
            changed.append(copy.deepcopy(transform))
    return changed


def _set_classes(cfg: Config, data: DataFile) -> Iterator[str]:
    number, ignore_index = len(data.classes), ignore_index_of(len(data.classes))
    for _, head in heads(cfg.model):
        if head.get('out_channels') == head.get('num_classes'):
            head.pop('out_channels', None)
        head.num_classes = number
        head.pop('ignore_index', None)
        if ignore_index != IGNORE_INDEX:
            head.ignore_index = ignore_index
    for metric in dicts_inside([cfg.val_evaluator, cfg.test_evaluator]):
        metric.pop('ignore_index', None)
    use_one_ignore_index(cfg)
    names = ', '.join(cls.name for cls in data.classes[:5]) + (', …' if number > 5 else '')
    ignored = ', '.join(str(list(code) if isinstance(code, tuple) else code) for code in data.ignored)
    yield f'{number} classes ({names}) in every head; ignored in the masks: {ignored or "nothing"}'


def _drop_class_weights(cfg: Config, data: DataFile, own: dict) -> Iterator[str]:
    """Remove weights that were made for other classes: the recipe's, or those of the data set of a saved config."""
    classes = (_leaf(own.get('train_dataloader')).get('metainfo') or {}).get('classes')
    is_of_others = classes is not None and list(classes) != [cls.name for cls in data.classes]
    dropped = False
    for name, head in heads(cfg.model):
        is_own = any('class_weight' in node for node in dicts_inside((own.get('model') or {}).get(name)))
        if not is_own or is_of_others:
            for loss in losses_of(head):
                dropped |= loss.pop('class_weight', None) is not None
    if dropped:
        yield 'class_weight, made for other classes, is left out: `--class-weights auto` weighs these'


def _set_channels(cfg: Config, channels: int, samples: list[dict]) -> Iterator[str]:
    fit_channels(cfg.model)
    if channels == 3 and cfg.model.backbone.get('in_channels', 3) == 3:
        return
    preprocessor = cfg.model.data_preprocessor
    origin = 'the averages of the colours'
    for key in ('mean', 'std'):
        if channels != 3 and len(preprocessor[key]) > 1:  # mmengine takes one value or three
            preprocessor[key] = [float(np.mean(preprocessor[key]))]
    if statistics := _statistics(samples, channels) if channels != 3 else None:
        preprocessor.mean, preprocessor.std = ([value] for value in statistics)
        origin = f'{statistics[0]:.4g} and {statistics[1]:.4g}, those of the images, which have more than 8 bits'
    preprocessor.bgr_to_rgb = channels == 3
    cfg.model.backbone.in_channels = channels
    yield f'{channels} channels: in_channels of the backbone; mean and std are {origin}'


def _statistics(samples: list[dict], channels: int) -> tuple[float, float] | None:
    """Return mean and standard deviation of the values of some images; None if they have 8 bits."""
    number = total = squares = 0
    for sample in evenly_spread(samples, _IMAGES_READ):
        try:
            pixels = read_image(sample['img_path'], channels)
        except UnreadableFile:  # the check names it
            continue
        if pixels.dtype == np.uint8:
            return None
        number += pixels.size
        total += pixels.sum(dtype=np.float64)
        squares += np.square(pixels, dtype=np.float64).sum()
    if not number:
        return None
    mean = total / number
    return float(mean), float(max(squares / number - mean**2, 1e-12) ** 0.5)


def _usual_size(samples: list[dict]) -> tuple[int, int]:
    """Return the median (width, height) of the images, in their EXIF orientation, from a sample of them."""
    sizes = []
    for sample in evenly_spread(samples, _SIZES_READ):
        try:
            sizes.append(image_size(sample['img_path']))
        except Exception:  # a damaged one, which the check names
            continue
    if not sizes:
        raise UserError(f'no image such as {samples[0]["img_path"]} can be read: `check` says why')
    return tuple(sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2])


def _set_sizes(cfg: Config, size: tuple[int, int], own: dict) -> Iterator[str]:
    """Set crop and test scale where images are smaller than the recipe's: they are not blown up."""
    long, short = max(size), min(size)
    resize = next((t for t in cfg.test_dataloader.dataset.pipeline if t['type'] == 'Resize'), None)
    if resize is None or np.shape(resize.get('scale')) != (2,):
        return
    test_long, test_short = max(resize['scale']), min(resize['scale'])
    side = min(test_short, short)
    scale = (max(test_long * side // test_short, -(-long * side // short)), side)
    is_own = {split: 'pipeline' in _leaf(own.get(f'{split}_dataloader')) for split in SPLITS}
    for split in SPLITS:
        if is_own[split]:
            continue
        for transform in cfg[f'{split}_dataloader'].dataset.pipeline:
            if transform['type'] in ('Resize', 'RandomResize') and np.shape(transform.get('scale')) == (2,):
                transform['scale'] = scale
            elif transform['type'] == 'RandomCrop':
                crop = tuple(max(32, min(limit, side // 32 * 32)) for limit in transform['crop_size'])
                transform['crop_size'] = crop
                cfg.model.data_preprocessor.size = crop
                yield f'images of {size[0]}×{size[1]}: crops of {crop[1]}×{crop[0]}'
    if not is_own['test']:
        yield f'test scale {scale[0]}×{scale[1]}: images are shrunk to fit into it, or enlarged to a side of it'


def _leaf(section: dict | None) -> dict:
    return (section or {}).get('dataset') or {}


def _set_epochs(cfg: Config, recipe_images: int) -> Iterator[str]:
    """Let the run see each image as often as the recipe sees its own; training turns that into iterations."""
    batch = (cfg.get('auto_scale_lr') or {}).get('base_batch_size') or cfg.train_dataloader.batch_size
    cfg.epochs = max(1, round(cfg.train_cfg.max_iters * batch / recipe_images))
    iterations = cfg.train_cfg.max_iters
    yield f'{cfg.epochs} epochs, as the recipe has on its {recipe_images} images; at most its {iterations} iterations'
