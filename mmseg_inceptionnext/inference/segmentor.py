"""Segment images in Python: a trained segmentor, from an image to a label map."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config_files import find_config, read_config, require, require_segmentor, without_scope
from mmseg_inceptionnext.data.pipeline import leaf_datasets, pipeline_for_arrays
from mmseg_inceptionnext.device import find_device
from mmseg_inceptionnext.drawing import add_legend, draw_overlay, hatch
from mmseg_inceptionnext.errors import UserError, did_you_mean
from mmseg_inceptionnext.files import file_digest
from mmseg_inceptionnext.images import as_rgb, read_image, swap_rgb
from mmseg_inceptionnext.inference.cam import class_activation_map
from mmseg_inceptionnext.inference.confidence import Probabilities, class_logits_of
from mmseg_inceptionnext.inference.onnx_model import OnnxModel, is_onnx
from mmseg_inceptionnext.inference.optimize import made_for
from mmseg_inceptionnext.inference.precision import AutoPrecision, check_precision
from mmseg_inceptionnext.inference.temperature import read_temperature
from mmseg_inceptionnext.inference.tiles import Region
from mmseg_inceptionnext.inference.tiling import TiledModel, tiling_of
from mmseg_inceptionnext.labels import (
    Classes,
    check_num_classes,
    classes_of_checkpoint,
    codes_of_checkpoint,
    label_array,
    read_classes,
)
from mmseg_inceptionnext.models.build import LARGEST_STRIDE, build_segmentor, channels_of
from mmseg_inceptionnext.models.weights import load_segmentor

_RACED_TILE = 512
UNSURE = 255  # in label maps, of pixels below min_confidence


@dataclass(frozen=True)
class Segmentation:
    """The label map of an image.

    Attributes:
        image: (H, W, 3) uint8, RGB: the image, in its EXIF orientation.
        labels: (H, W) int16: index of each pixel's class in ``class_names``.
        classes: Names, colours and coding of all classes of the model.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: Classes
    _probabilities: Probabilities | str = field(default='it was made without logits', repr=False, compare=False)
    _at_once: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        """Leave out the logits, and what was computed of them stays."""
        return self.__dict__ | dict(_probabilities='it was copied or pickled before it was asked')

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = [f'{name} {share:.1%}' for name, share in self.areas().items()]
        more = f', {len(shares) - 3} more' if len(shares) > 3 else ''
        return f'Segmentation({width}×{height}: {", ".join(shares[:3])}{more})'

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the model, whether they are in the image or not."""
        return self.classes.names

    @property
    def confidence(self) -> np.ndarray:
        """(H, W) float32: the probability of each pixel's label.

        Of an image in tiles, the network runs again when this is asked, unless :meth:`Segmentor.predict` was told.

        Raises:
            UserError: The result has no logits: a file returns labels alone, it was pickled, or told not to keep them.
        """
        return self._at_once if self._at_once is not None else self._confidence_and_entropy[0]

    @property
    def entropy(self) -> np.ndarray:
        """(H, W) float32: the entropy of all classes' probabilities, from 0 to the logarithm of their number, in nats.

        Raises:
            UserError: As for :attr:`confidence`.
        """
        return self._confidence_and_entropy[1]

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k most likely classes of each pixel, the most likely first, and their probabilities.

        Returns:
            (k, H, W) int16 and (k, H, W) float32.

        Raises:
            UserError: As for :attr:`confidence`; or there are not so many classes.
        """
        return self._kept().top(k, self.labels.shape)

    @cached_property
    def _confidence_and_entropy(self) -> tuple[np.ndarray, np.ndarray]:
        return self._kept().confidence_and_entropy(self.labels)

    def _kept(self) -> Probabilities:
        if isinstance(self._probabilities, str):
            raise UserError(f'this result does not know how sure its labels are: {self._probabilities}')
        return self._probabilities

    def area(self, name: str) -> float:
        """Return the share of the image's pixels that have a class, from 0 to 1.

        Raises:
            KeyError: The model has no class of that name.
        """
        if name not in self.class_names:
            raise KeyError(f'no class {name!r}: the model has {", ".join(self.class_names)}')
        return float(np.mean(self.labels == self.class_names.index(name)))

    def areas(self, min_confidence: float = 0) -> dict[str, float]:
        """Return ``{name: share}`` of the classes that are in the image, largest first. The shares sum to 1.

        Args:
            min_confidence: Leave out pixels whose label is less probable.
        """
        labels = self.labels[self.confidence >= min_confidence] if min_confidence else self.labels.ravel()
        return shares_of(np.bincount(labels, minlength=len(self.class_names)), self.class_names)

    def overlay(self, opacity: float = 0.5, legend: bool = False, min_confidence: float = 0) -> Image.Image:
        """Return the image with the colours of its classes blended in.

        Args:
            opacity: Opacity of the colours, from 0 to 1.
            legend: Add a legend of the image's classes below it, largest first.
            min_confidence: Hatch the pixels whose label is less probable.
        """
        pixels = draw_overlay(self.image, self.labels, self.classes.palette, opacity)
        if min_confidence:
            pixels = hatch(pixels, self.confidence < min_confidence)
        picture = Image.fromarray(pixels)
        if not legend:
            return picture
        present = [self.class_names.index(name) for name in self.areas()]
        return add_legend(picture, present, self.class_names, self.classes.palette)

    def label_image(self, min_confidence: float = 0) -> Image.Image:
        """Return the label map in the coding of the data set's annotations: for ADE20K label + 1, 0 being unlabelled.

        The image is grey, of 8 bits, or of 16 where 8 cannot hold all ids; or in colours, where the annotations are.

        Args:
            min_confidence: Pixels whose label is less probable are unsure: 255, or white.

        Raises:
            UserError: A class has the code of unsure pixels.
        """
        values = self.classes.encode(self.labels)
        if min_confidence:
            check_unsure_code(self.classes)
            values[self.confidence < min_confidence] = UNSURE
        return Image.fromarray(values)

    def confidence_image(self) -> Image.Image:
        """Return the confidence as a grey image, 255 for certain."""
        return Image.fromarray(confidence_bytes(self.confidence))


def check_unsure_code(classes: Classes) -> None:
    """Check that no class is coded as unsure pixels are.

    Raises:
        UserError: One is.
    """
    taken = (UNSURE, (UNSURE, UNSURE, UNSURE))
    if used := [name for name, code in zip(classes.names, classes.codes, strict=True) if code in taken]:
        raise UserError(
            f'unsure pixels would be {UNSURE}, which is the code of {used[0]!r}: leave min_confidence=P out'
        )


def confidence_bytes(confidence: np.ndarray) -> np.ndarray:
    """Return probabilities from 0 to 1 as uint8, 255 for 1."""
    return np.rint(255 * confidence).astype(np.uint8)


def shares_of(pixels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return ``{name: share}`` of the classes that have pixels, largest first, given the number of pixels of each."""
    total = int(pixels.sum())
    return {names[i]: int(pixels[i]) / total for i in np.argsort(-pixels, kind='stable') if pixels[i]}


class Segmentor:
    """A trained segmentor on a device, made fast, with the preprocessing of its config.

    Example::

        segmentor = Segmentor('upernet/inceptionnext_t', 'work_dirs/upernet/inceptionnext_t/iter_160000.pth')
        result = segmentor('street.jpg')
        print(result.area('road'))
        result.overlay(legend=True).save('out.png')

    It can be copied and pickled, such as for a worker process: that reads the files again.

    Args:
        config: Path of a config, name of a shipped one ('upernet/inceptionnext_t'), or a config. Or path of an .onnx
            file of ``tools/export.py``, which replaces config and checkpoint, and runs on the CPU.
        checkpoint: Path of a segmentor trained with the config; every key and shape must agree.
        device: Device, such as 'cpu' or 'cuda:1'. Default: a GPU if there is one.
        classes: 'ade20k' or path of a file, see :func:`~mmseg_inceptionnext.labels.read_classes`. Default: those in the
            checkpoint.
        fast: Fold and pack the model (:func:`~mmseg_inceptionnext.optimize_for_inference`): same predictions, faster.
        precision: 'fp32', 'bf16', or 'auto': the faster of the two, which race for about a second on the first images.
            In bfloat16 labels may differ where two classes are nearly as likely. A .onnx file has its own.
        runtime: What runs an .onnx file: 'onnxruntime' or 'openvino'. Default: that for which it was exported.
        threads: Number of threads for an .onnx file. Default: PyTorch's, ``torch.set_num_threads``.
        tile: Side in pixels of the tiles that images are predicted in, at their own resolution: without the resizing of
            the test pipeline. 'auto': for images that would not fit into memory, in tiles that fit.
        overlap: Pixels that neighbouring tiles share. Default: an eighth of the tile.
        blend: Give the pixels of a tile weights that fall towards its border, instead of equal ones as mmseg does.

    Attributes:
        classes: Names, colours and coding of the classes.
        channels: Channels of the images that it takes.
        device: The device that the model runs on.
        tiles: What predicts images in tiles; None without ``tile``.
        temperature: What logits are divided by for probabilities; labels are the same. It is that which `test
            --temperature fit` has stored beside the checkpoint, or 1.

    Raises:
        UserError: The config, the checkpoint or the .onnx file cannot be read, they do not fit, the checkpoint does
            not say what its classes are, there is no such device or precision, tile or overlap cannot be used, or the
            temperature beside the checkpoint was fitted for another.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        classes: str | Path | None = None,
        fast: bool = True,
        precision: str = 'auto',
        runtime: str | None = None,
        threads: int | None = None,
        tile: int | str | None = None,
        overlap: int | None = None,
        blend: bool = False,
    ):
        check_precision(precision)
        self.temperature = 1.0
        tiling = tiling_of(tile, overlap, blend)
        if checkpoint is None:
            self._open_onnx(config, device, classes, precision, runtime, threads)
        else:
            for name, value in (('runtime', runtime), ('threads', threads)):
                if value is not None:
                    raise UserError(f'{name}={value!r} is for .onnx files: leave it out, or export the segmentor')
            self._open_trained(config, checkpoint, device, classes, fast, precision)
        self.tiles = tiling and TiledModel(
            self._chosen(tiling.tile), tiling, self._pipeline, self.channels, self.device
        )
        if isinstance(config, Config):
            config = copy.deepcopy(config)
        else:
            config = (find_config(config) if checkpoint else Path(config).expanduser()).absolute()
        if checkpoint is not None:
            checkpoint = Path(checkpoint).expanduser().absolute()
        if classes not in (None, 'ade20k'):
            classes = Path(classes).absolute()
        self._plain: EncoderDecoder | None = None  # for :meth:`cam`
        self._arguments = config, checkpoint, device, classes, fast, precision, runtime, threads, tile, overlap, blend

    def __reduce__(self) -> tuple:
        """Pickle and copy what it was made from; the files are read again where it is unpickled, by the rules there."""
        *first, precision, runtime, threads, tile, overlap, blend = self._arguments
        if isinstance(self._model, AutoPrecision):
            precision = self._model.precision  # a copy is spared the race
        return type(self), (*first, precision, runtime, threads, tile, overlap, blend)

    def settled(self, like: Mapping | None = None) -> Segmentor:
        """Return this segmentor once nothing that the moment decides can change its predictions, or such a copy.

        That is the precision, for which a race on noise is held if there was none, and the memory that tile='auto'
        goes by.

        Args:
            like: :meth:`identity` of another, whose precision and memory it takes instead.
        """
        if like and isinstance(self._model, AutoPrecision) and like['precision'] != self._model.precision:
            *first, _, runtime, threads, tile, overlap, blend = self._arguments
            made = type(self)(*first, like['precision'], runtime, threads, tile, overlap, blend)
            return made.settled(like)
        self._chosen('auto')
        if self.tiles:
            self.tiles.fix_memory(like and like['memory'])
        return self

    def identity(self) -> dict[str, object]:
        """Return what decides the predictions of a segmentor that is settled, as plain values by name.

        Files are named by the SHA-256 of their content, a config by that of its model and its test pipeline.
        """
        config, checkpoint, _, _, fast, _, runtime, _, tile, overlap, blend = self._arguments
        names = [self.classes.names, self.classes.palette, self.classes.codes]
        facts = dict(classes=hashlib.sha256(repr(names).encode()).hexdigest())
        if checkpoint is None:
            contract = self._model.contract
            facts |= dict(file=file_digest(config), precision=contract.precision, runtime=runtime or contract.runtime)
        else:
            precision = self._model.precision if isinstance(self._model, AutoPrecision) else self._precision
            facts |= dict(
                config=self._config_digest, checkpoint=file_digest(checkpoint), precision=precision, fast=fast
            )
        memory = self.tiles and self.tiles.memory
        return facts | dict(tile=tile, overlap=overlap, blend=blend, memory=memory, temperature=self.temperature)

    @property
    def streams(self) -> int:
        """Number of threads that call :meth:`predict` side by side when many images are predicted.

        On a CPU two, each with half of PyTorch's threads: while one waits at the end of a layer for its last core, or
        is in Python, the other computes; and other programs do not stop both. Images in tiles, whose size goes by the
        memory, one after the other, and so for a GPU or an .onnx file, which has threads of its own.
        """
        is_torch_on_cpu = self.device.type == 'cpu' and not isinstance(self._model, OnnxModel)
        return 2 if is_torch_on_cpu and self.tiles is None and torch.get_num_threads() > 1 else 1

    def _open_trained(self, config: str | Path | Config, checkpoint: str | Path, device: str | torch.device | None,
                      classes: str | Path | None, fast: bool, precision: str) -> None:  # fmt: skip
        self.device = find_device(device)
        cfg, model, self.classes = load_trained(config, checkpoint, classes)
        self.temperature = read_temperature(checkpoint)
        self.channels = channels_of(model)
        model = model.to(self.device)
        make = partial(made_for, model, fast=fast)
        self._model = AutoPrecision(make, self.device.type) if precision == 'auto' else make(precision)
        pipeline = pipeline_for_arrays(leaf_datasets(cfg.test_dataloader.dataset)[0].pipeline)
        self._pipeline, self._precision = Compose(pipeline), precision
        self._config_digest = hashlib.sha256(f'{cfg.model} {pipeline}'.encode()).hexdigest()

    def _chosen(self, tile: int | str) -> nn.Module | OnnxModel:
        """Return the model that predicts tiles, whose precision is chosen on one of them; larger ones behave alike."""
        if not isinstance(self._model, AutoPrecision):
            return self._model
        side = _RACED_TILE if tile == 'auto' else min(tile, _RACED_TILE)
        pixels = torch.rand(1, self.channels, side, side, device=self.device)
        return self._model.choose(lambda model: model(pixels, mode='tensor'))

    def _open_onnx(self, path: str | Path | Config, device: str | torch.device | None, classes: str | Path | None,
                   precision: str, runtime: str | None, threads: int | None) -> None:  # fmt: skip
        if isinstance(path, Config) or not is_onnx(path):
            raise UserError('a config needs checkpoint=FILE of a segmentor trained with it; an .onnx file needs none')
        if device is not None and find_device(device).type != 'cpu':
            raise UserError(f'device={str(device)!r}: .onnx files run on the CPU here: leave it out')
        if precision != 'auto':
            raise UserError(f'precision={precision!r}: an .onnx file computes in what it was exported in: leave it out')
        init_default_scope('mmseg')
        self.device = torch.device('cpu')
        self._model = OnnxModel(path, runtime, threads)
        self.channels = self._model.contract.channels
        self.classes, self.temperature = self._model.contract.classes, self._model.contract.temperature
        if classes is not None:
            named = read_classes(classes)
            check_num_classes(named.names, len(self.classes.names), str(classes))
            self.classes = dataclasses.replace(named, codes=self.classes.codes)
        self._pipeline = Compose(self._model.contract.pipeline())

    def __call__(
        self, images: str | Path | Image.Image | np.ndarray | Sequence, batch_size: int = 1, keep_logits: bool = True
    ) -> Segmentation | list[Segmentation]:
        """Segment an image, or a list of them.

        Args:
            images: A path, a PIL image, or an array (H, W, 3) of uint8 in RGB order, see
                :func:`~mmseg_inceptionnext.images.read_image`; or a list of these.
            batch_size: Number of images of a list in one forward pass, where they have the same size after the test
                pipeline. All of them are held in memory. Of an image in tiles, the number of tiles.
            keep_logits: Let the results keep what ``confidence``, ``entropy`` and ``top`` need: the head's output, for
                150 classes about ten times the image. Without, long lists take less memory.

        Returns:
            A :class:`Segmentation` at the size of the image, or a list of them in the same order.

        Raises:
            UserError: An image cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self.predict([self.prepare(self.read(images))], batch_size, keep_logits)[0]
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} must be at least 1')
        results = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            results += self.predict([self.prepare(self.read(image)) for image in batch], batch_size, keep_logits)
        return results

    def read(self, source: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Read an image with :func:`~mmseg_inceptionnext.images.read_image`, with the model's number of channels."""
        return read_image(source, self.channels)

    def prepare(self, image: np.ndarray) -> dict:
        """Apply the test pipeline to an image (H, W, channels) uint8, RGB, for :meth:`predict`, in any thread.

        Raises:
            UserError: A side is too short at the test scale.
        """
        height, width = image.shape[:2]
        if self.tiles and (tile := self.tiles.tile_of((height, width))):
            return dict(image=image, tile=tile)
        seen = (0, 0)
        with suppress(cv2.error, ZeroDivisionError):  # a side resized to 0 pixels
            packed = self._pipeline(dict(img=swap_rgb(image)))
            seen = packed['inputs'].shape[1:]
        if min(seen) < LARGEST_STRIDE:
            raise UserError(
                f'{width}×{height} pixels are too thin: at the test scale, no side may be shorter than {LARGEST_STRIDE}'
            )
        return dict(packed, image=image)

    def cam(self, image: str | Path | Image.Image | np.ndarray, name: str, layer: str | None = None) -> np.ndarray:
        """Return where in an image the model looks for a class, by Grad-CAM.

        It needs the package grad-cam, and a second copy of the model, which has gradients; that is loaded at the first
        call.

        Args:
            image: As of a call.
            name: Name of the class.
            layer: Name of the module whose feature map is weighted, see
                :func:`~mmseg_inceptionnext.inference.cam.class_activation_map`.

        Returns:
            (H, W) float32 of the size of the image, from 0 to 1.

        Raises:
            UserError: The image cannot be read, there is no such class or layer, grad-cam is missing, or the model is a
                .onnx file or predicts the image in tiles.
        """
        config, checkpoint, _, classes, *_ = self._arguments
        if checkpoint is None:
            raise UserError(f'{config} has no gradients: maps of a class need config and checkpoint')
        if name not in self.classes.names:
            meant = did_you_mean(name, self.classes.names, f'choose one of {", ".join(self.classes.names)}')
            raise UserError(f'cam={name!r} is no class of the model: {meant}')
        pixels = self.read(image)
        prepared = self.prepare(pixels)
        if 'tile' in prepared:
            raise UserError(f'tile={prepared["tile"]}: maps of a class are of whole images: leave it out')
        if self._plain is None:
            self._plain = load_trained(config, checkpoint, classes)[1].to(self.device).requires_grad_(False)
        values = class_activation_map(self._plain, prepared, self.classes.names.index(name), layer)
        return cv2.resize(values, (pixels.shape[1], pixels.shape[0]), interpolation=cv2.INTER_LINEAR)

    @torch.inference_mode()
    def predict(
        self, prepared: Sequence[dict], batch_size: int = 1, keep_logits: bool = True, confidence: bool = False
    ) -> list[Segmentation]:
        """Segment images that :meth:`prepare` returned; those of the same size are one batch.

        Args:
            prepared: The images.
            batch_size: Tiles in one forward pass, where an image is predicted in tiles.
            keep_logits: As for a call.
            confidence: Compute the confidence of images in tiles at once, in the same pass as the labels.
        """
        by_size: dict[tuple, list[int]] = {}
        results: dict[int, Segmentation] = {}
        for index, item in enumerate(prepared):
            if 'tile' in item:
                results[index] = self._in_tiles(item['image'], item['tile'], batch_size, keep_logits, confidence)
            else:
                by_size.setdefault(item['inputs'].shape, []).append(index)
        for indices in by_size.values():
            data = {key: [prepared[i][key] for i in indices] for key in ('inputs', 'data_samples')}
            for index, sample in zip(indices, self._model.test_step(data), strict=True):
                labels = label_array(sample.pred_sem_seg.data).astype(np.int16)
                kept = self._probabilities(sample) if keep_logits else 'keep_logits=False'
                found = sample.confidence.numpy() if 'confidence' in sample else None  # of an exported file
                results[index] = Segmentation(as_rgb(prepared[index]['image']), labels, self.classes, kept, found)
        return [results[index] for index in range(len(prepared))]

    def _in_tiles(
        self, image: np.ndarray, tile: int, batch_size: int, keep_logits: bool, confidence: bool
    ) -> Segmentation:
        temperature = self.temperature if confidence else None
        labels, found = self.tiles.labels(image, tile, batch_size, temperature)
        kept = 'keep_logits=False'
        if keep_logits:
            parts = partial(self.tiles.parts, image, tile, batch_size)
            kept = Probabilities(parts, max(len(self.classes.names), 2), self.temperature)
        return Segmentation(as_rgb(image), labels, self.classes, kept, found)

    def _probabilities(self, sample: SegDataSample) -> Probabilities | str:
        logits = class_logits_of(sample.to_dict())
        if logits is None:
            how = 'with confidence=True, or without labels=True'
            return f'{self._model.path} returns labels without logits: export it {how}'
        height, width = sample.pred_sem_seg.shape
        return Probabilities(lambda: iter([(Region(0, height, 0, width), logits)]), logits.channels, self.temperature)


def load_trained(
    config: str | Path | Config, checkpoint: str | Path, classes: str | Path | None = None
) -> tuple[Config, EncoderDecoder, Classes]:
    """Return a config, the trained segmentor in eval mode on the CPU, and its classes.

    Arguments and errors are those of :class:`Segmentor`.
    """
    cfg = without_scope(copy.deepcopy(config)) if isinstance(config, Config) else read_config(config)
    require(cfg, 'model', 'test_dataloader')
    require_segmentor(cfg)
    content = read_checkpoint(checkpoint)
    if classes is None:
        found = classes_of_checkpoint(content, checkpoint)
    else:
        found = read_classes(classes)
        found = dataclasses.replace(found, codes=codes_of_checkpoint(content, len(found.names)))
    model = build_segmentor(cfg)
    load_segmentor(model, content, checkpoint)
    check_num_classes(found.names, model.num_classes, str(classes if classes is not None else checkpoint))
    return cfg, model.eval(), found
