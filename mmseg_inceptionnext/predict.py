"""Segment files: images, folders of them and videos in, overlays and label maps out."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import whole_file
from mmseg_inceptionnext.images import IMAGE_SUFFIXES, read_image
from mmseg_inceptionnext.report.overlay import under_legend
from mmseg_inceptionnext.segmentor import Segmentation, Segmentor

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')

_LABELS, _VIDEO_LABELS = 'labels', 'video_labels'
_READERS = 2
_LEGEND_ROWS_OF_VIDEO = 2


@dataclass(frozen=True)
class Source:
    """A file to segment, and what its output is called.

    Attributes:
        path: Of the image or video.
        name: Relative path of what is written for it, without ending. No two sources have the same.
    """

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(inputs: Sequence[str], out: Path, lines: Iterable[str] = ()) -> list[Source]:
    """The files that a command line names, each once.

    Args:
        inputs: Files, folders (searched for images and videos, at any depth), globs, and '-' for ``lines``.
        out: Where the output goes; what lies there is not taken for input.
        lines: A file's path each.

    Returns:
        What is found in a folder or by a glob keeps its path from there, a file its name. Where two would be called
        the same, the second gets a number.

    Raises:
        UserError: a folder or glob without a file, or no input at all.
    """
    found: list[tuple[Path, Path]] = []
    for text in inputs:
        if text == '-':
            paths = [Path(line.rstrip('\r\n')) for line in lines if line.strip()]
            found += [(path, Path(path.name)) for path in paths]
        else:
            found += _expand(text, out)
    sources, seen, names = [], set(), set()
    for path, name in found:
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        name = _inside(name)
        numbered = (name.with_name(f'{name.name}-{number}') for number in count(2))
        # Names that differ in case only are one on some file systems.
        name = next(candidate for candidate in chain([name], numbered) if str(candidate).lower() not in names)
        names.add(str(name).lower())
        sources.append(Source(path, name))
    if not sources:
        raise UserError('there is nothing to predict: name images, folders, globs or videos')
    return sources


def _expand(text: str, out: Path) -> list[tuple[Path, Path]]:
    """Path and relative name of each file that an argument stands for."""
    path = Path(text)
    if path.is_dir():
        root, found = path, _walk(path)
    elif path.exists() or not glob.has_magic(text):
        return [(path, Path(path.name))]
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [p for p in map(Path, sorted(glob.glob(text, recursive=True))) if p.is_file() and _has_known_suffix(p)]
    inside = os.path.join(os.path.realpath(out), '')
    found = [p for p in found if not os.path.realpath(p).startswith(inside)]
    if not found:
        raise UserError(f'{text} holds no image and no video outside of {out}')
    return [(p, p.relative_to(root)) for p in found]


def _walk(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        paths = (Path(root, name) for name in files if not name.startswith('.'))
        # A link that leads nowhere is reported later; a pipe would be waited for.
        found += [path for path in paths if _has_known_suffix(path) and (path.is_file() or path.is_symlink())]
    return sorted(found)


def _has_known_suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _inside(name: Path) -> Path:
    """A relative path, without its ending, that leads neither out of the output folder nor between the label maps.

    Folders do not end as the files that are written do, so that none has the name of one.
    """
    *folders, file = [part for part in name.parts if part not in ('..', name.anchor)] or ['unnamed']
    folders = [f'{part}-2' if part.lower().endswith(('.png', '.mp4')) else part for part in folders]
    if folders and folders[0].lower() in (_LABELS, _VIDEO_LABELS):
        folders[0] += '-2'
    return Path(*folders, Path(file).with_suffix(''))


@dataclass(frozen=True)
class Output:
    """What to write for each source.

    Attributes:
        folder: Overlays go into it, label maps into ``labels`` inside, those of videos into ``video_labels``.
        opacity: Of the overlays' colours, from 0 to 1.
        legend: Below each overlay, the classes that are there.
        labels: Write label maps, too, coded as the data set's annotations are.
    """

    folder: Path
    opacity: float = 0.5
    legend: bool = False
    labels: bool = False

    def overlay_of(self, source: Source) -> Path:
        return self.folder / f'{source.name}{".mp4" if source.is_video else ".png"}'

    def labels_of(self, source: Source) -> Path:
        """A PNG; of a video, the folder for those of its frames."""
        if source.is_video:
            return self.folder / _VIDEO_LABELS / source.name
        return self.folder / _LABELS / f'{source.name}.png'

    def existing(self, sources: Sequence[Source]) -> list[Path]:
        paths = [self.overlay_of(source) for source in sources]
        paths += [self.labels_of(source) for source in sources] if self.labels else []
        return [path for path in paths if path.exists()]


def predict(
    segmentor: Segmentor,
    sources: Sequence[Source],
    output: Output,
    batch_size: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda images: None,
) -> dict[str, str]:
    """Segment files. Decoding, inference and writing overlap: each has threads of its own.

    Args:
        segmentor: Predicts.
        sources: Of :func:`find_sources`.
        output: What to write.
        batch_size: Images through the network at once, where their sizes agree; a video's frames always do.
        overwrite: Replace what is there already.
        on_progress: Called with the number of images or frames that have been written since the last call.

    Returns:
        Why files could not be read, ``{path: message}``: the others are segmented all the same. What a video gave
        before it broke is kept.

    Raises:
        UserError: an output exists, and ``overwrite`` is not set; or it is one of the sources, or cannot be written.
    """
    existing = output.existing(sources)
    inputs = {os.path.realpath(source.path) for source in sources}
    if own := [path for path in existing if os.path.realpath(path) in inputs]:
        raise UserError(f'{own[0]} would be written, but is one of the images to read: choose another --out')
    if existing and not overwrite:
        more = f' and {len(existing) - 1} more' if len(existing) > 1 else ''
        raise UserError(f'{existing[0]}{more} exist already: pass --overwrite, or choose another --out')
    images = [source for source in sources if not source.is_video]
    failures = _predict_images(segmentor, images, output, batch_size, on_progress)
    for source in sources:
        if source.is_video:
            failures |= _predict_video(segmentor, source, output, batch_size, on_progress)
    return failures


def count_images(sources: Sequence[Source]) -> int:
    """How many images and frames there are to segment; of some videos an estimate."""
    videos = (cv2.VideoCapture(str(source.path)) for source in sources if source.is_video)
    frames = sum(max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) for video in videos)
    return frames + sum(not source.is_video for source in sources)


def _predict_images(segmentor: Segmentor, sources: Sequence[Source], output: Output, batch_size: int,
                    on_progress: Callable[[int], None]) -> dict[str, str]:  # fmt: skip
    failures = {}

    def read(source: Source) -> dict | None:
        try:
            return segmentor.prepare(read_image(source.path))
        except UserError as error:
            failures[str(source.path)] = str(error).removeprefix(f'{source.path}: ')
            return None

    def write(source: Source, result: Segmentation) -> None:
        with whole_file(output.overlay_of(source)) as path:
            result.overlay(output.opacity, output.legend).save(path)
        if output.labels:
            with whole_file(output.labels_of(source)) as path:
                result.label_image().save(path)
        on_progress(1)

    with ThreadPoolExecutor(_READERS) as readers, _Writer() as writer:
        prepared = _read_ahead(readers, read, sources, 2 * batch_size)
        for batch in _batches((pair for pair in prepared if pair[1] is not None), batch_size):
            results = segmentor.predict([image for _, image in batch])
            for (source, _), result in zip(batch, results, strict=True):
                writer.submit(write, source, result)
    return failures


def _predict_video(segmentor: Segmentor, source: Source, output: Output, batch_size: int,
                   on_progress: Callable[[int], None]) -> dict[str, str]:  # fmt: skip
    video = cv2.VideoCapture(str(source.path))
    film = _Film(output.overlay_of(source), video.get(cv2.CAP_PROP_FPS) or 25)
    reason = 'not a video, or of a format that OpenCV does not read' if source.path.is_file() else 'no such file'

    def read(_: int) -> dict | None:
        nonlocal reason
        is_read, frame = video.read()
        try:
            return segmentor.prepare(frame[..., ::-1]) if is_read else None
        except UserError as error:
            reason = str(error)
            return None

    def write(result: Segmentation) -> None:
        picture = result.overlay(output.opacity)
        if output.legend:
            present = [result.class_names.index(name) for name in result.areas()]
            picture = under_legend(
                picture, present, result.class_names, result.classes.palette, num_rows=_LEGEND_ROWS_OF_VIDEO
            )
        film.add(picture)
        if output.labels:
            with whole_file(output.labels_of(source) / f'{film.frames:06d}.png') as path:
                result.label_image().save(path)
        on_progress(1)

    if output.labels:
        for stale in output.labels_of(source).glob('[0-9]*.png'):  # of a longer video, overwritten
            stale.unlink()
    # One thread to read and one to write: frame goes after frame.
    with closing(film), ThreadPoolExecutor(1) as reader, _Writer() as writer:
        frames = takewhile(lambda frame: frame is not None, (
            frame for _, frame in _read_ahead(reader, read, count(), 2 * batch_size)
        ))  # fmt: skip
        for batch in _batches(frames, batch_size):
            for result in segmentor.predict(batch):
                writer.submit(write, result)
    return {} if film.frames else {str(source.path): reason}


class _Writer:
    """One thread that writes, in order, and stops the rest if it cannot; a few results wait for it at most."""

    def __init__(self) -> None:
        self.pool, self.pending = ThreadPoolExecutor(1), deque()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()  # which writes what waits, also after an error elsewhere
        while self.pending:
            self._wait(self.pending.popleft())

    def submit(self, write: Callable, *arguments: Any) -> None:
        self.pending.append(self.pool.submit(write, *arguments))
        while len(self.pending) > 8:
            self._wait(self.pending.popleft())

    @staticmethod
    def _wait(written: Future) -> None:
        try:
            written.result()
        except OSError as error:
            raise UserError(f'cannot write {error.filename or "the output"}: {error.strerror or error}') from error


class _Film:
    """A video file, opened when the first frame says its size. What it has is kept, also if the rest does not come."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.frames, self.stack = path, fps, 0, ExitStack()

    def add(self, picture: Image.Image) -> None:
        if not self.frames:
            partial = self.stack.enter_context(whole_file(self.path))
            self.video = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*'mp4v'), self.fps, picture.size)
            self.stack.callback(self.video.release)
            if not self.video.isOpened():
                raise OSError(None, 'OpenCV cannot write this video', str(self.path))
        self.video.write(np.asarray(picture)[..., ::-1])
        self.frames += 1

    def close(self) -> None:
        self.stack.close()


def _read_ahead(pool: ThreadPoolExecutor, read: Callable, items: Iterable, ahead: int) -> Iterator[tuple]:
    """``(item, read(item))`` in order, while ``ahead`` more are being read."""
    waiting: deque[tuple[Any, Future]] = deque()
    for item in items:
        waiting.append((item, pool.submit(read, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
