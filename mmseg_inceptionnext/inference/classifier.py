"""A trained classifier, and where it looks for a class (Figure 4 of the paper)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from PIL import Image
from timm.data import ImageNetInfo

from mmseg_inceptionnext.config_files import read_config, require
from mmseg_inceptionnext.data.pipeline import IMAGE_LOADERS
from mmseg_inceptionnext.device import find_device
from mmseg_inceptionnext.errors import UserError, did_you_mean
from mmseg_inceptionnext.images import read_image, swap_rgb
from mmseg_inceptionnext.inference.cam import class_activation_map
from mmseg_inceptionnext.labels import dataset_meta
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import load_classifier


class Classifier:
    """A trained classifier, which :func:`~mmseg_inceptionnext.inference.cam.predict_cams` takes like a Segmentor.

    Args:
        config: Path or name of the config.
        checkpoint: What :func:`~mmseg_inceptionnext.models.weights.load_classifier` takes.
        device: Device, such as 'cpu' or 'cuda:1'. Default: a GPU if there is one.

    Attributes:
        names: Names of the classes, as their folders are called. Of 1000 classes that the checkpoint does not name,
            those of ImageNet, such as 'n02123045'; else numbers.

    Raises:
        UserError: The config or the checkpoint cannot be read, they do not fit, or there is no such device.
    """

    def __init__(self, config: str | Path, checkpoint: str | Path, device: str | torch.device | None = None):
        cfg: Config = read_config(config)
        require(cfg, 'model', 'test_dataloader')
        self.device = find_device(device)
        self.model = build_segmentor(cfg).eval().requires_grad_(False).to(self.device)
        content = load_classifier(self.model, checkpoint)
        names, number = dataset_meta(content).get('classes'), cfg.model.head.num_classes
        if not isinstance(names, (list, tuple)) or len(names) != number:
            names = ImageNetInfo().label_names() if number == 1000 else range(number)
        self.names = list(map(str, names))
        steps = cfg.test_dataloader.dataset.pipeline
        self._edge = next((step.scale for step in steps if step.type == 'ResizeEdge'), None)
        self._pipeline = Compose([step for step in steps if step.type not in IMAGE_LOADERS])

    def read(self, source: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Read an image, (H, W, 3) uint8 in RGB order, see :func:`~mmseg_inceptionnext.images.read_image`."""
        return read_image(source)

    def prepare(self, image: np.ndarray) -> dict:
        """Apply the test pipeline to an image, (H, W, 3) uint8 in RGB order."""
        shape = image.shape[:2]
        return self._pipeline(dict(img=swap_rgb(image), img_shape=shape, ori_shape=shape))

    def cam(self, image: str | Path | Image.Image | np.ndarray, name: str, layer: str | None = None) -> np.ndarray:
        """Return where in an image the classifier looks for a class, by Grad-CAM of its logit.

        Args:
            image: What :meth:`read` takes.
            name: Name of the class; of ImageNet's also in English, such as 'tabby'.
            layer: Name of the module whose feature map is weighted. Default: the last stage.

        Returns:
            (H, W) float32 of the size of the image, from 0 to 1; 0 outside of the centre that the test pipeline crops.

        Raises:
            UserError: The image cannot be read, there is no such class or layer, or grad-cam is missing.
        """
        index = self._index(name)
        pixels = self.read(image)
        packed = self.prepare(pixels)
        values = class_activation_map(self.model, packed, index, layer)
        height, width = pixels.shape[:2]
        h, w = height, width
        if self._edge:
            scale = min(height, width) / self._edge
            h, w = (min(round(side * scale), full) for side, full in zip(values.shape, (height, width), strict=True))
        top, left = (height - h) // 2, (width - w) // 2
        whole = np.zeros((height, width), np.float32)
        whole[top : top + h, left : left + w] = cv2.resize(values, (w, h), interpolation=cv2.INTER_LINEAR)
        return whole

    def _index(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        info = ImageNetInfo()
        described: dict[str, list[int]] = {}
        if self.names == info.label_names():
            for i in range(len(self.names)):
                for word in info.index_to_description(i).split(','):
                    described.setdefault(word.strip().lower(), []).append(i)
        found = described.get(name.lower(), [])
        if len(found) == 1:
            return found[0]
        if found:
            several = ' and '.join(self.names[i] for i in found)
            raise UserError(f'cam={name!r} is the name of {several}: name one of these')
        otherwise = f'choose one such as {", ".join(self.names[:3])}'
        meant = did_you_mean(name.lower(), [*described, *self.names], otherwise)
        raise UserError(f'cam={name!r} is no class of the model: {meant}')
