"""Describe a segmentor's labels: names, colours, and how they are coded in files."""

from __future__ import annotations

import colorsys
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmseg.datasets import ADE20KDataset
from torch import Tensor

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.errors import UserError

IGNORE_INDEX = 255  # ignore_index: pixels without a class, never in files
_IGNORE_INDEX_16_BIT = 65535  # where 255 is the label of a class

_MOST_CLASSES = 2**15 - 1  # labels are int16
_LONGEST_NAME = 200  # legends have it in one line

# What a file holds at the pixels of a class: an id, or a colour.
Code = int | tuple[int, int, int]

_HELP = "pass classes='ade20k', or a file with one class a line, as NAME or NAME #RRGGBB"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; a label is an index into them.

    Attributes:
        names: Name of each class.
        palette: RGB of each class, 0 … 255.
        codes: What label maps in files hold for each class: ids, or colours (RGB). Default: the label + 1, as in
            ADE20K, where 0 is unlabelled.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    codes: tuple[Code, ...] = ()

    def __post_init__(self):
        if not self.codes:
            object.__setattr__(self, 'codes', tuple(range(1, len(self.names) + 1)))

    @property
    def reduce_zero_label(self) -> bool:
        """Whether label maps in files hold the label + 1."""
        return self.codes == tuple(range(1, len(self.names) + 1))

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return a label map in the coding of the data set's annotations.

        Args:
            labels: (H, W) labels.

        Returns:
            (H, W) ids, uint8, or uint16 where one is above 255; or (H, W, 3) uint8, RGB, if the codes are colours.
        """
        codes = np.asarray(self.codes)
        return codes.astype(np.uint8 if codes.max() < 256 else np.uint16)[labels]


def ignore_index_of(num_classes: int) -> int:
    """Return the label of pixels without a class: 255, or 65535 for more than 255 classes."""
    return IGNORE_INDEX if num_classes <= IGNORE_INDEX else _IGNORE_INDEX_16_BIT


def label_array(labels: Tensor) -> np.ndarray:
    """Return a label map (1, H, W) of mmseg as (H, W) integers; that of a head with one output channel is float32."""
    return labels.squeeze(0).to('cpu', torch.int64).numpy()


def classes_of_checkpoint(checkpoint: dict, path: str | Path) -> Classes:
    """Return the classes that mmengine wrote into a checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for messages.

    Raises:
        UserError: The checkpoint does not say what its classes are.
    """
    try:
        return classes_of_meta(dataset_meta(checkpoint))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f'{path} does not say what its classes are: {_HELP}') from error


def classes_of_meta(meta: Mapping) -> Classes:
    """Return the classes of a data set's ``metainfo``.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: It has none, or not a colour and a code for each.
    """
    names = tuple(str(name).strip() for name in meta['classes'])
    palette = tuple((int(red), int(green), int(blue)) for red, green, blue in meta['palette'])
    codes = codes_of_meta(meta, len(names))
    if not 0 < len(names) == len(palette) == len(codes) <= _MOST_CLASSES:
        raise ValueError(f'{len(names)} classes, {len(palette)} colours, {len(codes)} codes')
    if longest := next((name for name in names if len(name) > _LONGEST_NAME), None):
        raise ValueError(f'a class is called {longest[:20]}…, {len(longest)} characters')
    are_colours = isinstance(codes[0], tuple)
    if not _are_colours(palette) or not (_are_colours(codes) if are_colours else _are_ids(codes)):
        raise ValueError('a colour or a code is out of range')
    return Classes(names, palette, codes)


def _are_colours(values: Sequence) -> bool:
    return all(
        isinstance(value, tuple) and len(value) == 3 and 0 <= min(value) <= max(value) <= 255 for value in values
    )


def _are_ids(values: Sequence) -> bool:
    return all(isinstance(value, int) and 0 <= value <= 65535 for value in values)  # see Classes.encode


def check_same_classes(checkpoint: dict, path: str | Path, names: Sequence[str]) -> None:
    """Check that a data set has the classes that a checkpoint was trained on; other names are a warning.

    Args:
        checkpoint: Content of the checkpoint; without names of classes, there is nothing to compare.
        path: Path of the checkpoint, for messages.
        names: Names of the data set's classes.

    Raises:
        UserError: They are the same in another order, so that every class would be taken for another.
    """
    check_same_names(dataset_meta(checkpoint).get('classes') or (), path, names)


def check_same_names(trained: Sequence[str], path: str | Path, names: Sequence[str]) -> None:
    """Do the same as :func:`check_same_classes`, given the names of the classes of the training."""
    theirs = [str(name).strip() for name in trained]
    ours = [name.strip() for name in names]
    if len(theirs) != len(ours) or theirs == ours:
        return
    index = next(i for i, (there, here) in enumerate(zip(theirs, ours, strict=True)) if there != here)
    text = f'{path} was trained on other classes than the data set has: {theirs[index]!r} is {ours[index]!r} here'
    if sorted(theirs) == sorted(ours):
        raise UserError(f'{text}, and all are in another order: give them in the order of the config of that run')
    say(f'{text}. The figures compare classes by their order', logging.WARNING)


def codes_of_meta(meta: Mapping, num_classes: int) -> tuple[Code, ...]:
    """Return what annotations hold for each class of a data set, given its ``metainfo``.

    It says so under ``codes`` (:class:`~mmseg_inceptionnext.data.mask_dataset.MaskDataset`), or by mmseg's
    ``reduce_zero_label`` and, for a subset of the classes, ``label_map``. Where it says nothing, the codes are the
    labels + 1.
    """
    if meta.get('codes'):
        return tuple(int(code) if np.ndim(code) == 0 else tuple(map(int, code)) for code in meta['codes'])
    shift = int(bool(meta.get('reduce_zero_label', True)))
    label_map = meta.get('label_map')
    ids = {label: old for old, label in label_map.items()} if isinstance(label_map, dict) else {}
    return tuple(int(ids.get(label, label)) + shift for label in range(num_classes))


def codes_of_checkpoint(checkpoint: dict, num_classes: int) -> tuple[Code, ...]:
    """Return the codes of a checkpoint's data set, see :func:`codes_of_meta`; none if it does not have that many."""
    try:
        codes = codes_of_meta(dataset_meta(checkpoint), num_classes)
    except (TypeError, ValueError, OverflowError):
        return ()
    return codes if len(codes) == num_classes else ()


def dataset_meta(checkpoint: dict) -> dict:
    """Return what a checkpoint says about its data set; of mmseg 0.x that is names and colours."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict):
        return {}
    found = meta.get('dataset_meta') or {key: meta.get(key.upper()) for key in ('classes', 'palette')}
    return found if isinstance(found, dict) else {}


def read_classes(source: str | Path) -> Classes:
    """Return the classes of a named data set, or read them from a file.

    Args:
        source: 'ade20k', or path of a text file with one class a line: its name, and optionally its colour as #RRGGBB.
            Classes without one get distinct colours.

    Raises:
        UserError: There is no such file, or it holds no classes.
    """
    if str(source) == 'ade20k':
        meta = ADE20KDataset.METAINFO
        names = tuple(name.strip() for name in meta['classes'])
        return Classes(names, tuple(map(tuple, meta['palette'])))
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding='utf-8-sig').splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read classes from {source} ({error}): {_HELP}') from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f'{source} holds no classes: {_HELP}')
    names, palette = [], []
    for index, line in enumerate(lines):
        name, colour = re.fullmatch(r'(.*?)(?:[\s,]+#([0-9a-fA-F]{6}))?', line).groups()
        if not name or name.split()[-1].startswith('#'):
            raise UserError(f'{source}: {line!r} is neither NAME nor NAME #RRGGBB')
        names.append(name)
        palette.append(tuple(bytes.fromhex(colour)) if colour else distinct_colour(index))
    if len(set(names)) < len(names):
        raise UserError(f'{source} names {next(n for n in names if names.count(n) > 1)!r} twice: names must differ')
    return Classes(tuple(names), tuple(palette))


def check_num_classes(classes: Sequence, expected: int, source: str) -> None:
    """Check that there are as many classes as the model has outputs.

    Raises:
        UserError: The numbers differ.
    """
    if len(classes) != expected:
        raise UserError(f'{source} names {len(classes)} classes, but the model has {expected}: {_HELP}')


def distinct_colour(index: int) -> tuple[int, int, int]:
    """Return a colour whose hue is a golden-ratio step from the previous one: no two near indices look alike."""
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 if index % 2 else 0.65, 0.95)
    return tuple(round(255 * value) for value in rgb)
