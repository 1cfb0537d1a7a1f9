"""Segment files: images, folders of them and videos in, overlays and label maps out."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.prefetch import map_ahead
from mmseg_inceptionnext.drawing import add_legend, save_picture
from mmseg_inceptionnext.errors import UnreadableFile, UserError, printable
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.images import is_tiff
from mmseg_inceptionnext.inference.geotiff import POLYGON_SUFFIXES, segment_raster
from mmseg_inceptionnext.inference.manifest import Manifest
from mmseg_inceptionnext.inference.segmentor import Segmentation, Segmentor, check_unsure_code
from mmseg_inceptionnext.inference.sources import Output, Source, existing_outputs, shard_of

_READERS = 2
_BATCHES_AHEAD = 2  # of the one that is waited for: one for each stream
_RESULTS_WAITING = 8  # for the thread that writes
_LEGEND_ROWS_OF_VIDEO = 2
_LARGEST_BATCH = 16
_WORTH = 1.05


def predict(
    segmentor: Segmentor,
    sources: Sequence[Source],
    output: Output,
    batch_size: int | str = 1,
    overwrite: bool = False,
    on_progress: Callable[[float], None] = lambda images: None,
    bands: Sequence[int] | None = None,
    scale: tuple[float, float] | None = None,
    skip_existing: bool = False,
    shard: str | None = None,
    on_start: Callable[[int], None] = lambda images: None,
) -> dict[str, str]:
    """Segment files. Decoding, inference and writing overlap: each has threads of its own.

    TIFFs are read and written as GeoTIFFs (:func:`~mmseg_inceptionnext.inference.geotiff.segment_raster`) if the
    segmentor has a ``tile``, or with bands, a scale or polygons.

    A run keeps a manifest in the output folder (:mod:`~mmseg_inceptionnext.inference.manifest`), to which later runs
    into the folder add. It can be killed at any moment: repeated with ``skip_existing``, it gives the folder of one
    that was not killed, and so do all shards together.

    Args:
        segmentor: The segmentor.
        sources: What :func:`~mmseg_inceptionnext.inference.sources.find_sources` returned.
        output: What to write, and where.
        batch_size: Images in one forward pass, if they have the same size, as frames of a video do; or tiles.
            'auto': what is fastest for the first image (:func:`choose_batch_size`); in tiles, and for videos alone, 1.
        overwrite: Replace existing outputs, and the manifest.
        on_progress: Called with the number of images or frames that were written since the last call.
        bands, scale: Arguments of ``segment_raster``, for all sources.
        skip_existing: Leave out files that the manifest has, unless they have changed or their outputs are gone.
        shard: ``i/n``: predict the i-th of n parts of the sources, see
            :func:`~mmseg_inceptionnext.inference.sources.shard_of`.
        on_start: Called with the number of images and frames to predict.

    Returns:
        Why files could not be read, ``{path: message}``; the others are segmented. The frames of a video up to its
        damage are kept.

    Raises:
        UserError: An output exists, and neither ``overwrite`` nor ``skip_existing`` is set; or it is one of the
            sources, or cannot be written. A source is no TIFF although there are bands, a scale or polygons; or there
            are several for polygons. There is no such shard, or the manifest is that of another run, or an output was
            made from another file.
    """
    if overwrite and (skip_existing or shard):
        other = 'skip_existing=True' if skip_existing else f'shard={shard!r}'
        raise UserError(f'overwrite=True and {other} exclude each other: pass one of them')
    rasters = _rasters(sources, output, bands, scale, segmentor.tiles is not None)
    if segmentor.channels != 3 and (videos := [source.path for source in sources if source.is_video]):
        raise UserError(f'{videos[0]} has 3 channels, but the model takes {segmentor.channels}')
    if not 0 <= output.min_confidence <= 1:
        raise UserError(f'min_confidence={output.min_confidence} must be from 0 to 1')
    if output.min_confidence and output.labels:
        check_unsure_code(segmentor.classes)
    is_raster = set(rasters).__contains__
    everything = sources
    if shard:
        sources = shard_of(sources, shard)
    outputs = (path for source in sources for path in output.paths_of(source, is_raster(source)))
    existing = existing_outputs(outputs, everything)
    is_kept = Manifest.is_in(output.folder)
    if existing and not overwrite and not (skip_existing and is_kept):
        more = f' and {len(existing) - 1} more' if len(existing) > 1 else ''
        why = ', and no manifest says what they were made from' if skip_existing else ''
        raise UserError(
            f'{existing[0]}{more} exist already{why}: pass {"skip_existing=True to go on, or " if is_kept else ""}'
            f'overwrite=True{" alone" if skip_existing else ""}, or choose another out=DIR'
        )
    with Manifest(output.folder, shard) as manifest:
        # Where an option was wrong for all files, the run that is repeated without it would be another one.
        if overwrite or not (shard or manifest.has_results):
            manifest.restart()
        facts = dict(output.identity(), bands=bands, scale=scale)
        segmentor, batch_size = _begin(manifest, segmentor, facts, batch_size, everything)
        if skip_existing:
            todo = [s for s in sources if not manifest.is_done(s, output.paths_of(s, is_raster(s)))]
            if len(todo) < len(sources):
                say(f'{len(sources) - len(todo)} of {len(sources)} files are done already')
            sources = todo
            for source in todo:
                manifest.check_outputs(source, output.paths_of(source, is_raster(source)), output.polygons)
        on_start(count_images(sources))
        log = _Log(manifest)
        _predict_images(segmentor, [s for s in sources if not s.is_video and not is_raster(s)], output, batch_size,
                        on_progress, log)  # fmt: skip
        for source in sources:
            if source.is_video:
                _predict_video(segmentor, source, output, batch_size, on_progress, log)
        for source in filter(is_raster, sources):
            _predict_raster(segmentor, source, output, bands, scale, batch_size, on_progress, log)
        with _naming_unwritable_file():
            manifest.finish(everything)
    return log.failures


def _begin(manifest: Manifest, segmentor: Segmentor, facts: dict, batch_size: int | str,
           sources: Sequence[Source]) -> tuple[Segmentor, int]:  # fmt: skip
    """Record what decides the results; return segmentor and batch size as the folder's run has them, whoever began it.

    Another batch size may be asked for: a GPU may have less memory.
    """
    segmentor = segmentor.settled(manifest.run)
    chosen = batch_size
    if chosen == 'auto':
        chosen = manifest.run['batch_size'] if manifest.run else choose_batch_size(segmentor, sources)
    manifest.begin(segmentor.identity() | facts | dict(batch_size=chosen))
    segmentor = segmentor.settled(manifest.run)
    recorded = manifest.run['batch_size']
    manifest.check(segmentor.identity() | facts | dict(batch_size=recorded))
    return segmentor, recorded if batch_size == 'auto' else batch_size


def choose_batch_size(segmentor: Segmentor, sources: Sequence[Source]) -> int:
    """Return how many images to predict at once: it is doubled while that makes an image faster by a twentieth.

    Args:
        segmentor: The segmentor.
        sources: The first of them that is an image and can be read is what is timed.
    """
    for source in sources:
        if segmentor.tiles or source.is_video:
            continue
        try:
            image = segmentor.prepare(segmentor.read(source.path))
            break
        except UserError:  # it is said when its turn comes
            continue
    else:
        return 1

    def seconds(size: int) -> float:
        def once() -> float:
            start = time.perf_counter()
            segmentor.predict([image] * size, size, False)
            return time.perf_counter() - start

        once()  # sets up kernels and memory
        return min(once(), once()) / size

    size, shortest = 1, seconds(1)
    while size < _LARGEST_BATCH:
        try:
            found = seconds(2 * size)
        except torch.OutOfMemoryError:
            break
        if _WORTH * found > shortest:
            break
        size, shortest = 2 * size, found
    say(f'batch size: {size} ({shortest:.2g} s an image)')
    return size


@contextmanager
def _streams(segmentor: Segmentor) -> Iterator[Executor]:
    """Yield the threads that predict side by side, among which PyTorch's threads are shared out."""
    threads, streams = torch.get_num_threads(), segmentor.streams
    with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads // streams,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def _needs_confidence(output: Output) -> bool:
    return output.confidence or output.min_confidence > 0


class _Log:
    """What has become of each source: in the manifest, and why some could not be read."""

    def __init__(self, manifest: Manifest):
        self.failures: dict[str, str] = {}
        self.facts = manifest.facts
        self._manifest = manifest

    def done(self, facts: dict, seconds: float, areas: dict[str, float]) -> None:
        with _naming_unwritable_file():
            self._manifest.add(facts, seconds, classes={name: round(share, 6) for name, share in areas.items()})

    def failed(self, source: Source, facts: dict, seconds: float, reason: str) -> None:
        self.failures[str(source.path)] = reason
        with _naming_unwritable_file():
            self._manifest.add(facts, seconds, reason=reason)


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
                    on_progress: Callable[[float], None], log: _Log) -> None:  # fmt: skip
    asked = _needs_confidence(output)

    def read(source: Source) -> tuple[dict, dict, float] | None:
        start = time.perf_counter()
        facts = log.facts(source)
        try:
            prepared = segmentor.prepare(segmentor.read(source.path))
        except UserError as error:
            reason = str(error).removeprefix(f'{source.path}: ')
            log.failed(source, facts, time.perf_counter() - start, reason)
            return None
        return prepared, facts, time.perf_counter() - start

    def infer(batch: list[tuple[Source, tuple[dict, dict, float]]]) -> tuple[list[Segmentation], float]:
        start = time.perf_counter()
        found = segmentor.predict([image for _, (image, *_) in batch], batch_size, asked, asked)
        return found, (time.perf_counter() - start) / len(batch)

    def results() -> Iterator[tuple[Source, Segmentation, dict, float]]:
        prepared = map_ahead(readers, read, sources, 2 * batch_size)
        batches = _batches((pair for pair in prepared if pair[1] is not None), batch_size)
        for batch, (found, share) in map_ahead(network, infer, batches, _BATCHES_AHEAD):
            for (source, (_, facts, seconds)), result in zip(batch, found, strict=True):
                yield source, result, facts, seconds + share

    def write(item: tuple[Source, Segmentation, dict, float]) -> None:
        source, segmentation, facts, seconds = item
        start = time.perf_counter()
        with _naming_unwritable_file():
            overlay = segmentation.overlay(output.opacity, output.legend, output.min_confidence)
            save_picture(overlay, output.overlay_of(source))
            if output.labels:
                save_picture(segmentation.label_image(output.min_confidence), output.labels_of(source))
            if output.confidence:
                save_picture(segmentation.confidence_image(), output.confidence_of(source))
        log.done(facts, seconds + time.perf_counter() - start, segmentation.areas(output.min_confidence))
        on_progress(1)

    with ThreadPoolExecutor(_READERS) as readers, _streams(segmentor) as network, ThreadPoolExecutor(1) as writer:
        for _ in map_ahead(writer, write, results(), _RESULTS_WAITING):
            pass


def _predict_raster(segmentor: Segmentor, source: Source, output: Output, bands: Sequence[int] | None,
                    scale: tuple[float, float] | None, batch_size: int, on_progress: Callable[[float], None],
                    log: _Log) -> None:  # fmt: skip
    start = time.perf_counter()
    facts = log.facts(source)
    try:
        with _naming_unwritable_file():
            areas = segment_raster(
                segmentor, source.path, output.raster_of(source), bands, scale, output.polygons, output.min_area,
                batch_size, on_progress, output.confidence, output.min_confidence,
            )  # fmt: skip
    except UnreadableFile as error:
        log.failed(source, facts, time.perf_counter() - start, str(error).removeprefix(f'{source.path}: '))
        return
    log.done(facts, time.perf_counter() - start, areas)


def _predict_video(segmentor: Segmentor, source: Source, output: Output, batch_size: int,
                   on_progress: Callable[[float], None], log: _Log) -> None:  # fmt: skip
    start = time.perf_counter()
    facts = log.facts(source)
    with _name_for_opencv(source.path) as name:
        video = cv2.VideoCapture(name)
    overlay = _VideoFile(output.overlay_of(source), video.get(cv2.CAP_PROP_FPS) or 25)
    reason = 'not a video, or of a format that OpenCV does not read' if source.path.is_file() else 'no such file'
    areas, asked = Counter(), _needs_confidence(output)

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
        batches = _batches(takewhile(lambda frame: frame is not None, frames), batch_size)
        infer = partial(segmentor.predict, batch_size=batch_size, keep_logits=asked, confidence=asked)
        for _, found in map_ahead(network, infer, batches, _BATCHES_AHEAD):
            yield from found

    def write(result: Segmentation) -> None:
        picture = result.overlay(output.opacity, min_confidence=output.min_confidence)
        if output.legend:
            present = [result.class_names.index(name) for name in result.areas()]
            picture = add_legend(
                picture, present, result.class_names, result.classes.palette, num_rows=_LEGEND_ROWS_OF_VIDEO
            )
        with _naming_unwritable_file():
            overlay.add(picture)
            if output.labels:
                labels = result.label_image(output.min_confidence)
                save_picture(labels, output.labels_of(source) / f'{overlay.frames:06d}.png')
            if output.confidence:
                save_picture(result.confidence_image(), output.confidence_of(source) / f'{overlay.frames:06d}.png')
        areas.update(result.areas(output.min_confidence))
        on_progress(1)

    for folder in output.paths_of(source)[1:]:
        for stale in folder.glob('[0-9]*.png'):  # left by a longer video
            stale.unlink()
    # One thread reads and one writes, so that the frames keep their order.
    with (
        closing(overlay),
        ThreadPoolExecutor(1) as reader,
        _streams(segmentor) as network,
        ThreadPoolExecutor(1) as writer,
    ):
        for _ in map_ahead(writer, write, results(), _RESULTS_WAITING):
            pass
    seconds = time.perf_counter() - start
    if overlay.frames:
        log.done(facts, seconds, {name: total / overlay.frames for name, total in areas.most_common()})
    else:
        log.failed(source, facts, seconds, reason)


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
