"""Run an exported ONNX file in the place of a segmentor.

Such files come from others, too. Everything in them is checked when they are opened, and what they return is checked
after each run: see SECURITY.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_inceptionnext.errors import UserError, first_sentence
from mmseg_inceptionnext.inference.label_map_segmentor import class_logits, label_map
from mmseg_inceptionnext.inference.runtimes import RUNTIMES, import_onnx
from mmseg_inceptionnext.labels import Classes, classes_of_meta

DTYPES = ('uint8', 'float32')  # of the input
_LABEL_DTYPES = ('uint8', 'int64')
# Transforms of a test pipeline that a file may ask for, and their arguments.
_PREPARATIONS = {'Resize': {'scale', 'keep_ratio'}, 'ResizeToMultiple': {'size_divisor'}}
_FORMAT = 'mmseg_inceptionnext 1'

# What torch's exporter writes for the recipes, the baselines and mmseg's own models, the like for other activations and
# norms, and what NNCF adds: functions of dense tensors alone. No control flow, strings, sequences or random numbers: a
# graph is a list of steps, and ends.
_OPERATORS = """
    Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant Conv ConvTranspose CumSum
    DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mish Mod
    Mul Neg Not Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum Relu Reshape Resize Round ScatterND Shape Sigmoid Sign Slice Softmax Softplus SpaceToDepth
    Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Unsqueeze Where
"""
# Beyond what a test pipeline or a network asks for: there for files that would take all memory, or hours to be read.
MOST_PIXELS = 2**26  # 8192×8192
_LARGEST_DIVISOR = 1024
_MOST_RESIZES = 8
_MOST_CHARACTERS = 2**22  # of metadata: 32767 classes
_MOST_NODES = 2**16
_LARGEST_FILE = 2**31 - 1  # what protobuf reads


def two_logits(logits: Tensor, threshold: float) -> Tensor:
    """Return (N, 2, H, W) whose argmax is 1 where the probability of (N, 1, H, W) is above a threshold."""
    bound = torch.logit(torch.tensor(threshold, dtype=torch.double), eps=1e-6).item()
    return torch.cat([torch.full_like(logits, bound), logits], dim=1)


def is_onnx(path: str | Path) -> bool:
    """Return whether a path has the suffix of an ONNX file."""
    return Path(path).suffix.lower() == '.onnx'


@dataclass(frozen=True)
class Contract:
    """Input and output of an exported file, as in its metadata.

    Attributes:
        classes: Names, colours and coding of the labels.
        labels: Whether it returns labels (N, H, W), of ``label_dtype``, or logits (N, classes, H, W), float32; of the
            input's size. With a threshold there is a single logit.
        dtype: Dtype of the input (N, 3, H, W), RGB from 0 to 255: 'uint8' or 'float32'.
        shape: H and W, and N is 1; None if all three are dynamic.
        prepare: How images are resized before: Resize and ResizeToMultiple of the config's test pipeline.
        align_corners: Whether up-sampling aligns corners.
        precision: What it is computed in: 'fp32', 'bf16', 'fp16' or 'int8'. Its weights are float32 for 'bf16'.
        channels: Channels of the input: 3 are RGB.
        threshold: Probability above which a single logit means class 1; None if there is a logit for each class.
        label_dtype: Dtype of labels: 'uint8', or 'int64' for more than 256 classes.
        runtime: 'onnxruntime' or 'openvino': in which the form of its operations is fastest. Others run it, too.
        quantization: How a file of 'int8' compared with its segmentor, see
            :class:`~mmseg_inceptionnext.export.quantize.Quantization`.
        confidence: Whether it also returns the probability of each label, (N, H, W) float32.
        temperature: What logits are divided by for probabilities; those that it returns are not.
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
    label_dtype: str = 'int64'
    runtime: str = 'onnxruntime'
    quantization: dict | None = None
    confidence: bool = False
    temperature: float = 1.0

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
            label_dtype=self.label_dtype,
            runtime=self.runtime,
            quantization=self.quantization,
            confidence=self.confidence,
            temperature=self.temperature,
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
            if sum(map(len, metadata.values())) > _MOST_CHARACTERS:
                raise ValueError('they are too long')
            facts = {key: json.loads(text) for key, text in metadata.items() if key != 'format'}
            taken = facts['input']
            if taken['dtype'] not in DTYPES or facts['output'] not in ('labels', 'logits'):
                raise ValueError('unknown values')
            contract = cls(
                classes=classes_of_meta(facts),
                labels=facts['output'] == 'labels',
                dtype=taken['dtype'],
                shape=_pair((taken['height'], taken['width'])) if taken['height'] is not None else None,
                prepare=tuple(map(check_resize, facts['prepare'])),
                align_corners=bool(facts['align_corners']),
                precision=str(facts['precision']),
                channels=3 if taken['channels'] == 'RGB' else int(taken['channels']),
                threshold=None if facts.get('threshold') is None else float(facts['threshold']),
                label_dtype=facts.get('label_dtype', 'int64'),  # files of version 1.0 do not say it, nor the runtime
                runtime=facts.get('runtime', 'onnxruntime'),
                quantization=facts.get('quantization'),
                confidence=bool(facts.get('confidence', False)),
                temperature=float(facts.get('temperature', 1)),
            )
            if not 0 < contract.temperature < float('inf'):
                raise ValueError(f'temperature {contract.temperature}')
            if contract.label_dtype not in _LABEL_DTYPES or contract.runtime not in RUNTIMES:
                raise ValueError('unknown values')
            if len(contract.prepare) > _MOST_RESIZES:
                raise ValueError(f'{len(contract.prepare)} resize transforms')
            if contract.threshold is not None and not (
                0 <= contract.threshold <= 1 and len(contract.classes.names) > 1
            ):
                raise ValueError(f'threshold {contract.threshold} for {len(contract.classes.names)} classes')
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = f'{type(error).__name__}: {error}'[:200]
            raise UserError(f'{path}: its metadata are damaged ({reason}): export it again') from error
        return contract

    def shapes(self, n: int | None, height: int | None, width: int | None) -> tuple[list, list]:
        """Return the shapes of an input of n images and of its output; None stands for what is dynamic."""
        maps = [] if self.labels else [len(self.classes.names) if self.threshold is None else 1]
        return [n, self.channels, height, width], [n, *maps, height, width]

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
    if kind == 'Resize' and 'scale' not in arguments:
        raise ValueError('Resize without scale')
    checks = dict(scale=_pair, keep_ratio=bool, size_divisor=_divisor)
    return dict(type=kind) | {key: checks[key](value) for key, value in arguments.items()}


def resize_transforms(pipeline: list[dict]) -> tuple[dict, ...]:
    """Return what a test pipeline for images in memory does between loading and packing, as a contract's ``prepare``.

    Raises:
        UserError: It does something else than resize.
    """
    try:
        return tuple(check_resize(transform) for transform in pipeline[1:] if transform.type != 'PackSegInputs')
    except (TypeError, ValueError) as error:
        raise UserError(
            f'the test pipeline cannot be exported ({error}): Resize to a scale and ResizeToMultiple can'
        ) from error


def _pair(values) -> tuple[int, int]:
    first, second = values
    if not all(type(value) is int and value > 0 for value in (first, second)):
        raise ValueError(f'{values} are not two sizes')
    if first * second > MOST_PIXELS:  # also where the ratio is kept: no side is longer, and the image is inside
        raise ValueError(f'{first}×{second} are more than {MOST_PIXELS} pixels')
    return first, second


def _divisor(value) -> int:
    if type(value) is not int or not 0 < value <= _LARGEST_DIVISOR:
        raise ValueError(f'size_divisor {value} is not from 1 to {_LARGEST_DIVISOR}')
    return value


class OnnxModel:
    """An ONNX file with the ``test_step`` of a segmentor; no torch model is built.

    Args:
        path: Path of a file of ``tools/export.py``. ONNX files are data: they hold no code that would run. Those that
            take weights from other files are refused.
        runtime: 'onnxruntime' or 'openvino'. Default: that for which it was exported.
        threads: Number of threads. Default: PyTorch's.

    Attributes:
        contract: What the file expects and returns.

    Raises:
        UserError: There is no such file, it is damaged, of another program, or refers to other files; or onnx or the
            runtime is not installed.
    """

    def __init__(self, path: str | Path, runtime: str | None = None, threads: int | None = None):
        if runtime is not None and runtime not in RUNTIMES:
            raise UserError(f'runtime={runtime!r}: choose {" or ".join(RUNTIMES)}')
        if threads is not None and threads < 1:
            raise UserError(f'threads={threads} must be at least 1')
        onnx = import_onnx('onnx')
        self.path = Path(path).expanduser()
        content = self._content()
        try:
            model = onnx.ModelProto.FromString(content)
        except Exception as error:  # protobuf's class differs between releases
            raise UserError(f'{self.path} is truncated, damaged or no ONNX file') from error
        self.contract = Contract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, self.path)
        self._check_graph(model)
        session = RUNTIMES[runtime or self.contract.runtime]
        try:
            self._session = session(content, self.contract.precision, threads or torch.get_num_threads())
        except UserError:  # it is not installed
            raise
        except Exception as error:  # a runtime has a class for every kind of damage
            raise UserError(
                f'{self.path} cannot be run by {session.name}: {first_sentence(error)[:200]}: export it again'
            ) from error
        self._check_contract()

    def _content(self) -> bytes:
        try:
            size = self.path.stat().st_size
            if not self.path.is_file() or size > _LARGEST_FILE:
                raise UserError(f'{self.path} is no file of tools/export.py, but a folder, a device or far too large')
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f'{self.path} cannot be read: {error.strerror}') from error

    def _check_graph(self, model) -> None:
        """Check that a graph holds what ``tools/export.py`` writes, and nothing else."""
        onnx = import_onnx('onnx')
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _messages(model, onnx.TensorProto)):
            why = 'its weights are in other files'
        elif foreign := foreign_operators(model):
            why = f'it holds the operator {foreign[0][:100]!r}, which no exported segmentor needs'
        elif len(model.graph.node) > _MOST_NODES:
            why = f'its graph has {len(model.graph.node)} nodes, more than {_MOST_NODES}'
        elif model.functions or len(list(_messages(model, onnx.GraphProto))) > 1:
            why = 'it holds functions or graphs inside of the graph, which no exported segmentor needs'
        elif any(_messages(model, onnx.SparseTensorProto)):
            why = 'it holds sparse tensors, which no exported segmentor needs'
        else:
            return
        raise UserError(f'{self.path} is refused: {why}: export it again by tools/export.py')

    def _check_contract(self) -> None:
        """Check that input and output are what the metadata say, where the sizes are not dynamic."""
        n, shape = (1, self.contract.shape) if self.contract.shape else (None, (None, None))
        types = self.contract.dtype, self.contract.label_dtype if self.contract.labels else 'float32'
        expected = list(zip(types, self.contract.shapes(n, *shape), strict=True))
        if self.contract.confidence:
            expected.append(('float32', [n, *shape]))
        if self._session.values != expected:
            raise UserError(f'{self.path}: its graph is not what its metadata say: export it again')

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits or labels of images, as :meth:`outputs` does."""
        return self.outputs(images)[0]

    def outputs(self, images: np.ndarray) -> list[np.ndarray]:
        """Return logits or labels, and the confidence if the file does, of images (N, 3, H, W), RGB from 0 to 255.

        Raises:
            UserError: The file was exported for another size, it needs too much memory, or the result has another
                shape than its metadata say.
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
        return [np.concatenate(parts) for parts in zip(*map(self._run, batches), strict=True)]

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        try:
            results = self._session.run(images)
        except Exception as error:  # from the runtime
            if 'alloc' in str(error).lower():  # that of an arena, or std::bad_alloc
                raise UserError(
                    f'{self.path} needs more memory for {images.shape[3]}×{images.shape[2]} pixels than there is: '
                    'take smaller images, or export it again'
                ) from error
            raise UserError(
                f'{self.path} cannot be run by {self._session.name}: {first_sentence(error)[:200]}: export it again'
            ) from error
        _, expected = self.contract.shapes(len(images), *images.shape[2:])
        for result, shape in zip(results, [expected, [len(images), *images.shape[2:]]], strict=False):
            if list(result.shape) != shape:
                raise UserError(
                    f'{self.path} returns values of shape {result.shape}, not {tuple(shape)} as its metadata say: '
                    'export it again'
                )
        return results

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict label maps as :class:`~mmseg_inceptionnext.LabelMapSegmentor` does.

        Logits are up-sampled to the size of the original image as mmseg does it. Labels are scaled by nearest
        neighbour: where the sizes differ, borders may differ by a pixel of the network's input.

        Args:
            data: ``inputs``, a list of (3, H, W) uint8, BGR, of one size; and ``data_samples``, one for each.

        Returns:
            The samples, with ``pred_sem_seg`` (1, height, width), int64, and of a file that returns logits with
            ``class_logits``; of one that returns labels and their confidence with that, ``confidence`` (height, width).

        Raises:
            UserError: As :meth:`run`; or logits are not finite, or a label is that of no class.
        """
        images = torch.stack(list(data['inputs']))
        if self.contract.channels == 3:
            images = images.flip(1)
        results, *confidence = self.outputs(images.numpy())
        self._check_values(results, *confidence)
        results = torch.from_numpy(results)
        for i, (result, sample) in enumerate(zip(results, data['data_samples'], strict=True)):
            if self.contract.labels:
                size = sample.metainfo['ori_shape'][:2]
                label = F.interpolate(result[None, None].float(), size, mode='nearest-exact')[0].long()
                if confidence:
                    sure = F.interpolate(torch.from_numpy(confidence[0][i])[None, None], size, mode='bilinear')
                    sample.set_data({'confidence': sure[0, 0]})
            else:
                bound = 0
                if self.contract.threshold is not None:
                    (result,) = two_logits(result[None], self.contract.threshold)
                    bound = torch.stack([result[0], torch.zeros_like(result[0])])  # of the logits 0 and x
                size, align_corners = tuple(images.shape[2:]), self.contract.align_corners
                label = label_map(result, size, sample.metainfo, align_corners)
                sample.set_data({'class_logits': class_logits(result - bound, size, sample.metainfo, align_corners)})
            sample.set_data({'pred_sem_seg': PixelData(data=label)})
        return data['data_samples']

    def _check_values(self, results: np.ndarray, confidence: np.ndarray | None = None) -> None:
        if confidence is not None and not (confidence.min() >= 0 and confidence.max() <= 1.0001):  # also of NaN
            raise UserError(f'{self.path} returns probabilities that are none: export it again')
        smallest, largest = results.min(), results.max()
        if self.contract.labels and not 0 <= smallest <= largest < len(self.contract.classes.names):
            raise UserError(
                f'{self.path} returns labels from {smallest} to {largest}, but has {len(self.contract.classes.names)} '
                'classes: export it again'
            )
        if not (np.isfinite(smallest) and np.isfinite(largest)):  # of NaN, both are NaN
            precision = " with precision='fp32'" if self.contract.precision == 'fp16' else ''  # where numbers overflow
            raise UserError(f'{self.path} returns logits that are not finite numbers: export it again{precision}')


def foreign_operators(model) -> list[str]:
    """Return the operators of an ONNX model that :class:`OnnxModel` does not run, each as domain.name."""
    found = {f'{node.domain}.{node.op_type}'.removeprefix('.') for node in model.graph.node}
    return sorted(found - set(_OPERATORS.split()))


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
