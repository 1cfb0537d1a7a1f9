"""Where a model looks for a class: Grad-CAM (Figure 4 of the paper), by the package grad-cam."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.model import BaseModel
from PIL import Image
from torch import Tensor, nn

from mmseg_inceptionnext.drawing import save_picture
from mmseg_inceptionnext.errors import MissingPackage, UserError
from mmseg_inceptionnext.images import as_rgb
from mmseg_inceptionnext.inference.manifest import Manifest
from mmseg_inceptionnext.inference.sources import Output, Source, existing_outputs
from mmseg_inceptionnext.models.build import heads_of
from mmseg_inceptionnext.models.metanext import MetaNeXt

if TYPE_CHECKING:
    from mmseg_inceptionnext.inference.classifier import Classifier
    from mmseg_inceptionnext.inference.segmentor import Segmentor


def class_activation_map(model: BaseModel, packed: dict, index: int, layer: str | None = None) -> np.ndarray:
    """Return how much each place of a layer's feature map raises the logits of a class.

    The score whose gradient is taken is a classifier's logit of the class; of a segmentor, the sum of the class's
    logits over the pixels that are predicted as it, or over all pixels, if none is.

    Args:
        model: A trained segmentor or classifier, in eval mode and not optimised, without gradients of its parameters.
        packed: What the test pipeline makes of an image: ``inputs`` (C, H, W) and ``data_samples``.
        index: Index of the class.
        layer: Name of a module of the model, such as 'backbone.stages.2'. Default: the last stage of a MetaNeXt.

    Returns:
        (H, W) float32, the largest value being 1, or 0 where nothing raises the logits.

    Raises:
        UserError: There is no such layer, the logits do not depend on it, or grad-cam is missing.
    """
    name, module = _layer_of(model, layer)
    data = dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
    inputs = model.data_preprocessor(data, False)['inputs'].requires_grad_()  # as the parameters have no gradients
    head = heads_of(model)[-1]

    def score(logits: Tensor) -> Tensor:
        if logits.ndim == 1:  # of a classifier
            return logits[index]
        chosen, predicted = logits[index % len(logits)], logits.argmax(0) == index
        if len(logits) == 1:  # one channel stands for both classes
            chosen, predicted = chosen if index else -chosen, (chosen.sigmoid() > head.threshold) == bool(index)
        return chosen[predicted].sum() if predicted.any() else chosen.sum()

    cam = _grad_cam()(_Logits(model), [module])
    try:
        with torch.enable_grad():
            values = cam(inputs, [score])[0]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f'layer={name!r} returns no feature map that the logits depend on: choose another, such as a stage'
        ) from error
    finally:
        cam.activations_and_grads.release()
    height, width = packed['inputs'].shape[1:]
    return values[:height, :width]


def draw_cam(image: np.ndarray, values: np.ndarray) -> Image.Image:
    """Blend a map (H, W) from 0 to 1 into an image (H, W, 3) uint8: red where it is high, blue where it is low."""
    from pytorch_grad_cam.utils.image import show_cam_on_image

    return Image.fromarray(show_cam_on_image(np.float32(image) / 255, values, use_rgb=True))


def predict_cams(
    segmentor: Segmentor | Classifier,
    sources: Sequence[Source],
    output: Output,
    name: str,
    layer: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[float], None] = lambda images: None,
) -> dict[str, str]:
    """Write the map of a class for each image, in the place of an overlay.

    Args:
        segmentor: The segmentor, or the classifier.
        sources: Images.
        output: Where to write.
        name, layer: Arguments of :meth:`~mmseg_inceptionnext.Segmentor.cam`.
        overwrite: Replace existing outputs.
        on_progress: Called with the number of images that were written since the last call.

    Returns:
        Why files could not be read, ``{path: message}``.

    Raises:
        UserError: A source is a video; the folder has a manifest; an output exists, and ``overwrite`` is not set, or it
            is one of the sources; or there is no such class or layer.
    """
    if videos := [source.path for source in sources if source.is_video]:
        raise UserError(f'{videos[0]} is a video: maps of a class are for images')
    if Manifest.is_in(output.folder):
        raise UserError(
            f'{output.folder} has a manifest, which says that its files are overlays: choose another out=DIR'
        )
    existing = existing_outputs(map(output.overlay_of, sources), sources)
    if existing and not overwrite:
        raise UserError(f'{existing[0]} exists already: pass overwrite=True, or choose another out=DIR')
    failures = {}
    for source in sources:
        try:
            image = segmentor.read(source.path)
            segmentor.prepare(image)
        except UserError as error:
            failures[str(source.path)] = str(error).removeprefix(f'{source.path}: ')
            continue
        save_picture(draw_cam(as_rgb(image), segmentor.cam(image, name, layer)), output.overlay_of(source))
        on_progress(1)
    return failures


class _Logits(nn.Module):
    """A model as grad-cam calls it."""

    def __init__(self, model: BaseModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs, mode='tensor')


def _layer_of(model: BaseModel, name: str | None) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if name is None:
        if not isinstance(model.backbone, MetaNeXt):
            stages = ', '.join(f'backbone.{child}' for child, _ in model.backbone.named_children())
            raise UserError(f'layer=None is for MetaNeXt: name a layer, such as one of {stages}')
        name = f'backbone.stages.{len(model.backbone.stages) - 1}'
    if name not in modules or not name:
        close = difflib.get_close_matches(name, modules, n=3) or ['backbone', 'decode_head']
        raise UserError(f'layer={name!r} is not in the model: did you mean {" or ".join(close)}?')
    return name, modules[name]


def _grad_cam() -> type:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise MissingPackage(
            'maps of a class need grad-cam: pip install mmseg-inceptionnext[cam], then pip install --no-deps grad-cam'
        ) from error
    return GradCAM
