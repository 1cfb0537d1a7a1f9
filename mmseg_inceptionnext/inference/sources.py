"""Find the images and videos that a command line names, and name what is written for each."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, count, takewhile
from pathlib import Path

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.folders import find_files
from mmseg_inceptionnext.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')

_LABELS, _VIDEO_LABELS = 'labels', 'video_labels'
_CONFIDENCE, _VIDEO_CONFIDENCE = 'confidence', 'video_confidence'


@dataclass(frozen=True)
class Source:
    """A file to segment, and the name of its output.

    Attributes:
        path: Path of the image or video.
        name: Relative path of the output, without suffix; unique among the sources.
    """

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(inputs: Sequence[str], out: Path, lines: Iterable[str] = ()) -> list[Source]:
    """List the files that a command line names, each once.

    Args:
        inputs: Files, folders (searched for images and videos, at any depth), globs, and '-' for ``lines``.
        out: Folder of the output; files in it are skipped.
        lines: Paths for '-'.

    Returns:
        Files that were found in a folder or by a glob are named by their path relative to it, others by their name.
        If two names are the same, the second gets a number.

    Raises:
        UserError: A folder or glob without a file, or no input at all.
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


def shard_of(sources: Sequence[Source], shard: str) -> list[Source]:
    """Return the sources that one of several runs predicts, which share the work.

    A file's shard follows from its path below the folder or the start of the glob that it was found in, or from its
    name: files that are added move no other, and it does not matter where that folder is mounted.

    Args:
        sources: All of them.
        shard: ``i/n``: the i-th of n, counted from 1.

    Raises:
        UserError: It is something else, or there is no such shard.
    """
    match = re.fullmatch(r'(\d+)/(\d+)', shard)
    number, shards = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= shards:
        raise UserError(f'shard={shard!r} must be i/n, the i-th of n shards, counted from 1, such as 1/8')

    def hashed(source: Source) -> int:
        below = '/'.join(source.path.parts[-len(source.name.parts) :])
        return int.from_bytes(hashlib.sha256(os.fsencode(below)).digest()[:8], 'big')

    return [source for source in sources if hashed(source) % shards == number - 1]


def _expand(text: str, out: Path) -> list[tuple[Path, Path]]:
    """Return path and relative name of each file that an argument stands for."""
    path = Path(text)
    if path.is_dir():
        root, found = path, [path / name for name in find_files(path, IMAGE_SUFFIXES + VIDEO_SUFFIXES)]
    elif path.exists() or not glob.has_magic(text):
        return [(path, Path(path.name))]
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [
            p for p in map(Path, sorted(glob.glob(text, recursive=True))) if not p.is_dir() and _has_known_suffix(p)
        ]
    inside = os.path.join(os.path.realpath(out), '')
    found = [p for p in found if not os.path.realpath(p).startswith(inside)]
    if not found:
        raise UserError(f'{text} holds no image and no video outside of {out}')
    return [(p, p.relative_to(root)) for p in found]


def _has_known_suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _inside(name: Path) -> Path:
    """Return a relative path without suffix that leads neither out of the output folder nor into that of label maps.

    No folder ends in .png, .mp4 or .tif, so that none can collide with an output file.
    """
    *folders, file = [part for part in name.parts if part not in ('..', name.anchor)] or ['unnamed']
    folders = [f'{part}-2' if part.lower().endswith(('.png', '.mp4', '.tif')) else part for part in folders]
    if folders and folders[0].lower() in (_LABELS, _VIDEO_LABELS, _CONFIDENCE, _VIDEO_CONFIDENCE):
        folders[0] += '-2'
    return Path(*folders, Path(file).with_suffix(''))


def existing_outputs(outputs: Iterable[Path], sources: Sequence[Source]) -> list[Path]:
    """Return the outputs that are there already.

    Raises:
        UserError: One of them is a source.
    """
    inputs = {os.path.realpath(source.path) for source in sources}
    existing = [path for path in outputs if path.exists()]
    if own := [path for path in existing if os.path.realpath(path) in inputs]:
        raise UserError(f'{own[0]} would be written, but is one of the images to read: choose another out=DIR')
    return existing


@dataclass(frozen=True)
class Output:
    """What to write for each source.

    Attributes:
        folder: Folder for overlays; label maps go into ``labels`` inside, those of videos into ``video_labels``.
        opacity: Opacity of the overlays' colours, from 0 to 1.
        legend: Name the classes that are in the image below each overlay.
        labels: Also write label maps, in the coding of the data set's annotations.
        polygons: File of the polygons of a TIFF's labels, ``.gpkg`` or ``.geojson``; None for none.
        min_area: Polygons of fewer pixels are left out.
        confidence: Also write the labels' probabilities, 255 for 1: into ``confidence`` and ``video_confidence``, or as
            another band of a GeoTIFF.
        min_confidence: Pixels whose label is less probable are unsure: hatched in overlays, and 255 in label maps, or
            nodata of a GeoTIFF.
    """

    folder: Path
    opacity: float = 0.5
    legend: bool = False
    labels: bool = False
    polygons: Path | None = None
    min_area: int = 0
    confidence: bool = False
    min_confidence: float = 0

    def overlay_of(self, source: Source) -> Path:
        """Return the path of a source's overlay, a PNG or an MP4."""
        return self.folder / f'{source.name}{".mp4" if source.is_video else ".png"}'

    def labels_of(self, source: Source) -> Path:
        """Return the path of a source's label map, a PNG; for a video, the folder for those of its frames."""
        if source.is_video:
            return self.folder / _VIDEO_LABELS / source.name
        return self.folder / _LABELS / f'{source.name}.png'

    def confidence_of(self, source: Source) -> Path:
        """Return the path of a source's confidence, a PNG; for a video, the folder for those of its frames."""
        if source.is_video:
            return self.folder / _VIDEO_CONFIDENCE / source.name
        return self.folder / _CONFIDENCE / f'{source.name}.png'

    def raster_of(self, source: Source) -> Path:
        """Return the path of the label map of a TIFF that is written as GeoTIFF, without an overlay."""
        return self.folder / _LABELS / f'{source.name}.tif'

    def paths_of(self, source: Source, is_raster: bool = False) -> list[Path]:
        """List all outputs of a source: a picture, a video, or a TIFF that is written as GeoTIFF."""
        if is_raster:
            return [self.raster_of(source), *([self.polygons] if self.polygons else [])]
        paths = [self.overlay_of(source)]
        paths += [self.labels_of(source)] if self.labels else []
        return paths + ([self.confidence_of(source)] if self.confidence else [])

    def identity(self) -> dict[str, object]:
        """Return what decides how the outputs look, as plain values by name."""
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != 'folder'}
        return facts | dict(polygons=self.polygons and str(self.polygons))
