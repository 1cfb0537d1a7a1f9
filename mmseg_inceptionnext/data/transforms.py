"""Pipeline transforms that refuse bad files, and the messages that say what is wrong with an annotation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmcv import rescale_size
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from PIL import Image

from mmseg_inceptionnext.data.mask_coding import named_errors, open_mask
from mmseg_inceptionnext.errors import BadSample, UnreadableFile, UserError
from mmseg_inceptionnext.images import local_or_content, read_image, stored_channels, swap_rgb
from mmseg_inceptionnext.labels import IGNORE_INDEX

# Values of LoadImageFromFile's arguments that ReadImage takes.
_KNOWN = {'color_type': ('color',), 'imdecode_backend': ('pillow', 'cv2')}


@TRANSFORMS.register_module()
class ReadImage(BaseTransform):
    """mmseg's LoadImageFromFile, which uses :func:`~mmseg_inceptionnext.images.read_image`.

    OpenCV, which mmseg uses, fills the missing part of a truncated JPEG with grey and reports nothing. The pixels of
    undamaged files are the same.

    Args:
        to_float32, ignore_empty, backend_args: Arguments of LoadImageFromFile.
        color_type, imdecode_backend: Arguments of LoadImageFromFile; only 'color' images are read, whose pixels are the
            same from 'cv2' and 'pillow'.
        channels: Argument of :func:`~mmseg_inceptionnext.images.read_image`; 3 channels become BGR, as mmseg's are.

    Raises:
        UserError: An argument has another value.
        UnreadableFile: The image cannot be read.
    """

    def __init__(self, to_float32: bool = False, color_type: str = 'color', imdecode_backend: str = 'pillow',
                 ignore_empty: bool = False, backend_args: dict | None = None, channels: int = 3):  # fmt: skip
        for name, value in (('color_type', color_type), ('imdecode_backend', imdecode_backend)):
            if value not in _KNOWN[name]:
                raise UserError(f'ReadImage: {name}={value!r} is not one of {_KNOWN[name]}: take LoadImageFromFile')
        self.to_float32, self.ignore_empty, self.backend_args = to_float32, ignore_empty, backend_args
        self.channels = channels

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if (name, value) != ('channels', 3)}
        settings = (f'{name}={value!r}' for name, value in shown.items())
        return f'{type(self).__name__}({", ".join(settings)})'

    def transform(self, results: dict) -> dict | None:
        try:
            image = read_image(local_or_content(results['img_path'], self.backend_args), self.channels)
        except OSError:  # UnreadableFile is one
            if self.ignore_empty:
                return None
            raise
        image = swap_rgb(image)
        if self.to_float32:
            image = image.astype(np.float32)
        shape = image.shape[:2]
        if results.get('seg_map_path') and (fault := one_pixel_fault(shape[::-1])):
            raise UnreadableFile(f'{results["img_path"]} {fault}')
        results.update(img=image, img_shape=shape, ori_shape=shape)
        return results


def takes_arguments_of(loader: dict) -> bool:
    """Return whether :class:`ReadImage` reads as the config of a LoadImageFromFile asks for."""
    arguments = set(loader) - {'type', '_scope_'}
    return arguments <= {'to_float32', 'ignore_empty', 'backend_args', *_KNOWN} and all(
        loader[name] in _KNOWN[name] for name in arguments & set(_KNOWN)
    )


@TRANSFORMS.register_module()
class CheckAnnotation(BaseTransform):
    """Checks the label map after LoadAnnotations: one that would fail later or train wrongly is an error.

    On a GPU, a label out of range ends in a device-side assert that names no file. A sample without a label map, as
    mmseg's inferencers make it, is left as it is.

    Args:
        num_classes: Labels 0 … num_classes - 1 are valid.
        ignore_index: Label of pixels without a class. So is 255, which LoadAnnotations makes of label 0 where
            ``reduce_zero_label`` is set: it becomes this label.
        backend_args: Argument of LoadAnnotations.

    Raises:
        BadSample: It is stored in a way that changes labels, has several channels, another size than its image, or an
            invalid label.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, backend_args: dict | None = None):
        self.num_classes, self.ignore_index, self.backend_args = num_classes, ignore_index, backend_args

    def __repr__(self) -> str:
        settings = (f'{name}={value!r}' for name, value in vars(self).items())
        return f'{type(self).__name__}({", ".join(settings)})'

    def transform(self, results: dict) -> dict:
        if 'gt_seg_map' not in results:
            return results
        labels, path = results['gt_seg_map'], results['seg_map_path']
        # LoadAnnotations has squeezed it, and cast it to 8 bits, whatever it was.
        with named_errors(path), open_mask(local_or_content(path, self.backend_args)) as stored:
            if fault := ids_fault(stored):
                raise BadSample(fault)
            if stored.size != tuple(results['ori_shape'][::-1]):
                raise BadSample(size_fault(stored.size, results['img_path'], results['ori_shape'][::-1]))
        if labels.ndim > 2:
            raise BadSample(f'{path} {channels_fault(labels.shape[2])}')
        wrong = (labels >= self.num_classes) & (labels != IGNORE_INDEX) & (labels != self.ignore_index)
        if wrong.any():
            shift = int(results['reduce_zero_label'])
            raise BadSample(f'{path} {label_fault(int(labels[wrong].min()) + shift, self.num_classes, shift)}')
        if self.ignore_index != IGNORE_INDEX:
            results['gt_seg_map'] = np.where(labels == IGNORE_INDEX, self.ignore_index, labels).astype(labels.dtype)
        return results


def ids_fault(stored: Image.Image) -> str | None:
    """Say what is wrong with an annotation whose file does not hold one id of 8 bits a pixel; None if it does."""
    if (channels := stored_channels(stored)) > 1:
        return channels_fault(channels)
    if stored.mode[0] in 'IF':
        values = np.asarray(stored)
        with np.errstate(invalid='ignore'):  # not a number
            odd = values[values != values.astype(np.uint8)]
        if odd.size:
            return f'has label {odd.max()}: an annotation has 8 bits, 0 … 255'
    return None


def channels_fault(channels: int) -> str:
    """Say what is wrong with an annotation of several channels."""
    return f'has {channels} channels: an annotation has one, which holds class ids'


def one_pixel_fault(size: Sequence[int]) -> str | None:
    """Say that an image (width, height) with an annotation, which LoadAnnotations squeezes, has a side of one pixel."""
    return f'is {size[0]}×{size[1]}, too thin to be trained or tested on: leave it out' if 1 in size else None


def vanishing_fault(size: Sequence[int], scale: tuple[int, int] | None) -> str | None:
    """Say that nothing is left of an image (width, height) when it is fitted into a scale; None if something is."""
    if scale is None or 0 not in (resized := rescale_size(size, scale)):
        return None
    sizes = f'{size[0]}×{size[1]}, which the pipeline resizes to {resized[0]}×{resized[1]}'
    return f'is {sizes}: crop it, or leave it out'


def size_fault(size: Sequence[int], image: str, image_size: Sequence[int]) -> str:
    """Say that an annotation has another size than its image; sizes are (width, height)."""
    return f'is {size[0]}×{size[1]}, but {image} is {image_size[0]}×{image_size[1]}'


def label_fault(label: int, num_classes: int, first: int) -> str:
    """Say that a label, as it is in the file, is out of range; the first class has label ``first`` there."""
    return (
        f'has label {label}, outside {first} … {num_classes - 1 + first} of {num_classes} classes: '
        'correct the annotation, or set num_classes'
    )
