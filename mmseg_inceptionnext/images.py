"""Read images as RGB arrays, or say why one cannot be read."""

from __future__ import annotations

import os
import struct
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from mmengine.fileio import LocalBackend, get_file_backend
from PIL import ExifTags, Image

from mmseg_inceptionnext.errors import MissingImage, MissingPackage, UnreadableFile, first_sentence
from mmseg_inceptionnext.folders import find_files

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm', '.pgm', '.jp2')

_TIFF_BEGINS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # the last two are BigTIFF's
_SAMPLES_PER_PIXEL = 277  # TIFF tag
# What undoes an EXIF orientation. Pillow's exif_transpose also writes all tags anew, and fails at a damaged one.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HOW_TO_READ_TIFF = 'pip install mmseg-inceptionnext[tiff]'


def local_or_content(path: str, backend_args: dict | None = None) -> str | BytesIO:
    """Return the path of a local file as it is, and the content of one in another storage.

    Args:
        path: Path of the file.
        backend_args: Argument of ``mmengine.fileio.get_file_backend``, which otherwise goes by the path's prefix.
    """
    backend = get_file_backend(path, backend_args=backend_args, enable_singleton=True)
    return path if isinstance(backend, LocalBackend) else BytesIO(backend.get(path))


def read_image(source: str | Path | BytesIO | Image.Image | np.ndarray, channels: int = 3) -> np.ndarray:
    """Read an image file, a PIL image or an array as RGB, or with another number of channels.

    Three channels are a photograph: grey, palette, CMYK and 16-bit images become 8-bit RGB, and alpha is dropped.
    mmseg's pipelines (OpenCV) read the same, except that CMYK and YCbCr may differ by one. With another number, the
    values are taken as they are stored; only colours become grey where one channel is asked for. EXIF orientation is
    applied, and the first frame of an animation is taken.

    Args:
        source: Path or content of an image file; a PIL image of any mode; or an array of RGB (H, W, 3) or grey (H, W)
            values, uint8, or (H, W, channels) of uint8 or float32.
        channels: Number of channels. A file must have as many, but for 1 and 3: 4 of an RGBA image, for example, or the
            bands of a TIFF.

    Returns:
        (H, W, channels) uint8, or float32 where the file has more than 8 bits and ``channels`` is not 3. An array that
        was given is copied.

    Raises:
        UnreadableFile: There is no such file, or it is no image, truncated, a decompression bomb, empty, of
            floating-point values where 3 channels are asked for, or of another number of channels.
        MissingPackage: A TIFF of other than 3 channels needs tifffile.
        TypeError: The source is of another type, or an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray) and channels != 3:
        if source.dtype not in (np.uint8, np.float32) or source.ndim != 3 or source.shape[2] != channels:
            raise TypeError(
                f'expected an array (H, W, {channels}) of uint8 or float32, got {source.shape} of {source.dtype}'
            )
        return _not_empty(source.copy())
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.ndim == 3 and source.shape[2] != 3:
            raise TypeError(f'expected an array (H, W, 3) or (H, W) of uint8, got {source.shape} of {source.dtype}')
        pixels = source.copy() if source.ndim == 3 else np.repeat(source[..., None], 3, axis=2)
        return _not_empty(pixels)
    if isinstance(source, Image.Image):
        return _not_empty(_pixels(source, channels))
    if not isinstance(source, (str, Path, BytesIO)):
        raise TypeError(f'expected a path, a PIL image or an array, got {type(source).__name__}')
    try:
        check_is_file(source)
        if channels != 3 and is_tiff(source):
            return _not_empty(_bands(_tiff_values(source), channels))
        with Image.open(source) as image:
            return _not_empty(_pixels(image, channels))
    except (UnreadableFile, MissingPackage) as error:
        raise type(error)(f'{source}: {error}') from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        # Pillow's, on damage
        kind = MissingImage if isinstance(error, FileNotFoundError) else UnreadableFile
        raise kind(f'{source}: {why_unreadable(error)}') from error


def read_picture(source: str | Path | BytesIO) -> np.ndarray:
    """Return an image of any number of channels as RGB (H, W, 3), uint8, for people to look at.

    Raises:
        UnreadableFile, MissingPackage: As :func:`read_image` does.
    """
    try:
        return read_image(source)
    except UnreadableFile:
        if not is_tiff(source):
            raise
        return as_rgb(_tiff_values(source))


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) of an image file in its EXIF orientation, without decoding it.

    Raises:
        Exception: Of any kind, where it is no image.
    """
    check_is_file(path)
    try:
        with Image.open(path) as image:
            return oriented_size(image)
    except Image.UnidentifiedImageError:
        if not is_tiff(path):
            raise
        with _tifffile().TiffFile(path) as file:
            return file.pages[0].imagewidth, file.pages[0].imagelength


def check_is_file(source: str | Path | BytesIO) -> None:
    """Check that a path is none of a directory, a pipe, which would be waited for without an end, or a device.

    Raises:
        UnreadableFile: It is, without its name.
    """
    if not isinstance(source, BytesIO) and os.path.exists(source) and not os.path.isfile(source):
        raise UnreadableFile('a directory, a pipe or a device, not a file')


def why_unreadable(error: Exception) -> str:
    """Say in words why Python or Pillow cannot read an image."""
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, Image.UnidentifiedImageError):
        return 'not an image, or of a format that Pillow does not read'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _not_empty(pixels: np.ndarray) -> np.ndarray:
    if not pixels.size:
        raise UnreadableFile('an image without a pixel')
    return pixels


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, which is not decoded yet: 1, as it is, … 8; on its side from 5 on."""
    stored = image.getexif().get(ExifTags.Base.Orientation)
    return stored if stored in range(1, 9) else 1


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an image, which is not decoded yet, in its EXIF orientation."""
    width, height = image.size
    if image.format == 'TIFF' or orientation(image) < 5:  # of a TIFF, Pillow turns the size itself
        return width, height
    return height, width


def stored_channels(image: Image.Image) -> int:
    """Return the number of channels of an image's file, those that Pillow would leave out included."""
    stored = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) if image.format == 'TIFF' else 1
    return max(stored, len(image.getbands()))


def list_image_files(folder: Path) -> list[Path]:
    """List all image files under a folder, by suffix in any case, sorted, see :func:`find_files`."""
    if not folder.is_dir():
        return []
    return [folder / path for path in find_files(folder, IMAGE_SUFFIXES)]


def swap_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) pixels in the order of mmseg's pipelines, contiguous: RGB becomes BGR, others stay."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else np.ascontiguousarray(pixels)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) pixels as (H, W, 3) uint8 for people to look at: the first three channels, or the first as grey.

    Values of more than 8 bits are stretched: their 2nd percentile becomes black, their 98th white.
    """
    shown = pixels[..., :3] if pixels.shape[2] > 2 else np.repeat(pixels[..., :1], 3, axis=2)
    if shown.dtype == np.uint8:
        return shown
    low, high = np.percentile(shown, (2, 98))
    return (np.clip((shown - low) / max(high - low, 1e-12), 0, 1) * 255).round().astype(np.uint8)


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    stored = stored_channels(image)
    if stored > len(image.getbands()):
        raise UnreadableFile(f'has {stored} channels that are not colours: set channels={stored}')
    image.load()
    turn = _TURNS.get(orientation(image))
    if turn is not None and image.format != 'TIFF':  # Pillow turns TIFFs itself
        image = image.transpose(turn)
    if channels not in (1, 3):
        return _bands(np.asarray(image), channels)
    if image.mode == 'F' and channels == 3:
        raise UnreadableFile('holds floating-point values, whose range is not known: save it with 8 or 16 bits')
    if channels == 1 and image.mode[0] in 'IF':
        return _bands(np.asarray(image), channels)
    if image.mode.startswith('I'):  # 16 bits, though Pillow may use 32 to hold them
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableFile('holds 32-bit values: save it with 8 or 16 bits')
        return np.repeat((values >> 8).astype(np.uint8)[..., None], channels, axis=2)
    if channels == 1:
        return np.asarray(image.convert('L'))[..., None]
    return np.asarray(image.convert('RGB'))


def _bands(values: np.ndarray, channels: int) -> np.ndarray:
    """Return stored values (H, W) or (H, W, C) as :func:`read_image` does for other than 3 channels."""
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise UnreadableFile(f'has {values.shape[2]} channels, not {channels}')
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise UnreadableFile('holds values that are not finite')
    return values


def is_tiff(source: str | Path | BytesIO) -> bool:
    """Return whether a path or the content of a file is a TIFF's."""
    if isinstance(source, BytesIO):
        return source.getvalue()[:4] in _TIFF_BEGINS
    if not os.path.isfile(source):
        return False
    with open(source, 'rb') as file:
        return file.read(4) in _TIFF_BEGINS


def _tiff_values(source: str | Path | BytesIO) -> np.ndarray:
    """Return the first image of a TIFF as (H, W, bands), whatever the order in which the bands are stored."""
    try:
        with _tifffile().TiffFile(source) as file:
            series = file.series[0]
            axes, values = series.axes, series.asarray()
    except (OSError, MissingPackage):
        raise
    except Exception as error:  # of damaged files; tifffile also raises plain ValueError for a missing codec
        if 'imagecodecs' in str(error):
            raise MissingPackage(f'is compressed: {_HOW_TO_READ_TIFF}') from error
        raise UnreadableFile(f'not a TIFF that can be read: {first_sentence(error)}') from error
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3 or not {'Y', 'X'} <= set(axes):
        raise UnreadableFile(f'has the axes {axes}, not height, width and bands')
    return np.moveaxis(values, [axes.index('Y'), axes.index('X')], [0, 1])


def _tifffile() -> ModuleType:
    try:
        return import_module('tifffile')
    except ImportError as error:
        raise MissingPackage(f'a TIFF of other than 3 channels: {_HOW_TO_READ_TIFF}') from error
