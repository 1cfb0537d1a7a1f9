"""Run an exported ONNX file in ONNX Runtime in the place of a segmentor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_inceptionnext.errors import MissingPackage, UserError, first_sentence
from mmseg_inceptionnext.inference.label_map_segmentor import label_map
from mmseg_inceptionnext.labels import Classes, classes_of_meta

DTYPES = {'uint8': 'tensor(uint8)', 'float32': 'tensor(float)'}  # input dtypes, and ONNX Runtime's names
# Transforms of a test pipeline that a file may ask for, and their arguments.
_PREPARATIONS = {'Resize': {'scale', 'keep_ratio'}, 'ResizeToMultiple': {'size_divisor'}}
_FORMAT = 'mmseg_inceptionnext 1'


def two_logits(logits: Tensor, threshold: float) -> Tensor:
    """Return (N, 2, H, W) whose argmax is 1 where the probability of (N, 1, H, W) is above a threshold."""
    bound = torch.logit(torch.tensor(threshold, dtype=torch.double), eps=1e-6).item()
    return torch.cat([torch.full_like(logits, bound), logits], dim=1)


def is_onnx(path: str | Path) -> bool:
    """Return whether a path has the suffix of an ONNX file."""
    return Path(path).suffix.lower() == '.onnx'


def import_onnx(name: str) -> ModuleType:
    """Import the package 'onnx', 'onnxruntime' or 'onnxscript'.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f'.onnx files need {name}: pip install mmseg-inceptionnext[onnx]') from error


@dataclass(frozen=True)
class Contract:
    """Input and output of an exported file, as in its metadata.

    Attributes:
        classes: Names, colours and coding of the labels.
        labels: Whether it returns labels (N, H, W), int64, or logits (N, classes, H, W), float32; of the input's size.
            With a threshold there is a single logit.
        dtype: Dtype of the input (N, 3, H, W), RGB from 0 to 255: 'uint8' or 'float32'.
        shape: H and W, and N is 1; None if all three are dynamic.
        prepare: How images are resized before: Resize and ResizeToMultiple of the config's test pipeline.
        align_corners: Whether up-sampling aligns corners.
        precision: Dtype of the weights: 'fp32' or 'fp16'.
        channels: Channels of the input: 3 are RGB.
        threshold: Probability above which a single logit means class 1; None if there is a logit for each class.
    """

    classes: Classes
    labels: bool
    dtype: str
    shape: tuple[int, int] | None
    prepare: tuple[dict, ...]
    align_corners: bool
    precision: str
    channels: int = 3
    threshold: float | None = None

    def metadata(self, versions: dict[str, str]) -> dict[str, str]:
        """Return the metadata of a file: JSON under each key, but plain text under ``format``."""
        height, width = self.shape or (None, None)
        channels = 'RGB' if self.channels == 3 else self.channels
        facts = dict(
            classes=self.classes.names,
            palette=self.classes.palette,
            codes=self.classes.codes,
            reduce_zero_label=self.classes.reduce_zero_label,
            input=dict(layout='NCHW', channels=channels, range=[0, 255], dtype=self.dtype, height=height, width=width),
            output='labels' if self.labels else 'logits',
            prepare=self.prepare,
            align_corners=self.align_corners,
            precision=self.precision,
            threshold=self.threshold,
            versions=versions,
        )
        return dict(format=_FORMAT) | {key: json.dumps(value) for key, value in facts.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: str | Path) -> Contract:
        """Build one from what :meth:`metadata` has returned.

        Raises:
            UserError: The metadata are those of another program, or damaged.
        """
        if metadata.get('format') != _FORMAT:
            raise UserError(f'{path} was not exported by tools/export.py, or by another version of it: export it again')
        try:
            facts = {key: json.loads(text) for key, text in metadata.items() if key != 'format'}
            taken = facts['input']
            if taken['dtype'] not in DTYPES or facts['output'] not in ('labels', 'logits'):
                raise ValueError('unknown values')
            return cls(
                classes=classes_of_meta(facts),
                labels=facts['output'] == 'labels',
                dtype=taken['dtype'],
                shape=_pair((taken['height'], taken['width'])) if taken['height'] is not None else None,
                prepare=tuple(map(check_resize, facts['prepare'])),
                align_corners=bool(facts['align_corners']),
                precision=str(facts['precision']),
                channels=3 if taken['channels'] == 'RGB' else int(taken['channels']),
                threshold=None if facts.get('threshold') is None else float(facts['threshold']),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'{path}: its metadata are damaged ({type(error).__name__}: {error}): export it again'
            ) from error

    def pipeline(self) -> list[dict]:
        """Return the pipeline from an image in memory, BGR, to what :meth:`OnnxModel.test_step` takes."""
        return [dict(type='LoadImageFromNDArray'), *self.prepare, dict(type='PackSegInputs')]


def check_resize(transform: dict) -> dict:
    """Return an allowed resize transform as plain values.

    Raises:
        ValueError: It is another transform, or has other arguments.
    """
    kind, arguments = transform['type'], {key: value for key, value in transform.items() if key != 'type'}
    if kind not in _PREPARATIONS or not set(arguments) <= _PREPARATIONS[kind]:
        raise ValueError(f'{kind} with {", ".join(arguments) or "no arguments"}')
    checks = dict(scale=_pair, keep_ratio=bool, size_divisor=lambda value: _pair((value, value))[0])
    return dict(type=kind) | {key: checks[key](value) for key, value in arguments.items()}


def _pair(values) -> tuple[int, int]:
    first, second = values
    if not all(type(value) is int and value > 0 for value in (first, second)):
        raise ValueError(f'{values} are not two sizes')
    return first, second


class OnnxModel:
    """An ONNX file with the ``test_step`` of a segmentor; no torch model is built.

    Args:
        path: Path of a file of ``tools/export.py``. ONNX files are data: they hold no code that would run. Those that
            take weights from other files are refused.

    Attributes:
        contract: What the file expects and returns.

    Raises:
        UserError: There is no such file, it is damaged, of another program, or refers to other files; or onnx or
            onnxruntime is not installed.
    """

    def __init__(self, path: str | Path):
        onnx, onnxruntime = import_onnx('onnx'), import_onnx('onnxruntime')
        self.path = Path(path).expanduser()
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f'{self.path} cannot be read: {error.strerror}') from error
        try:
            model = onnx.ModelProto.FromString(content)
        except Exception as error:  # protobuf's class differs between releases
            raise UserError(f'{self.path} is truncated, damaged or no ONNX file') from error
        self.contract = Contract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, self.path)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _messages(model, onnx.TensorProto)):
            raise UserError(
                f'{self.path} is refused: its weights are in other files: export it again by tools/export.py'
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # ONNX Runtime has a class for every kind of damage
            raise UserError(f'{self.path} cannot be run by ONNX Runtime: {first_sentence(error)}') from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != DTYPES[self.contract.dtype]:
            raise UserError(f'{self.path}: its graph is not what its metadata say: export it again')
        self._input = inputs[0].name

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits or labels of images (N, 3, H, W), RGB from 0 to 255.

        Raises:
            UserError: The file was exported for another size.
        """
        shape = self.contract.shape
        if shape and shape != images.shape[2:]:
            (height, width), (h, w) = shape, images.shape[2:]
            raise UserError(
                f'{self.path} takes images of {width}×{height}, not of {w}×{h}: export it with dynamic=True, or '
                f'with shape=({h}, {w})'
            )
        if images.dtype != np.uint8 and self.contract.dtype == 'uint8':
            raise UserError(
                f"{self.path} takes values of 8 bits, and these images have more: export it with dtype='float32'"
            )
        images = images.astype(self.contract.dtype, copy=False)
        batches = np.split(images, len(images)) if shape else [images]
        try:
            return np.concatenate([self._session.run(None, {self._input: batch})[0] for batch in batches])
        except Exception as error:  # from ONNX Runtime: the file was tampered with
            raise UserError(f'{self.path} cannot be run by ONNX Runtime: {first_sentence(error)}') from error

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict label maps as :class:`~mmseg_inceptionnext.LabelMapSegmentor` does.

        Logits are up-sampled to the size of the original image as mmseg does it. Labels are scaled by nearest
        neighbour: where the sizes differ, borders may differ by a pixel of the network's input.

        Args:
            data: ``inputs``, a list of (3, H, W) uint8, BGR, of one size; and ``data_samples``, one for each.

        Returns:
            The samples, with ``pred_sem_seg`` (1, height, width), int64.
        """
        images = torch.stack(list(data['inputs']))
        if self.contract.channels == 3:
            images = images.flip(1)
        results = torch.from_numpy(self.run(images.numpy()))
        for result, sample in zip(results, data['data_samples'], strict=True):
            if self.contract.labels:
                size = sample.metainfo['ori_shape'][:2]
                label = F.interpolate(result[None, None].float(), size, mode='nearest-exact')[0].long()
            else:
                if self.contract.threshold is not None:
                    (result,) = two_logits(result[None], self.contract.threshold)
                label = label_map(result, tuple(images.shape[2:]), sample.metainfo, self.contract.align_corners)
            sample.set_data({'pred_sem_seg': PixelData(data=label)})
        return data['data_samples']


def _messages(message, kind: type) -> Iterator:
    """Yield all messages of a kind inside of a protobuf message, at any depth."""
    from google.protobuf.message import Message  # here: it comes with onnx

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if isinstance(value, Message) else value:
            if isinstance(child, kind):
                yield child
            yield from _messages(child, kind)
