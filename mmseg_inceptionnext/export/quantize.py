"""Post-training quantisation to int8, compared with the segmentor on images that it was not calibrated on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import DATASETS
from torch import Tensor

from mmseg_inceptionnext.config_files import require
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.folders import find_files
from mmseg_inceptionnext.images import IMAGE_SUFFIXES
from mmseg_inceptionnext.inference.runtimes import import_onnx

# Most that may be lost by default: points of mIoU, or without masks percent of the labels.
MAX_DROP, MAX_DIFFERING = 0.5, 5.0
NUMBER = 100  # of images to calibrate on, and of others to compare on


@dataclass(frozen=True)
class HeldOut:
    """An image that is compared on.

    Attributes:
        image: Path of the image.
        mask: (H, W) labels, of any H and W; None where there are none.
    """

    image: str
    mask: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """Images for a quantisation.

    Attributes:
        images: Paths of images to measure the range of activations on.
        held_out: Other images, to compare on.
        max_drop: Most that may be lost: points of mIoU or, without masks, percent of the labels.
        classes: Names of the classes of the masks; None without masks.
    """

    images: list[str]
    held_out: Iterable[HeldOut]
    max_drop: float
    classes: Sequence[str] | None = None


@dataclass(frozen=True)
class Quantization:
    """How a quantised file compares with its segmentor.

    Attributes:
        calibrated: Number of images whose activations were measured.
        compared: Number of other images that both have segmented.
        differing: Share of pixels whose labels differ.
        miou: mIoU of the segmentor on these, in percent; None without masks.
        miou_int8: mIoU of the file.
    """

    calibrated: int
    compared: int
    differing: float
    miou: float | None = None
    miou_int8: float | None = None


def calibration_of_folder(folder: str | Path, number: int, max_drop: float | None = None) -> Calibration:
    """Choose images of a folder to calibrate on, and as many others to compare on.

    Raises:
        UserError: The folder cannot be read, or holds fewer than two images.
    """
    try:
        names = find_files(folder, IMAGE_SUFFIXES)
    except OSError as error:
        raise UserError(f'calibrate={str(folder)!r} cannot be read: {error.strerror}') from error
    if len(names) < 2:
        raise UserError(
            f'calibrate={str(folder)!r} holds {len(names)} image{"s" * (len(names) != 1)}: at least two are needed, to '
            'calibrate on and to compare on'
        )
    paths = [str(Path(folder, name)) for name in names]
    held_out = map(HeldOut, _evenly(paths[1::2], number))
    return Calibration(_evenly(paths[::2], number), held_out, MAX_DIFFERING if max_drop is None else max_drop)


def calibration_of_config(cfg: Config, number: int, max_drop: float | None = None) -> Calibration:
    """Choose images of a config's training set to calibrate on, and of its validation set to compare mIoU on."""
    require(cfg, 'train_dataloader', 'val_dataloader')
    init_default_scope('mmseg')
    training, validation = (DATASETS.build(cfg[f'{name}_dataloader'].dataset) for name in ('train', 'val'))
    images = [training.get_data_info(i)['img_path'] for i in _evenly(range(len(training)), number)]

    def held_out() -> Iterator[HeldOut]:
        for i in _evenly(range(len(validation)), number):
            sample = validation[i]['data_samples']
            yield HeldOut(sample.img_path, sample.gt_sem_seg.data[0])

    classes = validation.metainfo['classes']
    return Calibration(images, held_out(), MAX_DROP if max_drop is None else max_drop, classes)


def _evenly(items: Sequence, number: int) -> list:
    """Choose a number of items at even distances, or all if there are fewer."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)]


def quantize(model, parameters: set[str], images: Iterable[np.ndarray]):
    """Return an ONNX model with convolutions and products of weights in int8, as NNCF calibrates them.

    Left in higher precision are

    - the products that interpolate: their matrices hold fractions that int8 does not;
    - convolutions of concatenated maps, such as ``fc1`` after the token mixer. NNCF quantises each of these maps, with
      one scale for all: more than half of the labels that int8 changes come from there, and OpenVINO 2026.4 computes
      such a graph wrongly. It costs a twentieth of the speed.

    Args:
        model: The ONNX model.
        parameters: Names of its initializers that were trained.
        images: (N, C, H, W), of the input's dtype: batches to measure the range of each activation on.
    """
    nncf = import_onnx('nncf')
    nncf.set_log_level(logging.ERROR)
    made_by = {output: node for node in model.graph.node for output in node.output}

    def source(name: str) -> str:
        while name in made_by and made_by[name].op_type in ('Transpose', 'Cast'):
            name = made_by[name].input[0]
        return name

    def stays(node) -> bool:
        if node.op_type == 'MatMul':
            return source(node.input[1]) not in parameters
        return node.op_type == 'Conv' and node.input[0] in made_by and made_by[node.input[0]].op_type == 'Concat'

    batches = [{model.graph.input[0].name: batch} for batch in images]
    with redirect_stdout(sys.stderr):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=[node.name for node in model.graph.node if stays(node)]),
        )


def compare(
    run: Callable[[str], tuple[Tensor, Tensor]], calibration: Calibration, num_classes: int, ignore_index: int
) -> Quantization:
    """Compare the label maps of a segmentor and of a quantised file.

    Args:
        run: Function that takes the path of an image and returns both label maps, (h, w), of the same size.
        calibration: Images to compare on, and what may be lost.
        num_classes: Number of classes.
        ignore_index: Label of pixels of a mask that do not count.

    Raises:
        UserError: More is lost.
    """
    compared, differing, pixels, areas = 0, 0, 0, []
    for item in calibration.held_out:
        labels = run(item.image)
        compared += 1
        differing += (labels[0] != labels[1]).sum().item()
        pixels += labels[0].numel()
        if item.mask is not None:
            areas.append(torch.stack([_areas(x, item.mask, num_classes, ignore_index) for x in labels]))
    miou, miou_int8 = None, None
    if areas:
        intersect, union = sum(areas)[:, :2].unbind(1)
        miou, miou_int8 = (100 * (intersect / union).nanmean(1)).tolist()
        drop, what = miou - miou_int8, 'points of mIoU'
    else:
        drop, what = 100 * differing / pixels, '% of the labels'
    if not drop <= calibration.max_drop:
        raise UserError(
            f'int8 loses {drop:.2f} {what} on {compared} images, more than max_drop={calibration.max_drop}: nothing is '
            "written; calibrate on more images, or take precision='bf16'"
        )
    return Quantization(len(calibration.images), compared, differing / pixels, miou, miou_int8)


def _areas(labels: Tensor, mask: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return areas of intersection and union, of the prediction and of the mask, (4, classes), at the mask's size."""
    at_mask = F.interpolate(labels[None, None].float(), mask.shape, mode='nearest-exact')[0, 0].long()
    return torch.stack(IoUMetric.intersect_and_union(at_mask, mask.long(), num_classes, ignore_index))
