"""Draft a data file from what lies in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mmseg_inceptionnext.data.data_file import SPLITS
from mmseg_inceptionnext.data.mask_coding import colour_of, mask_counts, named_errors, open_mask
from mmseg_inceptionnext.data.sampling import evenly_spread
from mmseg_inceptionnext.errors import MissingFile, UserError
from mmseg_inceptionnext.images import list_image_files
from mmseg_inceptionnext.labels import Code

_SAMPLE = 50  # masks that are read for their ids
_MOST_COLOURS = 256  # more are no classes, but shades
_SPLIT_NAMES = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test', 'testing')}


@dataclass
class _Layout:
    """Folders of images and masks by split, relative to the root, and a list of names where there is one."""

    name: str
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)


def draft_data_file(folder: str | Path) -> str:
    """Return a data file for a folder, as text, with the ids or colours that a sample of its masks holds.

    The layouts that are known are ADE20K's, ``images/train`` with ``masks/train``, ``train`` with ``trainannot``,
    Cityscapes', VOC's, and one folder with ``_mask`` names. The names of the classes are left to fill in.

    Args:
        folder: The folder of the data set.

    Raises:
        UserError: There is no such folder, or its layout is none of these.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MissingFile(f'no folder at {root.absolute()}')
    layout = _find_layout(root)
    masks = _sample_masks(root, layout)
    if not masks:
        raise MissingFile(f'no mask in {root / layout.splits["train"][1]}')
    is_colour, counts = _count(masks)
    keys = 'images', 'masks', 'list'
    splits = {name: dict(zip(keys, found, strict=False)) for name, found in layout.splits.items()}
    content = dict(path=str(root.absolute()), **splits)
    lines = [f'# {layout.name}; {len(masks)} masks were read. Replace the names of the classes by yours.']
    lines.append(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True).rstrip())
    if 'val' not in splits:
        lines.append('val_fraction: 0.1')
    return '\n'.join([*lines, *_class_lines(is_colour, counts)]) + '\n'


def ignoring(path: str | Path, codes: Sequence[Code] = ()) -> str:
    """Return the text of a data file that ignores more ids or colours, and holds in any folder."""
    content = yaml.safe_load(Path(path).read_text(encoding='utf-8-sig'))
    folder = Path(path).absolute().parent
    content['path'] = str(Path(folder, Path(content.get('path', '.')).expanduser()).resolve())
    if isinstance(content.get('classes'), str):
        content['classes'] = str(folder / content['classes'])
    more = [list(code) if isinstance(code, (list, tuple)) else code for code in codes]
    content['ignore_classes'] = [*(content.get('ignore_classes') or []), *more]
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _find_layout(root: Path) -> _Layout:
    for find in (_cityscapes, _voc, _parallel_folders, _suffixed_folders, _one_folder):
        if layout := find(root):
            return layout
    raise UserError(
        f'{root} has none of the layouts that are known (images/train + masks/train, train + trainannot, ADE20K, '
        'Cityscapes, VOC, one folder with _mask names): write the data file by hand'
    )


def _cityscapes(root: Path) -> _Layout | None:
    images = {split: root / 'leftImg8bit' / split for split in ('train', 'val', 'test')}
    if not images['train'].is_dir() or not (root / 'gtFine').is_dir():
        return None
    # …/leftImg8bit/train/aachen/aachen_0_leftImg8bit.png and …/gtFine/train/aachen/aachen_0_gtFine_labelIds.png
    template = 'gtFine/{}/{{image_path.parent.name}}/{{image_path.stem[:-12]}}_gtFine_labelIds.png'
    found = {split: (f'leftImg8bit/{split}', template.format(split)) for split, path in images.items() if path.is_dir()}
    return _Layout('Cityscapes', found)


def _voc(root: Path) -> _Layout | None:
    if not (root / 'JPEGImages').is_dir() or not (root / 'SegmentationClass').is_dir():
        return None
    folders = 'JPEGImages', 'SegmentationClass'  # most images of the first have no mask in the second
    lists = {split: f'ImageSets/Segmentation/{split}.txt' for split in SPLITS}
    splits = {split: (*folders, file) for split, file in lists.items() if (root / file).is_file()}
    return _Layout('VOC', splits if 'train' in splits else {'train': folders})


def _parallel_folders(root: Path) -> _Layout | None:
    for images in ('images', 'image', 'imgs', 'img'):
        for masks in ('masks', 'mask', 'annotations', 'labels', 'gt'):
            if not (list_image_files(root / images) and list_image_files(root / masks)):
                continue
            splits = _splits(root, f'{images}/{{}}', f'{masks}/{{}}')
            is_ade20k = splits.get('train') == ('images/training', 'annotations/training')
            name = 'ADE20K' if is_ade20k else f'{images} with {masks}'
            return _Layout(name, splits if 'train' in splits else {'train': (images, masks)})
    return None


def _suffixed_folders(root: Path) -> _Layout | None:
    templates = [
        ('{}', f'{{}}{suffix}') for suffix in ('annot', '_masks', '_labels', 'masks', 'labels', '_annotations')
    ]
    for images, masks in (*templates, ('{}/images', '{}/masks')):
        splits = _splits(root, images, masks)
        if 'train' in splits:
            return _Layout(f'{images.format("train")} with {masks.format("train")}', splits)
    return None


def _splits(root: Path, images: str, masks: str) -> dict[str, tuple[str, str]]:
    """Return the folders of each split that is there, given templates of their names."""
    found: dict[str, tuple[str, str]] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            folders = images.format(name), masks.format(name)
            if all((root / folder).is_dir() for folder in folders):
                found.setdefault(split, folders)
    return found


def _one_folder(root: Path) -> _Layout | None:
    for suffix in ('_mask', '_label', '_gt', '-mask'):
        found = [path for path in list_image_files(root) if path.stem.endswith(suffix)]
        if found:
            template = f'{{image_path.parent}}/{{image_path.stem}}{suffix}{found[0].suffix}'
            return _Layout(f'one folder, masks end in {suffix}', {'train': ('.', template)})
    return None


def _sample_masks(root: Path, layout: _Layout) -> list[Path]:
    masks = layout.splits['train'][1]
    folder, template, _ = masks.partition('{')
    tail = masks.rpartition('}')[2] if template else ''
    where = root / (folder.rpartition('/')[0] if template else masks)
    return evenly_spread([path for path in list_image_files(where) if path.name.endswith(tail)], _SAMPLE)


def _count(masks: list[Path]) -> tuple[bool, dict[int, float]]:
    """Return whether masks hold colours, and the share of the pixels of each id or colour."""
    with named_errors(masks[0]), open_mask(masks[0]) as first:
        is_colour = len(first.getbands()) > 1
    pixels: Counter[int] = Counter()
    for path in masks:
        with named_errors(path), open_mask(path) as mask:
            pixels.update(mask_counts(mask, is_colour))
        if is_colour and len(pixels) > _MOST_COLOURS:
            raise UserError(f'{path}: the masks hold more than {_MOST_COLOURS} colours, which are no classes then')
    total = sum(pixels.values())
    return is_colour, {number: pixels[number] / total for number in sorted(pixels)}


def _class_lines(is_colour: bool, shares: dict[int, float]) -> list[str]:
    lines = ['classes:']
    for i, (number, share) in enumerate(shares.items()):
        if is_colour:
            entry = f'  {i}: {{name: class_{i}, labels: [{list(colour_of(number))}]}}'
        elif number == 255 and len(shares) > 2:
            continue  # ignored, unless a class names it
        else:
            entry = f'  {number}: class_{number}'
        lines.append(f'{entry}  # {share:.2%} of the pixels')
    lines.append('ignore_classes: []')
    return lines
