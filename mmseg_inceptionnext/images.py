"""Read images as RGB arrays, or say why one cannot be read."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from mmengine.fileio import LocalBackend, get_file_backend
from PIL import ExifTags, Image, ImageOps

from mmseg_inceptionnext.errors import MissingImage, UnreadableFile

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm', '.pgm', '.jp2')


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

    EXIF orientation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB, alpha is dropped, and the first
    frame of an animation is taken. mmseg's pipelines (OpenCV) read the same, except that CMYK and YCbCr may differ by
    one.

    Args:
        source: Path or content of an image file; a PIL image of any mode; or an array of RGB (H, W, 3) or grey (H, W)
            values, uint8.
        channels: 3 for RGB. 1 for grey, to which others are converted. Any other number: the channels of the file as
            they are, which must be that many, of 8 bits: 4 of an RGBA image, for example.

    Returns:
        (H, W, channels) uint8; an array that was given is copied.

    Raises:
        UnreadableFile: There is no such file, or it is no image, truncated, of floating-point values, a decompression
            bomb, or empty.
        TypeError: The source is of another type, or an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray) and channels != 3:
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != channels:
            raise TypeError(f'expected an array (H, W, {channels}) of uint8, got {source.shape} of {source.dtype}')
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
    if not isinstance(source, BytesIO) and Path(source).exists() and not Path(source).is_file():
        raise UnreadableFile(f'{source}: a directory, a pipe or a device, not a file')
    try:
        with Image.open(source) as image:
            return _not_empty(_pixels(image, channels))
    except UnreadableFile as error:
        raise UnreadableFile(f'{source}: {error}') from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # Pillow's, on damage
        kind = MissingImage if isinstance(error, FileNotFoundError) else UnreadableFile
        raise kind(f'{source}: {why_unreadable(error)}') from error


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


def oriented_size(image: Image.Image, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return (width, height) of an image in its EXIF orientation.

    Args:
        image: An image, decoded or not.
        size: Size of the file's pixels, where they were decoded at a smaller one.
    """
    width, height = size or image.size
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def list_image_files(folder: Path) -> list[Path]:
    """List all image files under a folder, by suffix in any case, sorted; hidden ones are left out."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        paths = (Path(parent, name) for name in names if not name.startswith('.'))
        found += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def swap_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) pixels in the order of mmseg's pipelines, contiguous: RGB becomes BGR, others stay."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else np.ascontiguousarray(pixels)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) pixels as (H, W, 3) for people to look at: the first three channels, or the first as grey."""
    return pixels[..., :3] if pixels.shape[2] > 2 else np.repeat(pixels[..., :1], 3, axis=2)


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if channels not in (1, 3):
        bands = len(image.getbands())
        if bands != channels or image.mode[0] in 'IF':
            raise UnreadableFile(f'has {bands} channels of mode {image.mode}, not {channels} of 8 bits')
        return np.asarray(image)
    if image.mode == 'F':
        raise UnreadableFile('holds floating-point values, whose range is not known: save it with 8 or 16 bits')
    if image.mode.startswith('I'):  # 16 bits, though Pillow may use 32 to hold them
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableFile('holds 32-bit values: save it with 8 or 16 bits')
        return np.repeat((values >> 8).astype(np.uint8)[..., None], channels, axis=2)
    if channels == 1:
        return np.asarray(image.convert('L'))[..., None]
    return np.asarray(image.convert('RGB'))
