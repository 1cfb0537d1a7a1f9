"""Describe a segmentor's labels: names, colours, and how they are coded in files."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmseg.datasets import ADE20KDataset

from mmseg_inceptionnext.errors import UserError

IGNORE_INDEX = 255  # ignore_index: pixels without a class, never in files

_HELP = "pass classes='ade20k', or a file with one class a line, as NAME or NAME #RRGGBB"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; a label is an index into them.

    Attributes:
        names: Name of each class.
        palette: RGB of each class, 0 … 255.
        reduce_zero_label: Label maps in files hold the label + 1, and 0 is unlabelled, as in ADE20K.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    reduce_zero_label: bool = True

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return a label map in the coding of the data set's annotations, uint8, or uint16 where 8 bits are too few."""
        dtype = np.uint8 if len(self.names) < 255 else np.uint16
        return (labels + int(self.reduce_zero_label)).astype(dtype)


def classes_of_checkpoint(checkpoint: dict, path: str | Path) -> Classes:
    """Return the classes that mmengine wrote into a checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for messages.

    Raises:
        UserError: The checkpoint does not say what its classes are.
    """
    meta = _dataset_meta(checkpoint)
    try:
        names = tuple(str(name).strip() for name in meta['classes'])
        palette = tuple((int(red), int(green), int(blue)) for red, green, blue in meta['palette'])
    except (KeyError, TypeError, ValueError):
        names, palette = (), ()
    if not names or len(names) != len(palette):
        raise UserError(f'{path} does not say what its classes are: {_HELP}')
    return Classes(names, palette, reduces_zero_label(checkpoint))


def reduces_zero_label(checkpoint: dict) -> bool:
    """Return the ``reduce_zero_label`` of a checkpoint's data set; True if the checkpoint does not say."""
    return bool(_dataset_meta(checkpoint).get('reduce_zero_label', True))


def _dataset_meta(checkpoint: dict) -> dict:
    meta = checkpoint.get('meta')
    meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
    return meta if isinstance(meta, dict) else {}


def read_classes(source: str | Path, reduce_zero_label: bool = True) -> Classes:
    """Return the classes of a named data set, or read them from a file.

    Args:
        source: 'ade20k', or path of a text file with one class a line: its name, and optionally its colour as #RRGGBB.
            Classes without one get distinct colours.
        reduce_zero_label: Whether label maps in files hold label + 1.

    Raises:
        UserError: There is no such file, or it holds no classes.
    """
    if str(source) == 'ade20k':
        meta = ADE20KDataset.METAINFO
        names = tuple(name.strip() for name in meta['classes'])
        return Classes(names, tuple(map(tuple, meta['palette'])), reduce_zero_label)
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
        palette.append(tuple(bytes.fromhex(colour)) if colour else _distinct_colour(index))
    if len(set(names)) < len(names):
        raise UserError(f'{source} names {next(n for n in names if names.count(n) > 1)!r} twice: names must differ')
    return Classes(tuple(names), tuple(palette), reduce_zero_label)


def check_num_classes(classes: Sequence, expected: int, source: str) -> None:
    """Check that there are as many classes as the model has outputs.

    Raises:
        UserError: The numbers differ.
    """
    if len(classes) != expected:
        raise UserError(f'{source} names {len(classes)} classes, but the model has {expected}: {_HELP}')


def _distinct_colour(index: int) -> tuple[int, int, int]:
    """Return a colour whose hue is a golden-ratio step from the previous one: no two near indices look alike."""
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 if index % 2 else 0.65, 0.95)
    return tuple(round(255 * value) for value in rgb)
