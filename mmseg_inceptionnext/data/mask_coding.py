"""Open masks, and turn what they hold, ids or colours, into the labels that a model is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mmseg_inceptionnext.errors import BadSample, UnreadableFile
from mmseg_inceptionnext.images import check_is_file, orientation, stored_channels, why_unreadable
from mmseg_inceptionnext.labels import Code

_IDS = 65536  # 16 bits

# Formats that change values; in the last two, nothing tells whether they have.
_LOSSY = {
    'JPEG': 'JPEG, which changes',
    'MPO': 'JPEG, which changes',
    'JPEG2000': 'JPEG 2000, which may change',
    'AVIF': 'AVIF, which may change',
}

# Pillow's names for forms whose values it does not return as they are stored.
_STRETCHED, _INVERTED, _CUT = r'L;[24].*', r'[1L];I.*', r'[A-Z]{2,};1[56].*'

_EXIF = {'exif', 'Raw profile type exif'}  # Pillow's names for where a PNG has it


@contextmanager
def open_mask(source: str | Path | BytesIO) -> Iterator[Image.Image]:
    """Open a mask's file; what is decoded are its ids or colours as they are stored.

    Raises:
        BadSample: The file is compressed with loss, or of a form whose values Pillow and OpenCV change.
        UnreadableFile: It cannot be read; also where it is decoded later.
    """
    try:
        check_is_file(source)
        with Image.open(source) as mask:
            if fault := lossy_fault(mask) or form_fault(mask):
                raise BadSample(fault)
            yield mask
    except BadSample:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # Pillow's, on damage
        raise UnreadableFile(why_unreadable(error)) from error


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Put the path of a mask before what is wrong with it."""
    try:
        yield
    except UnreadableFile as error:
        raise UnreadableFile(f'{path}: {error}') from error
    except BadSample as error:
        raise BadSample(f'{path} {error}') from error


def lossy_fault(mask: Image.Image) -> str | None:
    """Say that a mask's file, which is not decoded yet, is compressed with loss; None if it is not."""
    kind = _LOSSY.get(mask.format)
    if mask.format == 'WEBP' and _is_lossy_webp(mask):
        kind = 'lossy WebP, which changes'
    if mask.format == 'TIFF' and 'jpeg' in mask.info.get('compression', ''):
        kind = 'TIFF with JPEG compression, which changes'
    if kind is None:
        return None
    return (
        f'is stored as {kind} ids and colours, above all at borders: make the masks again from their source, and save '
        'them as PNG'
    )


def _is_lossy_webp(mask: Image.Image) -> bool:
    mask.fp.seek(0)
    content, at = mask.fp.read(), 12
    while (kind := content[at : at + 4]) not in (b'VP8 ', b'VP8L', b''):
        size = int.from_bytes(content[at + 4 : at + 8], 'little')
        at += 24 if kind == b'ANMF' else 8 + size + size % 2  # the image of a frame follows its header
    return kind != b'VP8L'


def form_fault(mask: Image.Image) -> str | None:
    """Say that a mask's file, which is not decoded yet, is of a form whose values Pillow changes; None if it is not."""
    if mask.format != 'TIFF' and _EXIF & mask.info.keys() and (turned := orientation(mask)) != 1:  # TIFFs are turned
        return f'has the EXIF orientation {turned}, which is not applied to masks: turn its pixels, and remove the tag'
    decoder, _, _, arguments = mask.tile[0] if mask.tile else ('', None, None, '')
    form, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    form = str(form)
    if re.fullmatch(_STRETCHED, form) or decoder.startswith('ppm') and more and more[0] not in (255, 65535):
        return 'has values of 2 or 4 bits, or of a range of its own, that are stretched when read: save it with 8 bits'
    if re.fullmatch(_INVERTED, form):
        return 'has inverted grey values (0 is white): save it as PNG'
    if re.fullmatch(_CUT, form):
        return 'has colours of other than 8 bits a channel, which are rounded when read: save it with 8 bits'
    return None


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
    if stored_channels(mask) > 1:
        raise BadSample(
            f'has {stored_channels(mask)} channels, but the classes are ids: name the colours, or save it with one'
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
