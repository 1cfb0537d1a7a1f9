"""The Python API: a trained segmentor, from an image to a label map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from PIL import Image

from mmseg_inceptionnext.checkpoints import read_checkpoint
from mmseg_inceptionnext.classes import (
    Classes,
    check_number,
    classes_of_checkpoint,
    read_classes,
    reduces_zero_label,
)
from mmseg_inceptionnext.config import fit_to_device, read_config, require
from mmseg_inceptionnext.data.pipeline import leaves, of_arrays
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.images import read_image
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.onnx_model import OnnxModel, is_onnx
from mmseg_inceptionnext.report.overlay import draw_overlay, under_legend
from mmseg_inceptionnext.weights import load_segmentor

# Of what the network sees, in pixels: its last feature map has a stride of 32.
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Segmentation:
    """The label map of an image.

    Attributes:
        image: (H, W, 3) uint8, RGB: the image, turned as its EXIF orientation says.
        labels: (H, W) int16: of each pixel, the index of its class in ``class_names``.
        classes: Names, colours and coding of all classes of the model.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: Classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the model, whether they are in the image or not."""
        return self.classes.names

    def area(self, name: str) -> float:
        """The share of the image's pixels that have a class, from 0 to 1.

        Raises:
            KeyError: the model has no class of that name.
        """
        if name not in self.class_names:
            raise KeyError(f'no class {name!r}: the model has {", ".join(self.class_names)}')
        return float(np.mean(self.labels == self.class_names.index(name)))

    def areas(self) -> dict[str, float]:
        """``{name: share}`` of the classes that are in the image, largest first. The shares sum to 1."""
        pixels = np.bincount(self.labels.ravel(), minlength=len(self.class_names)) / self.labels.size
        return {self.class_names[i]: float(pixels[i]) for i in np.argsort(-pixels, kind='stable') if pixels[i]}

    def overlay(self, opacity: float = 0.5, legend: bool = False) -> Image.Image:
        """The image under the colours of its classes.

        Args:
            opacity: Of the colours, from 0 to 1.
            legend: Add a strip below with the classes that are there, largest first.
        """
        picture = Image.fromarray(draw_overlay(self.image, self.labels, self.classes.palette, opacity))
        if not legend:
            return picture
        present = [self.class_names.index(name) for name in self.areas()]
        return under_legend(picture, present, self.class_names, self.classes.palette)

    def label_image(self) -> Image.Image:
        """The label map as the data set's annotations are coded: for ADE20K label + 1, 0 being unlabelled.

        A grey image of 8 bits, of 16 for more classes than 8 bits can code.
        """
        coded = self.labels + int(self.classes.reduce_zero_label)
        return Image.fromarray(coded.astype(np.uint8 if len(self.class_names) < 255 else np.uint16))


class Segmentor:
    """A trained segmentor on a device, made fast, with the preprocessing of its config.

    Example::

        segmentor = Segmentor('upernet/inceptionnext_t', 'work_dirs/upernet/inceptionnext_t/iter_160000.pth')
        result = segmentor('street.jpg')
        print(result.area('road'))
        result.overlay(legend=True).save('out.png')

    Args:
        config: A config file, the name of a shipped one ('upernet/inceptionnext_t'), or a config. Or an .onnx file of
            ``tools/export.py``, which stands for config and checkpoint; ONNX Runtime runs it on the CPU.
        checkpoint: A segmentor trained with the config; every key and shape must agree.
        device: Such as 'cpu' or 'cuda:1'. Default: a GPU if there is one.
        classes: 'ade20k' or a file, see :func:`~mmseg_inceptionnext.classes.read_classes`. Default: those in the
            checkpoint.
        fast: Fold and pack the model (:func:`~mmseg_inceptionnext.optimize_for_inference`): same predictions, sooner.

    Attributes:
        classes: Names, colours and coding of the classes.
        device: Where it runs.

    Raises:
        UserError: the config, the checkpoint or the .onnx file cannot be read, they do not fit, the checkpoint does
            not say what its classes are, or there is no such device.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        classes: str | Path | None = None,
        fast: bool = True,
    ):
        if checkpoint is None:
            self._open_onnx(config, device, classes)
            return
        self.device = find_device(device)
        cfg, model, self.classes = load_trained(config, checkpoint, classes)
        model = model.to(self.device)
        self._model = optimize_for_inference(model) if fast and isinstance(model, EncoderDecoder) else model
        self._pipeline = Compose(of_arrays(leaves(cfg.test_dataloader.dataset)[0].pipeline))

    def _open_onnx(self, path: str | Path | Config, device: str | torch.device | None,
                   classes: str | Path | None) -> None:  # fmt: skip
        if isinstance(path, Config) or not is_onnx(path):
            raise UserError('a config needs a checkpoint of a segmentor trained with it; an .onnx file stands for both')
        if device is not None and find_device(device).type != 'cpu':
            raise UserError(f'--device {device}: .onnx files run on the CPU here: leave it out')
        init_default_scope('mmseg')
        self.device = torch.device('cpu')
        self._model = OnnxModel(path)
        self.classes = self._model.contract.classes
        if classes is not None:
            self.classes = read_classes(classes, self.classes.reduce_zero_label)
            check_number(self.classes.names, len(self._model.contract.classes.names), str(classes))
        self._pipeline = Compose(self._model.contract.pipeline())

    def __call__(
        self, images: str | Path | Image.Image | np.ndarray | Sequence, batch_size: int = 1
    ) -> Segmentation | list[Segmentation]:
        """Segment an image, or a list of them.

        Args:
            images: A path, a PIL image, or an array (H, W, 3) of uint8 in RGB order, see
                :func:`~mmseg_inceptionnext.images.read_image`; or a list of such.
            batch_size: How many images of a list go through the network at once, where the sizes that it sees them in
                are the same. Their sum is held in memory.

        Returns:
            A :class:`Segmentation` at the size of the image, or a list of them in the same order.

        Raises:
            UserError: an image file cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self.predict([self.prepare(read_image(images))])[0]
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} must be at least 1')
        results = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            results += self.predict([self.prepare(read_image(image)) for image in batch])
        return results

    def prepare(self, image: np.ndarray) -> dict:
        """What :meth:`predict` takes, of an image (H, W, 3) uint8, RGB. May be called from several threads.

        Raises:
            UserError: the image is so thin that a side vanishes when it is brought to the test scale.
        """
        height, width = image.shape[:2]
        seen = (0, 0)
        with suppress(cv2.error, ZeroDivisionError):  # of a resize to a side without a pixel
            packed = self._pipeline(dict(img=np.ascontiguousarray(image[..., ::-1])))  # mmseg's pipelines are BGR
            seen = packed['inputs'].shape[1:]
        if min(seen) < _SMALLEST_SIDE:
            raise UserError(
                f'{width}×{height} pixels are too thin: at the test scale, no side may be shorter than {_SMALLEST_SIDE}'
            )
        return dict(packed, image=image)

    @torch.inference_mode()
    def predict(self, prepared: Sequence[dict]) -> list[Segmentation]:
        """Segment images that :meth:`prepare` has prepared, those of the same size in one batch."""
        by_size: dict[tuple, list[int]] = {}
        for index, item in enumerate(prepared):
            by_size.setdefault(item['inputs'].shape, []).append(index)
        results: dict[int, Segmentation] = {}
        for indices in by_size.values():
            data = {key: [prepared[i][key] for i in indices] for key in ('inputs', 'data_samples')}
            for index, sample in zip(indices, self._model.test_step(data), strict=True):
                labels = sample.pred_sem_seg.data[0].to('cpu', torch.int16).numpy()
                results[index] = Segmentation(prepared[index]['image'], labels, self.classes)
        return [results[index] for index in range(len(prepared))]


def load_trained(
    config: str | Path | Config, checkpoint: str | Path, classes: str | Path | None = None
) -> tuple[Config, EncoderDecoder, Classes]:
    """A config, the trained segmentor in eval mode on the CPU, and its classes; arguments as of :class:`Segmentor`.

    Raises:
        UserError: as :class:`Segmentor`.
    """
    cfg = config.copy() if isinstance(config, Config) else read_config(config)
    require(cfg, 'model', 'test_dataloader')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    content = read_checkpoint(checkpoint)
    if classes is None:
        found = classes_of_checkpoint(content, checkpoint)
    else:
        found = read_classes(classes, reduce_zero_label=reduces_zero_label(content))
    fit_to_device(cfg)
    cfg.model.backbone.init_cfg = None  # everything comes from the checkpoint
    model = MODELS.build(cfg.model)
    load_segmentor(model, content, checkpoint, ARCHS)
    check_number(found.names, model.decode_head.num_classes, str(classes if classes is not None else checkpoint))
    return cfg, model.eval(), found


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; without one a GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    try:
        device = torch.device(name if name is not None else get_device())
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # what torch raises for a wrong name or an absent device
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'--device {name} cannot be used here ({reason}): choose cpu, or leave it out') from error
    return device
