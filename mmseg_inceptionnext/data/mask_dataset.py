"""The data set of a data file: folders of images and masks."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePath

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from mmseg_inceptionnext.data.data_file import fill_template
from mmseg_inceptionnext.data.mask_coding import MaskCoding, named_errors, open_mask
from mmseg_inceptionnext.data.transforms import size_fault
from mmseg_inceptionnext.errors import BadSample, UserError
from mmseg_inceptionnext.images import IMAGE_SUFFIXES, list_image_files

_MASK_SUFFIXES = ('.png', *(suffix for suffix in IMAGE_SUFFIXES if suffix != '.png'))


@DATASETS.register_module()
class MaskDataset(BaseSegDataset):
    """Images in folders, and a mask for each; :func:`~mmseg_inceptionnext.data.own_data.use_data_file` configures it.

    Images may lie in nested folders and have any suffix that is read. A mask has its image's relative path, with any
    suffix, or the path that a template says. ``ann_file`` may list the images, a name a line: relative to their folder,
    without suffix.

    Args:
        metainfo: 'classes', 'palette'; 'labels', the ids or colours in the masks of each class; and 'ignored', those of
            pixels without a class. The metainfo of the data set has 'codes' besides: the first of each class's.
        mask_template: Path of a mask, relative to ``data_root``; ``{image_path}``, with attributes, is the image's.
        part: 'train' or 'val': only the images that are not, or are, held out for validation.
        val_fraction: Share of the images that are held out, by a hash of their names: others that are added later
            move none.
        ignore_index: Label of pixels without a class.
        **kwargs: Other arguments of mmseg's BaseSegDataset.

    Raises:
        UserError: Two images, or two masks, have one name; or an image that is listed is not there.
    """

    def __init__(self, metainfo: dict, mask_template: str | None = None, part: str | None = None,
                 val_fraction: float = 0.1, ignore_index: int = 255, **kwargs):  # fmt: skip
        self.mask_template, self.part, self.val_fraction = mask_template, part, val_fraction
        self.coding = MaskCoding(metainfo['labels'], metainfo['ignored'], ignore_index)
        metainfo = dict(metainfo, codes=[codes[0] for codes in metainfo['labels']])
        super().__init__(metainfo=metainfo, ignore_index=ignore_index, **kwargs)

    @property
    def images_folder(self) -> Path:
        return Path(self.data_prefix['img_path'])

    @property
    def masks_folder(self) -> Path:
        return Path(self.data_prefix['seg_map_path'])

    def load_data_list(self) -> list[dict]:
        has_masks = self.data_prefix.get('seg_map_path') is not None
        images = self._own_part(self._list_images())
        masks = self._masks_of(images) if has_masks else {}
        return [
            dict(img_path=str(image), reduce_zero_label=False, seg_fields=[],
                 **({'seg_map_path': str(masks[image])} if has_masks else {}))
            for image in images
        ]  # fmt: skip

    def get_data_info(self, idx: int) -> dict:
        return dict(super().get_data_info(idx), mask_coding=self.coding)

    def list_masks(self) -> set[str]:
        """List the paths of all files that may be masks, those without an image included."""
        if self.ann_file:  # other masks are of images that are not listed
            return {str(mask) for mask in self._masks_of(self._list_images()).values() if mask.is_file()}
        if not self.mask_template:
            return set(map(str, list_image_files(self.masks_folder)))
        tail = re.split(r'[}/\\]', self.mask_template)[-1]
        files = [path for path in list_image_files(self.masks_folder) if path.name.endswith(tail)]
        # A template may lead out of the folder; and one that ends in .png alone would take images for masks.
        masks = {str(mask) for mask in self._masks_of(self._list_images()).values() if mask.is_file()}
        return masks | (set(map(str, files)) if Path(tail).stem else set())

    def _list_images(self) -> list[Path]:
        images = list_image_files(self.images_folder)
        if self.data_prefix.get('seg_map_path') is None:
            return images
        if self.mask_template:
            masks = set(self._masks_of(images).values())
            images = [image for image in images if image not in masks]
        elif self.images_folder in self.masks_folder.parents:
            images = [image for image in images if self.masks_folder not in image.parents]
        _check_names_differ(images, self.images_folder)
        return self._listed(images) if self.ann_file else images

    def _listed(self, images: list[Path]) -> list[Path]:
        try:
            lines = Path(self.ann_file).read_text(encoding='utf-8-sig').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{self.ann_file} cannot be read: {error}') from error
        names = {line.strip() for line in lines} - {''}
        by_name = {image.relative_to(self.images_folder).with_suffix('').as_posix(): image for image in images}
        if missing := sorted(names - by_name.keys()):
            raise UserError(
                f'{self.ann_file}: {self.images_folder} has no image {missing[0]!r}: names are relative to it, without '
                'suffix'
            )
        return [image for name, image in by_name.items() if name in names]

    def _own_part(self, images: list[Path]) -> list[Path]:
        if self.part is None or not images:
            return images
        hashes = {image: _hash(image.relative_to(self.images_folder)) for image in images}
        held_out = {image for image in images if hashes[image] < self.val_fraction} or {min(images, key=hashes.get)}
        return [image for image in images if (image in held_out) == (self.part == 'val')]

    def _masks_of(self, images: list[Path]) -> dict[Path, Path]:
        """Return the path of each image's mask, whether it is there or not."""
        if self.mask_template:
            root = self.data_root or ''
            return {image: Path(root, fill_template(self.mask_template, image.absolute())) for image in images}
        by_name: dict[PurePath, Path] = {}
        for mask in sorted(list_image_files(self.masks_folder), key=lambda path: _rank(path.suffix)):
            by_name.setdefault(mask.relative_to(self.masks_folder).with_suffix(''), mask)
        names = {image: image.relative_to(self.images_folder).with_suffix('') for image in images}
        return {
            image: by_name.get(name, Path(self.masks_folder, f'{name}{_MASK_SUFFIXES[0]}'))
            for image, name in names.items()
        }


@TRANSFORMS.register_module()
class ReadMask(BaseTransform):
    """Reads the mask of a :class:`MaskDataset`'s sample as a label map, in the place of mmseg's LoadAnnotations.

    Required keys: img_path, seg_map_path, mask_coding, ori_shape. Added: gt_seg_map, (H, W) uint8 or uint16. A sample
    without ``seg_map_path``, as mmseg's inferencers make it, is left as it is.

    Raises:
        BadSample: The mask has another size than its image, or an id or a colour that is not named.
        UnreadableFile: It cannot be read.
    """

    def transform(self, results: dict) -> dict:
        if 'seg_map_path' not in results:
            return results
        labels = read_mask(results['seg_map_path'], results['mask_coding'])
        if labels.shape != tuple(results['ori_shape']):
            sizes = (labels.shape[::-1], results['img_path'], results['ori_shape'][::-1])
            raise BadSample(f'{results["seg_map_path"]} {size_fault(*sizes)}')
        results['gt_seg_map'] = labels
        results['seg_fields'].append('gt_seg_map')
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'


def read_mask(path: str, coding: MaskCoding) -> np.ndarray:
    """Return the label map of a mask's file; arguments and errors are those of :class:`ReadMask`."""
    with named_errors(path), open_mask(path) as mask:
        return coding.decode(mask)


def _check_names_differ(images: list[Path], folder: Path) -> None:
    by_name: dict[PurePath, Path] = {}
    for image in images:
        if (other := by_name.setdefault(image.relative_to(folder).with_suffix(''), image)) is not image:
            raise UserError(f'{other} and {image} have the same name, so they would share a mask: rename one')


def _hash(name: PurePath) -> float:
    """Return a number from 0 to 1 that depends on a name alone."""
    digest = hashlib.blake2b(name.with_suffix('').as_posix().encode(errors='surrogateescape'), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2**64


def _rank(suffix: str) -> int:
    return _MASK_SUFFIXES.index(suffix.lower())
