"""TIFF and GeoTIFF in and out by rasterio, in windows: what is held does not grow with the image."""

from __future__ import annotations

import json
import shutil
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.errors import MissingPackage, UnreadableFile, UserError, first_sentence
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.inference.polygons import Polygon, Polygonizer
from mmseg_inceptionnext.inference.segmentor import Segmentor, confidence_bytes, shares_of
from mmseg_inceptionnext.inference.tiles import Region
from mmseg_inceptionnext.inference.tiling import Strip
from mmseg_inceptionnext.labels import Classes

POLYGON_SUFFIXES = ('.gpkg', '.geojson')

_BLOCK = 512  # side of the tiles of the files that are written
_CACHE = 2**26  # bytes of decoded blocks that GDAL holds at least
_POINTS = 2**17  # of polygons that are written at once, at least
_LON_LAT = 'OGC:CRS84'  # coordinates of GeoJSON


def import_rasterio() -> ModuleType:
    """Import rasterio.

    Raises:
        MissingPackage: It is not installed.
    """
    return _import('rasterio', 'TIFF files in tiles, with bands or with polygons')


def segment_raster(
    segmentor: Segmentor,
    path: str | Path,
    out: str | Path,
    bands: Sequence[int] | None = None,
    scale: tuple[float, float] | None = None,
    polygons: str | Path | None = None,
    min_area: int = 0,
    batch_size: int = 1,
    on_progress: Callable[[float], None] = lambda share: None,
    confidence: bool = False,
    min_confidence: float = 0,
) -> dict[str, float]:
    """Segment a TIFF into a GeoTIFF of labels, and polygons. It is read and written in windows if it is in tiles.

    The labels are coded as the data set's annotations are, with the classes' colours as palette, and have the CRS and
    the transform of the image. Pixels without data stay without.

    Args:
        segmentor: The segmentor, whose ``tile`` decides about tiles.
        path: The TIFF.
        out: Path of the labels, a TIFF.
        bands: Bands to read, counted from 1, as many as the model takes: red, green and blue, if it takes these.
            Default: all, without alpha.
        scale: Values that become 0 and 255; others are clipped. Default: 8 bits as they are, and other values, too,
            if the model does not take 3 channels.
        polygons: Path of the polygons, ``.gpkg`` or ``.geojson``: in longitude and latitude, if the image has a CRS.
        min_area: Polygons of fewer pixels are left out, but parts of regions: see :class:`~.polygons.Polygonizer`.
        batch_size: Tiles in one forward pass.
        on_progress: Called with the share of the image that was segmented since the last call.
        confidence: Write the labels' probabilities as the last band, 255 for 1. Such a file has no palette.
        min_confidence: Pixels whose label is less probable have no data in the output.

    Returns:
        ``{name: share}`` of the pixels with data, of the classes that are in the image, largest first.

    Raises:
        UnreadableFile: The image is no TIFF, damaged, too thin, or its values are not known to be what the model takes;
            or a name is no UTF-8.
        MissingPackage: rasterio, or for ``.gpkg`` pyogrio, is not installed.
        OSError: A file cannot be written. Neither of them is there then.
    """
    names = [str(each) for each in (path, out, polygons) if each is not None]
    if odd := [name for name in names if name.encode(errors='ignore').decode() != name]:
        raise UnreadableFile(f'{path}: {odd[0]} has bytes in its name that are no UTF-8, which GDAL needs: rename it')
    with Raster(path, segmentor.channels, bands, scale) as raster, ExitStack() as files:
        with _named(path):
            tile = segmentor.tiles and segmentor.tiles.tile_of(raster.size)
        if tile is None:
            strips = _whole(segmentor, raster, confidence or min_confidence > 0)
        else:
            temperature = segmentor.temperature if confidence or min_confidence else None
            strips = segmentor.tiles.strips(raster.size, raster.read, tile, batch_size, temperature)
            raster.hold_rows(tile)
        if raster.crs is None:
            say(f'{path} has no CRS: the outputs have its pixels as coordinates, or those of its transform')
        # Both are closed and checked before either takes its place.
        partials = [files.enter_context(atomic_write(Path(path))) for path in (out, polygons) if path is not None]
        has_nodata = raster.has_nodata or min_confidence > 0
        sinks = [files.enter_context(_Labels(partials[0], raster, segmentor.classes, has_nodata, confidence))]
        if polygons is not None:
            sinks.append(files.enter_context(_Polygons(partials[1], raster, segmentor.classes, min_area)))
        pixels = np.zeros(len(segmentor.classes.names), np.int64)
        for strip in strips:
            if min_confidence:
                is_sure = strip.confidence >= min_confidence
                strip = replace(strip, valid=is_sure if strip.valid is None else strip.valid & is_sure)
            for sink in sinks:
                sink.add(strip)
            known = strip.labels.ravel() if strip.valid is None else strip.labels[strip.valid]
            pixels += np.bincount(known, minlength=len(pixels))
            on_progress(len(strip.labels) / raster.size[0])
    return shares_of(pixels, segmentor.classes.names)


def _open(path: Path, **options):
    """Open a TIFF; that one has no coordinates is said elsewhere."""
    rasterio = import_rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, **options)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Let what is wrong with an image's size be a fault of its file."""
    try:
        yield
    except UserError as error:
        raise UnreadableFile(f'{path}: {error}') from error


def _whole(segmentor: Segmentor, raster: Raster, with_confidence: bool) -> Iterator[Strip]:
    pixels, valid = raster.read(Region(0, raster.size[0], 0, raster.size[1]))
    with _named(raster.path):
        prepared = segmentor.prepare(pixels)
    (result,) = segmentor.predict([prepared])
    yield Strip(0, result.labels, valid, result.confidence if with_confidence else None)


class Raster:
    """A TIFF that is read in windows; a context manager.

    Args:
        path: Path of the file.
        channels: Channels of the pixels: bands that the model takes.
        bands, scale: Arguments of :func:`segment_raster`.

    Attributes:
        size: Height and width.
        crs: Its CRS; None if it has none.
        transform: From pixels to coordinates.
        has_nodata: Whether pixels may be without data: by a nodata value, a mask or an alpha band.

    Raises:
        UnreadableFile: As :func:`segment_raster`.
    """

    def __init__(self, path: str | Path, channels: int, bands: Sequence[int] | None = None,
                 scale: tuple[float, float] | None = None):  # fmt: skip
        self.path, self._scale, self._cache = path, scale, _CACHE
        self._means: dict[int, float] = {}  # of bands
        self._rasterio = import_rasterio()
        if scale is not None and not scale[0] < scale[1]:
            raise UserError(f'scale={tuple(scale)}: the second value must be larger than the first')
        try:
            self._dataset = _open(path, driver='GTiff')
        except self._rasterio.errors.RasterioError as error:
            reason = 'no such file' if not Path(path).exists() else f'not a TIFF that can be read: {_reason(error)}'
            raise UnreadableFile(f'{path}: {reason}') from error
        try:
            self._choose(channels, bands)
        except UnreadableFile:
            self._dataset.close()
            raise
        self.size, self.crs = self._dataset.shape, self._dataset.crs
        self.transform, self.gcps = self._dataset.transform, self._dataset.gcps
        flags = self._dataset.mask_flag_enums
        self.has_nodata = any(self._rasterio.enums.MaskFlags.all_valid not in flags[i - 1] for i in self._bands)

    def _choose(self, channels: int, bands: Sequence[int] | None) -> None:
        kinds, dataset = self._rasterio.enums.ColorInterp, self._dataset
        self._palette, self._repeat = None, 1
        colours = [i for i, kind in zip(dataset.indexes, dataset.colorinterp, strict=True) if kind != kinds.alpha]
        if bands is not None:
            if missing := [band for band in bands if band not in dataset.indexes]:
                raise UnreadableFile(f'{self.path}: has no band {missing[0]}, but {dataset.count}: correct bands=')
            if len(bands) != channels:
                raise UnreadableFile(f'{self.path}: the model takes {channels} bands, bands= names {len(bands)}')
            self._bands = list(bands)
        elif len(colours) == channels:
            self._bands = colours
        elif len(colours) == 1 and channels == 3:  # grey, or a palette
            self._bands, self._repeat = colours, 3
            if dataset.colorinterp[colours[0] - 1] == kinds.palette:
                entries = dataset.colormap(colours[0])
                self._palette = np.array([entries.get(i, (0, 0, 0))[:3] for i in range(max(entries) + 1)], np.uint8)
        else:
            some = tuple(colours[:channels]) if len(colours) > channels else ()
            advice = f'choose them, such as bands={some}' if some else 'it cannot be used'
            raise UnreadableFile(f'{self.path}: has {len(colours)} bands, but the model takes {channels}: {advice}')
        dtypes = {dataset.dtypes[band - 1] for band in self._bands}
        if any(np.dtype(dtype).kind == 'c' for dtype in dtypes):
            raise UnreadableFile(f'{self.path}: holds complex numbers, which are no pixels')
        self._is_8_bit = dtypes == {'uint8'}
        if not self._is_8_bit and self._scale is None and channels == 3:
            raise UnreadableFile(
                f'{self.path}: holds {" and ".join(sorted(dtypes))} values, and the model takes 3 channels from 0 to '
                '255: say which values become 0 and 255, such as scale=(0, 10000)'
            )

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *_) -> None:
        self._dataset.close()

    def hold_rows(self, rows: int) -> None:
        """Let GDAL hold the decoded blocks of so many rows, so that those of one row of tiles are decoded once."""
        height, width = self.size
        tallest = max(self._dataset.block_shapes[band - 1][0] for band in self._bands)
        is_by_band = self._dataset.interleaving == self._rasterio.enums.Interleaving.band
        together = len(self._bands) if is_by_band else self._dataset.count
        bytes_of_row = width * together * max(np.dtype(dtype).itemsize for dtype in self._dataset.dtypes)
        self._cache = _CACHE + min(rows + 2 * tallest, height) * bytes_of_row

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray | None]:
        """Read a part of the image.

        Returns:
            (h, w, channels) uint8, or float32 where the file has other values or a scale is given. Pixels without data
            are the mean of the others in their band; where it has none, of those of the whole file. And where there are
            data, (h, w) bool; None for everywhere.

        Raises:
            UnreadableFile: The part is damaged, or holds values that are not finite.
        """
        (height, width), where = region.shape, f'rows {region.top} to {region.bottom - 1}'
        window = self._rasterio.windows.Window(region.left, region.top, width, height)
        values, masks = self._decoded(self._bands, window)
        if masks is not None and masks.all():
            masks = None
        known = values if masks is None else values[masks]
        if values.dtype.kind == 'f' and not np.isfinite(known).all():
            raise UnreadableFile(f'{self.path}: {where} hold values that are not finite: declare them as nodata')
        if self._palette is not None:
            values = self._palette[np.minimum(values[0], len(self._palette) - 1)].transpose(2, 0, 1)
        elif self._repeat > 1:
            values = np.repeat(values, self._repeat, axis=0)
        if masks is not None and self._repeat > 1:
            masks = np.repeat(masks, self._repeat, axis=0)
        return self._pixels(values, masks), None if masks is None else masks.any(axis=0)

    def _decoded(self, bands: int | list[int], window) -> tuple[np.ndarray, np.ndarray | None]:
        """Return stored values of a part of some bands, and which of them are data."""
        try:
            # Without the first, a damaged JPEG is grey in silence. The environment of a thread is its own.
            with self._rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True, GDAL_CACHEMAX=self._cache):
                values = self._dataset.read(bands, window=window)
                return values, self._dataset.read_masks(bands, window=window) > 0 if self.has_nodata else None
        except self._rasterio.errors.RasterioError as error:
            (top, bottom), (left, right) = window.toranges()
            raise UnreadableFile(
                f'{self.path}: rows {top} to {bottom - 1}, columns {left} to {right - 1} are damaged ({_reason(error)})'
            ) from error

    def _mean_of(self, band: int) -> float:
        """Return the mean of a band's pixels with data."""
        if band not in self._means:
            total = number = 0
            for _, window in self._dataset.block_windows(band):
                values, mask = self._decoded(band, window)
                total, number = total + values[mask].sum(dtype=np.float64), number + mask.sum()
            if not number:
                raise UnreadableFile(f'{self.path}: band {band} has no data: choose others by bands=')
            self._means[band] = float(total / number)
        return self._means[band]

    def _pixels(self, values: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
        if not self._is_8_bit or self._scale is not None:
            values = values.astype(np.float32)
        if masks is not None:
            values = values.copy()
            for i, (band, mask) in enumerate(zip(values, masks, strict=True)):
                if mask.any():
                    band[~mask] = band[mask].mean(dtype=np.float64)
                elif masks.any():  # other bands have data here; then none is repeated
                    band[:] = self._mean_of(self._bands[i])
        if self._scale is not None:
            low, high = self._scale
            values = ((values - low) * (255 / (high - low))).clip(0, 255).astype(np.float32)
        return np.ascontiguousarray(values.transpose(1, 2, 0))


class _Labels:
    """A GeoTIFF of labels, written in strips; a context manager.

    GDAL reports a full disk while it writes blocks, but not when it ends a file. So the file is read again.
    """

    def __init__(self, path: Path, raster: Raster, classes: Classes, has_nodata: bool, confidence: bool):
        self._path, self._rasterio, self._classes, self._confidence = path, import_rasterio(), classes, confidence
        example = classes.encode(np.zeros((1, 1), np.int16))
        self._is_rgb = example.ndim == 3
        profile = dict(
            driver='GTiff', height=raster.size[0], width=raster.size[1],
            count=(3 if self._is_rgb else 1) + confidence,
            dtype=example.dtype, crs=raster.crs, tiled=True, blockxsize=_BLOCK, blockysize=_BLOCK, compress='deflate',
            BIGTIFF='IF_SAFER',
        )  # fmt: skip
        if self._is_rgb:
            profile.update(photometric='rgb', interleave='pixel')
        if confidence:
            profile['alpha'] = 'unspecified'
        self._nodata = None
        if has_nodata:
            self._nodata = profile['nodata'] = _unused_code(classes)
            if self._nodata > 255:
                profile['dtype'] = np.uint16
        self._dtype = np.dtype(profile['dtype'])
        if raster.transform != self._rasterio.Affine.identity():
            profile['transform'] = raster.transform
        self._row, self._rows, self._sums = 0, [], []
        with self._named_errors():
            self._file = _open(path, mode='w', **profile)
            if raster.gcps[0]:
                self._file.gcps = raster.gcps
            if confidence:
                self._file.set_band_description(self._file.count, 'confidence')
            elif not self._is_rgb:
                colours = zip(classes.codes, classes.palette, strict=True)
                self._file.write_colormap(1, {code: colour for code, colour in colours if code < 256 or
                                              self._dtype == np.uint16})  # fmt: skip

    def __enter__(self) -> _Labels:
        return self

    def add(self, strip: Strip) -> None:
        """Write some rows, as soon as those of whole blocks are there."""
        values = self._classes.encode(strip.labels).astype(self._dtype, copy=False)
        if strip.valid is not None:
            values[~strip.valid] = self._nodata
        if self._confidence:
            values = np.dstack([values, self._confidence_of(strip)])
        self._rows.append(values)
        ready = sum(map(len, self._rows)) // _BLOCK * _BLOCK
        if ready:
            values = np.concatenate(self._rows)
            self._rows = [values[ready:]]
            self._write(values[:ready])

    def _confidence_of(self, strip: Strip) -> np.ndarray:
        """Return a band whose values are never those of nodata, but where there are none."""
        values = confidence_bytes(strip.confidence).astype(self._dtype)
        if self._nodata is not None:
            values[values == self._nodata] = self._nodata - 1 if self._nodata else 1
        if strip.valid is not None:
            values[~strip.valid] = self._nodata
        return values

    def _write(self, values: np.ndarray) -> None:
        bands = np.ascontiguousarray(values.transpose(2, 0, 1) if values.ndim == 3 else values[None])
        self._sums.append((self._window(self._row, len(values)), zlib.crc32(bands)))
        with self._named_errors():
            self._file.write(bands, window=self._sums[-1][0])
        self._row += len(values)

    def _window(self, row: int, rows: int):
        return self._rasterio.windows.Window(0, row, self._file.width, rows)

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and sum(map(len, self._rows)):
                self._write(np.concatenate(self._rows))
        finally:
            with self._named_errors():
                self._file.close()
        if kind is None:
            with self._named_errors(), _open(self._path) as file:
                for window, expected in self._sums:
                    if zlib.crc32(np.ascontiguousarray(file.read(window=window))) != expected:
                        raise OSError(None, f'it is not what was written: {_space(self._path)}')

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except self._rasterio.errors.RasterioError as error:
            raise OSError(None, f'{_reason(error)}: {_space(self._path)}') from error


class _Polygons:
    """A file of polygons, written as they are complete; a context manager."""

    def __init__(self, path: Path, raster: Raster, classes: Classes, min_area: int):
        self._polygonizer, self._min_area = Polygonizer(raster.size[1]), min_area
        a, b, c, d, e, f = raster.transform[:6]
        self._matrix, self._origin = np.array([(a, d), (b, e)]), np.array([c, f])
        self._classes, self._has_parts = classes, False
        self._waiting, self._points = [], 0  # polygons to be written, and their points
        self._file = (_GeoPackage if path.suffix.lower() == '.gpkg' else _GeoJson)(path, raster.crs)

    def __enter__(self) -> _Polygons:
        return self

    def add(self, strip: Strip) -> None:
        self._take(self._polygonizer.add(strip.labels, strip.valid))

    def _take(self, polygons: Iterable[Polygon]) -> None:
        for polygon in polygons:
            if polygon.is_part and not self._has_parts:
                self._has_parts = True
                name = self._classes.names[polygon.label]
                say(f'polygons: regions of millions of points, as one of {name}, are in several parts, cut along rows')
            if (area := polygon.area) >= self._min_area or polygon.is_part:
                rings = [ring @ self._matrix + self._origin for ring in polygon.ordered()]
                code = self._classes.codes[polygon.label]
                self._waiting.append((rings, self._classes.names[polygon.label], str(code), area))
                self._points += polygon.number_of_points
                if self._points >= _POINTS:
                    self._flush()

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._waiting, self._points = [], 0

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._take(self._polygonizer.close())
                self._flush()
        finally:
            self._file.close()
        if kind is None:
            self._file.check()


class _GeoJson:
    """GeoJSON (RFC 7946): longitude and latitude; of an image without a CRS, its own coordinates."""

    def __init__(self, path: Path, crs):
        self._crs, self._written = crs, 0
        self._file = open(path, 'w', encoding='utf-8')  # noqa: SIM115  close() does
        self._file.write('{"type": "FeatureCollection", "features": [')

    def write(self, features: list[tuple]) -> None:
        rings = iter(self._in_degrees([ring for rings, *_ in features for ring in rings]))
        for own, name, code, pixels in features:
            coordinates = [_closed_ring(next(rings), i == 0) for i in range(len(own))]
            feature = dict(
                type='Feature',
                properties={'class': name, 'code': code, 'pixels': pixels},
                geometry=dict(type='Polygon', coordinates=coordinates),
            )
            self._file.write((',\n' if self._written else '\n') + json.dumps(feature, ensure_ascii=False))
            self._written += 1

    def _in_degrees(self, rings: list[np.ndarray]) -> list[np.ndarray]:
        if self._crs is None or not rings:
            return rings
        warp = _import('rasterio.warp', '.geojson files')
        points = np.stack(warp.transform(self._crs, _LON_LAT, *np.concatenate(rings).T), axis=1)
        return np.split(points, np.cumsum([len(ring) for ring in rings])[:-1])

    def close(self) -> None:
        with self._file:
            self._file.write('\n]}\n')

    def check(self) -> None:
        pass  # Python reports a full disk


def _closed_ring(ring: np.ndarray, is_outer: bool) -> list[list[float]]:
    """Return the points of a ring of GeoJSON: outer ones counter-clockwise, holes clockwise."""
    x, y = (ring - ring[0]).T
    is_left = x @ np.roll(y, -1) - y @ np.roll(x, -1) > 0
    points = (ring if is_left == is_outer else ring[::-1]).tolist()
    return [*points, points[0]]


class _GeoPackage:
    """A layer 'labels' of a GeoPackage, in the CRS of the image."""

    def __init__(self, path: Path, crs):
        self._path, self._crs, self._is_there, self._written = path, crs and crs.to_wkt(), False, 0
        self._pyogrio = _import('pyogrio', '.gpkg files')

    def write(self, features: list[tuple]) -> None:
        shapes = np.array([_wkb(rings) for rings, *_ in features], dtype=object)
        columns = [list(column) for column in zip(*(fields for _, *fields in features), strict=True)] or [[], [], []]
        dtypes = object, object, np.int64
        data = [np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
        try:
            with warnings.catch_warnings():  # of a layer without a CRS: it is said
                warnings.simplefilter('ignore')
                self._pyogrio.raw.write(
                    self._path, shapes, data, ['class', 'code', 'pixels'], layer='labels', driver='GPKG',
                    geometry_type='Polygon', crs=self._crs, append=self._is_there,
                )  # fmt: skip
        except (self._pyogrio.errors.DataSourceError, self._pyogrio.errors.DataLayerError, RuntimeError) as error:
            raise OSError(None, f'{first_sentence(error)}: {_space(self._path)}') from error
        self._is_there, self._written = True, self._written + len(features)

    def close(self) -> None:
        journal = self._path.with_name(f'{self._path.name}-journal')
        journal.unlink(missing_ok=True)  # of a write that failed

    def check(self) -> None:
        """Check that all polygons are there, and in the spatial index: when that is full, GDAL says nothing."""
        with closing(sqlite3.connect(self._path)) as file:
            tables = 'labels', 'rtree_labels_geom_rowid'
            try:
                numbers = {file.execute(f'SELECT count(*) FROM {table}').fetchone()[0] for table in tables}
            except sqlite3.Error:
                numbers = set()
        if numbers != {self._written}:
            raise OSError(None, f'it is not what was written: {_space(self._path)}')


def _wkb(rings: list[np.ndarray]) -> bytes:
    """Return a polygon as well-known binary, little-endian."""
    content = [b'\1', np.array([3, len(rings)], '<u4').tobytes()]
    for ring in rings:
        content += [
            np.array([len(ring) + 1], '<u4').tobytes(),
            np.concatenate([ring, ring[:1]]).astype('<f8').tobytes(),
        ]
    return b''.join(content)


def _unused_code(classes: Classes) -> int:
    """Return a value, as of each band, that no class is coded by: 0 or 255, if these are free."""
    used = {code if isinstance(code, int) else code[0] for code in classes.codes if _is_grey(code)}
    return next(code for code in (0, 255, *range(1, 65536)) if code not in used)


def _is_grey(code) -> bool:
    return isinstance(code, int) or len(set(code)) == 1


def _reason(error: BaseException) -> str:
    """Return what GDAL says, which rasterio's own message refers to."""
    return first_sentence(error.__cause__ or error)


def _space(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free >> 20
    return f'{free} MiB are free there'


def _import(name: str, what: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f'{what} need {name}: pip install mmseg-inceptionnext[geo]') from error
