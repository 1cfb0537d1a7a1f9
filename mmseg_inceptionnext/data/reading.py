"""Decode images and annotations, entirely and in several processes, and report what is in them and what is damaged."""

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
from PIL import ExifTags, Image

from mmseg_inceptionnext.data.check import THIN_FAULT, channels_fault, depth_fault, size_fault
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.images import read_image, why_unreadable

_CHUNK = 4  # pairs that a process takes at once: more cost less, but a killed process leaves more files in question


@dataclass
class Pair:
    """What one process found in an image and its annotation.

    Attributes:
        digest: Hash of the image's file; None where it cannot be opened.
        size: (width, height) of the image, turned as its EXIF orientation says; None where it cannot be decoded.
        counts: (256,) pixels of each value in the annotation's file; None without a readable one that fits the image.
        palette: The annotation has a palette, and its values are indices into it.
        wrong: What cannot be trained with, as (file, reason).
    """

    digest: bytes | None = None
    size: tuple[int, int] | None = None
    counts: np.ndarray | None = None
    palette: bool = False
    wrong: list[tuple[str, str]] = field(default_factory=list)


def read_pair(image: str, annotation: str | None) -> Pair:
    """Decode an image and, if there is one, its annotation; whatever the files hold, nothing is raised."""
    pair = Pair()
    with _noting(pair.wrong, image):
        content = _content(image)
        pair.digest = hashlib.blake2b(content, digest_size=16).digest()
        pair.size = _image_size(content)
    if annotation is not None:
        with _noting(pair.wrong, annotation), _opened(_content(annotation)) as stored:
            stored.load()
            if fault := depth_fault(stored):
                raise UserError(fault)
            if len(stored.getbands()) > 1:
                raise UserError(channels_fault(len(stored.getbands())))
            if 1 in stored.size:
                raise UserError(THIN_FAULT)
            if pair.size and stored.size != pair.size:
                raise UserError(size_fault(stored.size, image, pair.size))
            pair.palette = stored.mode == 'P'
            if stored.mode in ('L', 'P'):  # as LoadAnnotations reads them, a palette's indices
                pair.counts = np.array(stored.histogram())
            else:  # 1 and 16 bits, cast to 8
                pair.counts = np.bincount(np.asarray(stored).astype(np.uint8).ravel(), minlength=256)
    return pair


@contextmanager
def reader(workers: int) -> Iterator[Callable[[list[tuple[str, str | None]]], Iterator[Pair]]]:
    """:func:`read_pair` for a list, in several processes.

    Results come in the list's order and a few ahead of their use, so that memory does not grow with the list.

    Raises:
        UserError: a process was killed.
    """
    if workers == 1:
        yield lambda pairs: starmap(read_pair, pairs)
        return
    # A fork shares what is imported, which takes seconds; elsewhere than on Linux it is not safe.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    with ProcessPoolExecutor(workers, context, _leave_signals_to_parent) as pool:
        pool.submit(int).result()  # starts the processes before a progress bar starts a thread, which forks badly
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
    if Path(path).exists() and not Path(path).is_file():
        raise UserError('a directory, a pipe or a device, not a file')
    if content := Path(path).read_bytes():
        return content
    raise UserError('is empty')


def _opened(content: bytes) -> Image.Image:
    """An image, not decoded yet. Of a PNG all checksums and the end are right, which decoding does not look at."""
    image = Image.open(BytesIO(content))
    if image.format == 'PNG':
        image.verify()
        image = Image.open(BytesIO(content))
    return image


def _image_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an image as people see it, after all of it has been decoded."""
    with _opened(content) as image:
        width, height = image.size
        if image.format in ('JPEG', 'MPO'):
            # An eighth of the size, without colours: all of the file is read, but few pixels are computed.
            image.draft('L', (max(width // 8, 1), max(height // 8, 1)))
            image.load()
        else:
            read_image(image)
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read_in(pool: ProcessPoolExecutor, workers: int, pairs: list[tuple[str, str | None]]) -> Iterator[Pair]:
    waiting = deque()
    try:
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            waiting.append((chunk, pool.submit(_read_pairs, chunk)))
            if len(waiting) > 2 * workers:
                yield from waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield from waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool as error:
        lost = [image for chunk, future in waiting if not future.done() or future.exception() for image, _ in chunk]
        raise UserError(
            f'a process that reads files was killed, perhaps for want of memory, on one of {", ".join(lost)} or its '
            'annotation: look at these, or try --workers 1'
        ) from error


def _read_pairs(pairs: list[tuple[str, str | None]]) -> list[Pair]:
    return list(starmap(read_pair, pairs))
