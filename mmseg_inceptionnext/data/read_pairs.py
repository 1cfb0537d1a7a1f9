"""Decode images and annotations completely, in several processes; report what they hold and what is wrong."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import starmap
from pathlib import Path

import numpy as np
from PIL import Image

from mmseg_inceptionnext.data.mask_coding import form_fault, lossy_fault, mask_counts
from mmseg_inceptionnext.data.prefetch import map_ahead
from mmseg_inceptionnext.data.transforms import ids_fault, size_fault
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.images import check_is_file, is_tiff, orientation, oriented_size, read_image, why_unreadable

_CHUNK = 4  # pairs that a process takes at once: more are faster, but a killed process leaves more files in question


@dataclass
class Pair:
    """What an image and its annotation hold.

    Attributes:
        digest: Hash of the image's file; None where it cannot be opened.
        size: (width, height) of the image, in its EXIF orientation; None where it cannot be decoded.
        orientation: EXIF orientation of the image; 1 where it is read as it is stored.
        counts: Pixels of each value in the annotation's file: ids, or colours as 0xRRGGBB; None without a readable one
            that fits the image.
        palette: Colour of each value, as 0xRRGGBB, where values are indices into a palette of the annotation.
        lossy: The annotation is compressed with loss, which is among what is wrong, and can be decoded.
        wrong: What cannot be trained on, as (file, reason).
    """

    digest: bytes | None = None
    size: tuple[int, int] | None = None
    orientation: int = 1
    counts: dict[int, int] | None = None
    palette: dict[int, int] | None = None
    lossy: bool = False
    wrong: list[tuple[str, str]] = field(default_factory=list)


def read_pair(image: str, annotation: str | None, masks: str | None = None, channels: int = 3) -> Pair:
    """Decode an image and, if there is one, its annotation; raise nothing, whatever the files hold.

    Args:
        image, annotation: Paths.
        masks: What annotations hold: 'ids' of 16 bits or 'colours', as a MaskDataset reads them; default: ids of 8
            bits, as mmseg's LoadAnnotations does.
        channels: Argument of :func:`~mmseg_inceptionnext.images.read_image`.
    """
    pair = Pair()
    with _noting(pair.wrong, image):
        content = _content(image)
        pair.digest = hashlib.blake2b(content, digest_size=16).digest()
        pair.size, pair.orientation = _image_size(content, channels)
    if annotation is not None:
        with _noting(pair.wrong, annotation), _opened(_content(annotation)) as stored:
            _read_mask(pair, image, stored, masks)
    return pair


def _read_mask(pair: Pair, image: str, stored: Image.Image, masks: str | None) -> None:
    lossy, form = lossy_fault(stored), form_fault(stored)
    stored.load()
    pair.lossy = lossy is not None
    if fault := lossy or form:
        raise UserError(fault)
    if masks is None and (fault := ids_fault(stored)):
        raise UserError(fault)
    if pair.size and stored.size != pair.size:
        raise UserError(size_fault(stored.size, image, pair.size))
    if stored.mode in ('L', 'P') and masks != 'colours':  # a palette's indices
        pair.counts = {value: pixels for value, pixels in enumerate(stored.histogram()) if pixels}
    elif masks is None:  # cast to 8 bits
        pair.counts = mask_counts(Image.fromarray(np.asarray(stored).astype(np.uint8)), is_colour=False)
    else:
        pair.counts = mask_counts(stored, masks == 'colours')
    if stored.mode == 'P' and masks != 'colours':
        colours = [
            red << 16 | green << 8 | blue for red, green, blue in np.reshape(stored.getpalette(), (-1, 3)).tolist()
        ]
        pair.palette = {value: colours[value] for value in pair.counts if value < len(colours)}


@contextmanager
def pair_reader(workers: int) -> Iterator[Callable[[list[tuple[str, str | None, str | None, int]]], Iterator[Pair]]]:
    """Yield a function that applies :func:`read_pair` to a list, in several processes.

    Results come in the list's order, and are read a few ahead of their use: memory does not grow with the list.

    Raises:
        UserError: A process was killed.
    """
    if workers == 1:
        yield lambda pairs: starmap(read_pair, pairs)
        return
    # fork avoids importing again, which takes seconds; it is safe on Linux only.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    try:
        pool = ProcessPoolExecutor(workers, context, _leave_signals_to_parent)
        pool.submit(int).result()  # fork before a progress bar starts a thread
    except OSError as error:  # no shared memory for its locks, no files for its pipes
        raise UserError(
            f'no process can be started ({error.strerror}; /dev/shm or ulimit -n): try workers=1'
        ) from error
    with pool:
        yield lambda pairs: _read_in(pool, workers, pairs)


@contextmanager
def _noting(wrong: list[tuple[str, str]], file: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's, about large images and odd metadata
            yield
    except Exception as error:  # a damaged file makes Pillow raise anything
        wrong.append((file, ' '.join(why_unreadable(error).split())))


def _content(path: str) -> bytes:
    check_is_file(path)
    if content := Path(path).read_bytes():
        return content
    raise UserError('is empty')


def _opened(content: bytes) -> Image.Image:
    """Open an image without decoding it; check all checksums and the end of a PNG, which decoding ignores."""
    image = Image.open(BytesIO(content))
    if image.format == 'PNG':
        image.verify()
        image = Image.open(BytesIO(content))
    return image


def _image_size(content: bytes, channels: int) -> tuple[tuple[int, int], int]:
    """Return (width, height) of an image in its EXIF orientation, and that, after all of it has been decoded."""
    if channels != 3:
        height, width = read_image(BytesIO(content), channels).shape[:2]
        if is_tiff(BytesIO(content)):  # which tifffile does not turn
            return (width, height), 1
        with Image.open(BytesIO(content)) as image:
            return (width, height), orientation(image)
    with _opened(content) as image:
        size, turned = oriented_size(image), orientation(image)
        width, height = image.size
        if image.format in ('JPEG', 'MPO'):
            # An eighth of the size, without colours: all of the file is read, but few pixels are computed.
            image.draft('L', (max(width // 8, 1), max(height // 8, 1)))
            image.load()
        else:
            read_image(image)
        return size, turned


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read_in(
    pool: ProcessPoolExecutor, workers: int, pairs: list[tuple[str, str | None, str | None, int]]
) -> Iterator[Pair]:
    pending = deque()
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    try:
        for _, chunk in map_ahead(pool, _read_pairs, chunks, 2 * workers, pending):
            yield from chunk
    except BrokenProcessPool as error:
        lost = [image for chunk, future in pending if not future.done() or future.exception() for image, *_ in chunk]
        raise UserError(
            f'a process that reads files was killed, perhaps out of memory, on one of {", ".join(lost)} or its '
            'annotation: check these files, or try workers=1'
        ) from error


def _read_pairs(pairs: list[tuple[str, str | None, str | None, int]]) -> list[Pair]:
    return list(starmap(read_pair, pairs))
