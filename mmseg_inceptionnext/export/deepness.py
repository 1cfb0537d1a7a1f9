"""A segmentor as the .onnx file that GIS programs run: the plugin Deepness of QGIS, and the package GeoDeep.

Both cut a map into square tiles, scale 8-bit values to 0 … 1, and take the class of the largest probability. What they
read in the metadata is JSON under each key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmseg_inceptionnext.data.pipeline import leaf_datasets, pipeline_for_arrays
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.export.export import (
    TOLERANCES,
    Verification,
    check_images,
    mmseg_logits,
    quiet_exporters,
    real_image,
    to_onnx,
)
from mmseg_inceptionnext.export.exportable import ExportableSegmentor, threshold_of
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.inference.onnx_model import Contract, is_onnx, resize_transforms, two_logits
from mmseg_inceptionnext.inference.runtimes import import_onnx
from mmseg_inceptionnext.inference.segmentor import load_trained
from mmseg_inceptionnext.labels import Classes
from mmseg_inceptionnext.models.build import channels_of

RESOLUTION = 10.0  # centimetres a pixel, that GeoDeep takes for a file that does not say
OVERLAP = 15  # percent of a tile


class ProbabilitySegmentor(nn.Module):
    """From pixels between 0 and 1 to the probabilities of all classes.

    Input: (1, C, H, W) float32; RGB, if it has 3 channels. Output: (1, classes, H, W) float32. A single logit with a
    threshold becomes two classes, of which the second has more than a half where its probability is above.
    """

    def __init__(self, segmentor: ExportableSegmentor):
        super().__init__()
        self.segmentor, self.threshold = segmentor, segmentor.threshold

    def forward(self, image: Tensor) -> Tensor:
        return probabilities(self.segmentor(image * 255), self.threshold)


def probabilities(logits: Tensor, threshold: float | None) -> Tensor:
    """Return the probabilities (N, classes, H, W) of logits; of a single logit those of two classes."""
    return (logits if threshold is None else two_logits(logits, threshold)).softmax(1)


def export_for_deepness(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    tile: int = 512,
    resolution: float = RESOLUTION,
    verify: int = 3,
    images: Sequence[str | Path] = (),
    classes: str | Path | None = None,
) -> Verification:
    """Write a segmentor into a .onnx file for Deepness and GeoDeep, and compare what it computes with mmseg.

    Args:
        config, checkpoint, classes: Arguments of :class:`~mmseg_inceptionnext.Segmentor`. Nothing is resized as in the
            test pipeline: the programs bring maps to the resolution.
        out: Path of the file. It is kept if the comparison succeeds.
        tile: Side of the tiles, in pixels.
        resolution: Centimetres a pixel of the images that the segmentor was trained on.
        verify: Number of random images to compare on.
        images: Image files to compare on as well, resized to the tile.

    Raises:
        UserError: As :func:`~mmseg_inceptionnext.export.export` does; or the resolution is not above 0.
    """
    out = Path(out)
    if not is_onnx(out):
        raise UserError(f'{out}: the file name must end in .onnx')
    if not resolution > 0:
        raise UserError(f'resolution={resolution} must be above 0: centimetres a pixel')
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        import_onnx(name)
    check_images((tile, tile), verify + len(images))
    cfg, model, found = load_trained(config, checkpoint, classes)
    resize_transforms(pipeline_for_arrays(leaf_datasets(cfg.test_dataloader.dataset)[0].pipeline))
    channels, threshold = channels_of(model), threshold_of(model)
    contract = Contract(
        found, False, 'float32', (tile, tile), (), model.align_corners, 'fp32', channels, threshold
    )  # fmt: skip
    module = ProbabilitySegmentor(
        ExportableSegmentor(model, labels=False, runtime='onnxruntime', fixed_size=True)
    ).eval()
    generator = np.random.default_rng(0)
    pictures = [
        *(generator.integers(256, size=(1, channels, tile, tile), dtype=np.uint8) for _ in range(verify)),
        *(real_image(path, contract) for path in images),
    ]
    with quiet_exporters(), torch.no_grad():
        program = torch.export.export(module, (torch.zeros(1, channels, tile, tile),))
        content = to_onnx(program, 'probabilities')
        import_onnx('onnx').helper.set_model_props(content, metadata(found, tile, resolution))
        with atomic_write(out) as path:
            path.write_bytes(content.SerializeToString())
            return _compare(path, model, pictures, threshold)


def metadata(classes: Classes, tile: int, resolution: float) -> dict[str, str]:
    """Return the metadata that Deepness and GeoDeep read.

    No probability is too small and no area: both programs would give what is left out to the first class.
    """
    facts = dict(
        model_type='Segmentor',
        class_names={str(i): name for i, name in enumerate(classes.names)},
        resolution=resolution,
        tiles_size=tile,
        tile_size=tile,  # what Deepness calls it in its code
        tiles_overlap=OVERLAP,
        seg_thresh=0.0,
        seg_small_segment=0,
    )
    return {key: json.dumps(value) for key, value in facts.items()}


def _compare(path: Path, model: nn.Module, pictures: Sequence[np.ndarray], threshold: float | None) -> Verification:
    runtime = import_onnx('onnxruntime')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    worst, differing, pixels = 0.0, 0, 0
    for picture in pictures:
        (result,) = session.run(None, {'image': (picture / 255.0).astype(np.float32)})
        expected, result = probabilities(mmseg_logits(model, picture), threshold), torch.from_numpy(result)
        worst = float(np.maximum(worst, (result - expected).abs().max().item()))  # Python's max drops NaN
        differing += (result.argmax(1) != expected.argmax(1)).sum().item()
        pixels += expected[:, 0].numel()
    if not worst <= 10 * TOLERANCES['fp32']:
        raise UserError(f'the exported segmentor deviates by {worst:.1e} in a probability: nothing is written')
    return Verification(tuple(pictures[0].shape[2:]), len(pictures), worst, differing / pixels, 'fp32')
