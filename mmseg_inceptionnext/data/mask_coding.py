"""Turn what masks hold, ids or colours, into the labels that a model is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmseg_inceptionnext.errors import BadSample
from mmseg_inceptionnext.labels import Code

_IDS = 65536  # 16 bits


class MaskCoding:
    """Which label each id or colour of the masks stands for.

    Args:
        labels: Ids, or colours (RGB), of each class; a label is an index into this list.
        ignored: Ids or colours of pixels without a class.
        ignore_index: Label of these pixels.
    """

    def __init__(self, labels: Sequence[Sequence[Code]], ignored: Sequence[Code], ignore_index: int):
        pairs = [(_number(code), label) for label, codes in enumerate(labels) for code in codes]
        pairs += [(_number(code), ignore_index) for code in ignored]
        self.is_colour = any(np.ndim(code) for codes in labels for code in codes)
        self.ignore_index, self._dtype = ignore_index, np.uint8 if ignore_index < 256 else np.uint16
        numbers, found = np.array(sorted(pairs)).T
        if self.is_colour:
            self._numbers, self._labels = numbers, found
        else:
            self._labels = np.full(_IDS, -1)
            self._labels[numbers] = found

    def numbers(self, mask: Image.Image) -> np.ndarray:
        """Return what a mask holds, see :func:`mask_numbers`."""
        return mask_numbers(mask, self.is_colour)

    def labels_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the labels of what :meth:`numbers` returned, int64; -1 for ids and colours that are not named."""
        if not self.is_colour:
            return self._labels[numbers]
        at = np.searchsorted(self._numbers, numbers).clip(max=len(self._numbers) - 1)
        return np.where(self._numbers[at] == numbers, self._labels[at], -1)

    def decode(self, mask: Image.Image) -> np.ndarray:
        """Return the label map of a mask: (H, W) uint8, or uint16 for more than 255 classes.

        Raises:
            BadSample: It holds an id or a colour that is not named, or something else.
        """
        numbers = self.numbers(mask)
        labels = self.labels_of(numbers)
        if (unnamed := labels < 0).any():
            first = int(numbers[unnamed][0])
            raise BadSample(
                f'has {self.shown(first)} on {np.mean(numbers == first):.1%} of its pixels, which the data file does '
                f'not name: add it to classes or to ignore_classes'
            )
        return labels.astype(self._dtype)

    def shown(self, number: int) -> str:
        """Return an id or a colour in words."""
        return f'the colour {list(colour_of(number))}' if self.is_colour else f'id {number}'


def mask_numbers(mask: Image.Image, is_colour: bool) -> np.ndarray:
    """Return what a mask holds: (H, W) int64, ids, or colours as 0xRRGGBB.

    Raises:
        BadSample: It holds something else.
    """
    if is_colour:
        if mask.mode not in ('P', 'RGB', 'RGBA', '1', 'L'):
            raise BadSample(f'is of mode {mask.mode}, but the classes are colours: save it as RGB')
        red, green, blue = np.moveaxis(np.asarray(mask.convert('RGB'), np.int64), 2, 0)
        return red << 16 | green << 8 | blue
    if len(mask.getbands()) > 1:
        raise BadSample(
            f'has {len(mask.getbands())} channels, but the classes are ids: name the colours, or save it with one'
        )
    values = np.asarray(mask)
    if values.dtype.kind == 'f' or values.size and (values.min() < 0 or values.max() >= _IDS):
        raise BadSample(f'holds values that are no ids from 0 to {_IDS - 1}')
    return values.astype(np.int64)


def mask_counts(mask: Image.Image, is_colour: bool) -> dict[int, int]:
    """Return the number of pixels of each id or colour in a mask; arguments and errors of :func:`mask_numbers`."""
    numbers, pixels = np.unique(mask_numbers(mask, is_colour), return_counts=True)
    return dict(zip(numbers.tolist(), pixels.tolist(), strict=True))


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour of 0xRRGGBB."""
    return number >> 16, number >> 8 & 255, number & 255


def _number(code: Code) -> int:
    if np.ndim(code) == 0:
        return int(code)
    red, green, blue = code
    return int(red) << 16 | int(green) << 8 | int(blue)
