"""An exported file in the place of a trained segmentor, in a test loop."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_inceptionnext.data.check import open_dataset
from mmseg_inceptionnext.data.pipeline import leaf_datasets, pipeline_for_arrays
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.onnx_model import OnnxModel, resize_transforms
from mmseg_inceptionnext.labels import check_same_names


class ExportedSegmentor(nn.Module):
    """A file of ``tools/export.py`` that takes what the test pipeline of a config makes.

    Args:
        path: Path of the .onnx file.
        cfg: A whole config, with the test set.

    Attributes:
        temperature (float): What the file's logits are divided by for probabilities.
        is_sure (bool): Whether it returns more than labels, so that calibration can be computed.

    Raises:
        UserError: The file cannot be run, or was exported for other classes or another test pipeline.
    """

    def __init__(self, path: str | Path, cfg: Config):
        super().__init__()
        self._model = OnnxModel(path)
        contract, dataset = self._model.contract, leaf_datasets(cfg.test_dataloader.dataset)[0]
        self.temperature, self.is_sure = contract.temperature, contract.confidence or not contract.labels
        names, expected = contract.classes.names, open_dataset(dataset).metainfo['classes']
        if len(names) != len(expected):
            raise UserError(
                f'{path} has {len(names)} classes, the data set {len(expected)}: give the config of its run'
            )
        check_same_names(names, path, expected)
        prepare = resize_transforms(pipeline_for_arrays(dataset.pipeline))
        if prepare != contract.prepare:
            raise UserError(
                f'{path} was exported with the test pipeline {list(contract.prepare)}, the config has {list(prepare)}: '
                'give the config of its run, or export it again'
            )

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict label maps, see :meth:`~mmseg_inceptionnext.inference.onnx_model.OnnxModel.test_step`."""
        pairs = zip(data['inputs'], data['data_samples'], strict=True)  # one by one: their sizes may differ
        return [self._model.test_step(dict(inputs=[image], data_samples=[sample]))[0] for image, sample in pairs]
