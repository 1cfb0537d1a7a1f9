"""Segment files: images, folders of them and videos in, overlays and label maps out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import count, takewhile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg_inceptionnext.data.prefetch import map_ahead
from mmseg_inceptionnext.drawing import add_legend, save_picture
from mmseg_inceptionnext.errors import UnreadableFile, UserError, printable
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.images import is_tiff
from mmseg_inceptionnext.inference.geotiff import POLYGON_SUFFIXES, segment_raster
from mmseg_inceptionnext.inference.segmentor import Segmentation, Segmentor
from mmseg_inceptionnext.inference.sources import Output, Source

_READERS = 2
_RESULTS_WAITING = 8  # for the thread that writes
_LEGEND_ROWS_OF_VIDEO = 2


def predict(
    segmentor: Segmentor,
    sources: Sequence[Source],
    output: Output,
    batch_size: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[float], None] = lambda images: None,
    bands: Sequence[int] | None = None,
    scale: tuple[float, float] | None = None,
) -> dict[str, str]:
    """Segment files. Decoding, inference and writing overlap: each has threads of its own.

    TIFFs are read and written as GeoTIFFs (:func:`~mmseg_inceptionnext.inference.geotiff.segment_raster`) if the
    segmentor has a ``tile``, or with bands, a scale or polygons.

    Args:
        segmentor: The segmentor.
        sources: What :func:`~mmseg_inceptionnext.inference.sources.find_sources` returned.
        output: What to write, and where.
        batch_size: Images in one forward pass, if they have the same size, as frames of a video do; or tiles.
        overwrite: Replace existing outputs.
        on_progress: Called with the number of images or frames that were written since the last call.
        bands, scale: Arguments of ``segment_raster``, for all sources.

    Returns:
        Why files could not be read, ``{path: message}``; the others are segmented. The frames of a video up to its
        damage are kept.

    Raises:
        UserError: An output exists, and ``overwrite`` is not set; or it is one of the sources, or cannot be written. A
            source is no TIFF although there are bands, a scale or polygons; or there are several for polygons.
    """
    rasters = _rasters(sources, output, bands, scale, segmentor.tiles is not None)
    sources = [source for source in sources if source not in set(rasters)]
    existing = output.existing(sources, rasters)
    inputs = {os.path.realpath(source.path) for source in (*sources, *rasters)}
    if own := [path for path in existing if os.path.realpath(path) in inputs]:
        raise UserError(f'{own[0]} would be written, but is one of the images to read: choose another out=DIR')
    if existing and not overwrite:
        more = f' and {len(existing) - 1} more' if len(existing) > 1 else ''
        raise UserError(f'{existing[0]}{more} exist already: pass overwrite=True, or choose another out=DIR')
    images = [source for source in sources if not source.is_video]
    if segmentor.channels != 3 and (videos := [source.path for source in sources if source.is_video]):
        raise UserError(f'{videos[0]} has 3 channels, but the model takes {segmentor.channels}')
    failures = _predict_images(segmentor, images, output, batch_size, on_progress)
    for source in sources:
        if source.is_video:
            failures |= _predict_video(segmentor, source, output, batch_size, on_progress)
    for source in rasters:
        try:
            with _naming_unwritable_file():
                segment_raster(
                    segmentor, source.path, output.raster_of(source), bands, scale, output.polygons, output.min_area,
                    batch_size, on_progress,
                )  # fmt: skip
        except UnreadableFile as error:
            failures[str(source.path)] = str(error).removeprefix(f'{source.path}: ')
    return failures


def _rasters(sources: Sequence[Source], output: Output, bands: Sequence[int] | None,
             scale: tuple[float, float] | None, in_tiles: bool) -> list[Source]:  # fmt: skip
    """Return the sources that are read and written as GeoTIFFs."""
    polygons = output.polygons and str(output.polygons)
    if output.min_area and not polygons:
        raise UserError(f'min_area={output.min_area} is for polygons: pass polygons=FILE as well')
    options = dict(bands=bands, scale=scale, polygons=polygons)
    given = [f'{name}={value!r}' for name, value in options.items() if value is not None]
    if not given and not in_tiles:
        return []
    rasters = [source for source in sources if is_tiff(source.path)]
    others = [source.path for source in sources if source.path.exists() and not is_tiff(source.path)]
    if given and others:
        raise UserError(f'{given[0]} is for TIFF files, and {others[0]} is none: predict it without')
    if polygons and not polygons.lower().endswith(POLYGON_SUFFIXES):
        raise UserError(f'polygons={polygons!r} must end in {" or ".join(POLYGON_SUFFIXES)}')
    if polygons and len(rasters) > 1:
        raise UserError(f'polygons={polygons!r} is for one image, not for {len(rasters)}: predict them one by one')
    return rasters


def count_images(sources: Sequence[Source]) -> int:
    """Count the images and frames to segment; for some videos this is an estimate."""
    images, frames = sum(not source.is_video for source in sources), 0
    for source in sources:
        if source.is_video:
            with _name_for_opencv(source.path) as name:
                frames += max(0, int(cv2.VideoCapture(name).get(cv2.CAP_PROP_FRAME_COUNT)))
    return images + frames


def _predict_images(segmentor: Segmentor, sources: Sequence[Source], output: Output, batch_size: int,
                    on_progress: Callable[[float], None]) -> dict[str, str]:  # fmt: skip
    failures = {}

    def read(source: Source) -> dict | None:
        try:
            return segmentor.prepare(segmentor.read(source.path))
        except UserError as error:
            failures[str(source.path)] = str(error).removeprefix(f'{source.path}: ')
            return None

    def results() -> Iterator[tuple[Source, Segmentation]]:
        prepared = map_ahead(readers, read, sources, 2 * batch_size)
        for batch in _batches((pair for pair in prepared if pair[1] is not None), batch_size):
            yield from zip(
                (source for source, _ in batch),
                segmentor.predict([image for _, image in batch], batch_size),
                strict=True,
            )

    def write(result: tuple[Source, Segmentation]) -> None:
        source, segmentation = result
        with _naming_unwritable_file():
            save_picture(segmentation.overlay(output.opacity, output.legend), output.overlay_of(source))
            if output.labels:
                save_picture(segmentation.label_image(), output.labels_of(source))
        on_progress(1)

    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as writer:
        for _ in map_ahead(writer, write, results(), _RESULTS_WAITING):
            pass
    return failures


def _predict_video(segmentor: Segmentor, source: Source, output: Output, batch_size: int,
                   on_progress: Callable[[float], None]) -> dict[str, str]:  # fmt: skip
    with _name_for_opencv(source.path) as name:
        video = cv2.VideoCapture(name)
    overlay = _VideoFile(output.overlay_of(source), video.get(cv2.CAP_PROP_FPS) or 25)
    reason = 'not a video, or of a format that OpenCV does not read' if source.path.is_file() else 'no such file'

    def read(_: int) -> dict | None:
        nonlocal reason
        is_read, frame = video.read()
        try:
            return segmentor.prepare(frame[..., ::-1]) if is_read else None
        except UserError as error:
            reason = str(error)
            return None

    def results() -> Iterator[Segmentation]:
        frames = (frame for _, frame in map_ahead(reader, read, count(), 2 * batch_size))
        for batch in _batches(takewhile(lambda frame: frame is not None, frames), batch_size):
            yield from segmentor.predict(batch, batch_size)

    def write(result: Segmentation) -> None:
        picture = result.overlay(output.opacity)
        if output.legend:
            present = [result.class_names.index(name) for name in result.areas()]
            picture = add_legend(
                picture, present, result.class_names, result.classes.palette, num_rows=_LEGEND_ROWS_OF_VIDEO
            )
        with _naming_unwritable_file():
            overlay.add(picture)
            if output.labels:
                save_picture(result.label_image(), output.labels_of(source) / f'{overlay.frames:06d}.png')
        on_progress(1)

    if output.labels:
        for stale in output.labels_of(source).glob('[0-9]*.png'):  # left by a longer video
            stale.unlink()
    # One thread reads and one writes, so that the frames keep their order.
    with closing(overlay), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for _ in map_ahead(writer, write, results(), _RESULTS_WAITING):
            pass
    return {} if overlay.frames else {str(source.path): reason}


@contextmanager
def _naming_unwritable_file() -> Iterator[None]:
    try:
        yield
    except UserError:  # of what is read meanwhile
        raise
    except OSError as error:
        raise UserError(f'cannot write {error.filename or "the output"}: {error.strerror or error}') from error


@contextmanager
def _name_for_opencv(path: Path) -> Iterator[str]:
    """Yield a name of a video that OpenCV takes: it crashes on bytes that are no UTF-8, so it gets a link then."""
    if printable(str(path)) == str(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, 'video').with_suffix(path.suffix)
        link.symlink_to(path.absolute())
        yield str(link)


class _VideoFile:
    """A video file, opened when the first frame gives its size. What was written is kept if the rest fails."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.frames, self.stack = path, fps, 0, ExitStack()

    def add(self, picture: Image.Image) -> None:
        if not self.frames:
            partial = self.stack.enter_context(atomic_write(self.path))
            name = self.stack.enter_context(_name_for_opencv(partial))
            self.video = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*'mp4v'), self.fps, picture.size)
            self.stack.callback(self.video.release)
            if not self.video.isOpened():
                raise OSError(None, 'OpenCV cannot write this video', str(self.path))
        self.video.write(np.asarray(picture)[..., ::-1])
        self.frames += 1

    def close(self) -> None:
        self.stack.close()


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
