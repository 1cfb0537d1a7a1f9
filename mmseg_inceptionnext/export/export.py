"""Export a trained segmentor to one file, ONNX or torch.export's, kept only if it computes the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import mmseg
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mmseg_inceptionnext.data.pipeline import leaf_datasets, pipeline_for_arrays
from mmseg_inceptionnext.device import find_device
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.export.exportable import ExportableSegmentor, threshold_of
from mmseg_inceptionnext.export.quantize import Calibration, Quantization, compare, quantize
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.images import read_image, swap_rgb
from mmseg_inceptionnext.inference.onnx_model import (
    MOST_PIXELS,
    Contract,
    OnnxModel,
    foreign_operators,
    is_onnx,
    resize_transforms,
    two_logits,
)
from mmseg_inceptionnext.inference.runtimes import RUNTIMES, computes_bf16, import_onnx
from mmseg_inceptionnext.inference.segmentor import load_trained
from mmseg_inceptionnext.inference.temperature import read_temperature
from mmseg_inceptionnext.labels import check_same_names
from mmseg_inceptionnext.models.build import LARGEST_STRIDE, channels_of, heads_of
from mmseg_inceptionnext.version import __version__

# How far a logit may be from mmseg's, relative to the largest. Half precision has 11 bits and bfloat16 has 8, and both
# round in every layer. What int8 loses is measured in other terms, see quantize.py.
TOLERANCES = {'fp32': 1e-4, 'fp16': 1e-2, 'bf16': 8e-2}
_LARGEST_CONSTANT = 2**24  # elements: matrices of interpolation, not activations
PRECISIONS = ('auto', *TOLERANCES, 'int8')


@dataclass(frozen=True)
class Verification:
    """How a file compares with the segmentor that it was made from.

    Attributes:
        shape: Height and width that the file takes; None for any.
        images: Number of images that were run through both.
        error: Largest deviation of a logit, relative to the largest logit. For labels, half the difference between the
            largest logit and that of the chosen class. None for int8.
        differing: Share of pixels whose labels differ: ties, which the deviation decides.
        precision: What the file is computed in.
        confidence_error: Largest deviation of a confidence, if the file returns it.
        quantization: What int8 has lost.
    """

    shape: tuple[int, int] | None
    images: int
    error: float | None
    differing: float
    precision: str
    quantization: Quantization | None = None
    confidence_error: float | None = None


def export(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    shape: tuple[int, int] = (512, 512),
    dynamic: bool = False,
    labels: bool = False,
    dtype: str = 'uint8',
    precision: str = 'fp32',
    verify: int = 3,
    images: Sequence[str | Path] = (),
    classes: str | Path | None = None,
    device: str | torch.device = 'cpu',
    runtime: str | None = None,
    calibration: Calibration | None = None,
    confidence: bool = False,
) -> Verification:
    """Write a segmentor into a file that needs neither this package nor mmseg, and compare what both compute.

    Args:
        config, checkpoint, classes: Arguments of :class:`~mmseg_inceptionnext.Segmentor`.
        out: Path of the file: ``.onnx``, or ``.pt2`` for a program of torch.export. It is kept if the comparison
            succeeds.
        shape: Height and width of the images. The file takes the size that the config's test pipeline makes of it.
        dynamic: Accept any size from 32 pixels a side on, and any number of images; for a UPerHead or an FPNHead.
        labels: Return labels, not logits; :class:`~mmseg_inceptionnext.inference.onnx_model.Contract` has their shapes.
        dtype: Dtype of the input, 'uint8' or 'float32', of the same values.
        precision: 'fp32'; 'fp16' for weights and arithmetic in half precision; 'bf16', which OpenVINO computes in, or
            'auto' for the faster of this and 'fp32' on this machine; or 'int8', quantised by NNCF.
        verify: Number of random images to compare on, of several sizes if ``dynamic``.
        images: Image files to compare on as well, resized as by the config's test pipeline, or to the file's size.
        device: Device that traces the segmentor and computes what the file is compared with; a ``.pt2`` runs on such a
            one.
        runtime: 'onnxruntime' (default) or 'openvino': for which the operations of a ``.onnx`` take their fastest form.
            The file is compared in it, and runs in the other as well.
        calibration: Images for 'int8': with these it is compared, not with ``verify`` and ``images``.
        confidence: Return the probability of each label, (N, H, W) float32, as a second output. The temperature beside
            the checkpoint is in it.

    Raises:
        UserError: The segmentor or its test pipeline cannot be exported; the size is too small; there is nothing to
            compare on; the result deviates by more than :data:`TOLERANCES`, or int8 loses more than
            ``calibration.max_drop``; a package is not installed; or torch is too old to write it as ONNX.
    """
    out = Path(out)
    if not is_onnx(out) and out.suffix != '.pt2':
        raise UserError(f'{out}: the file name must end in .onnx or .pt2')
    runtime = _check_runtime(out, runtime, precision)
    if (precision == 'int8') != (calibration is not None):
        raise UserError(
            "precision='int8' needs images to calibrate on: pass calibrate=DIR or data=FILE"
            if calibration is None
            else f"calibrate=DIR goes with precision='int8', not with {precision!r}: drop it"
        )
    if confidence and precision == 'int8':
        raise UserError(
            "confidence=True and precision='int8' exclude each other: quantised probabilities are not compared"
        )
    check_images(shape, len(calibration.images) if calibration else verify + len(images))
    device = find_device(device)
    cfg, model, found = load_trained(config, checkpoint, classes)
    prepare = resize_transforms(pipeline_for_arrays(leaf_datasets(cfg.test_dataloader.dataset)[0].pipeline))
    if precision == 'auto':
        precision = 'bf16' if runtime == 'openvino' and computes_bf16() else 'fp32'
    temperature = read_temperature(checkpoint)
    module = ExportableSegmentor(
        model, labels, runtime, precision, not dynamic, temperature if confidence else None
    )  # fmt: skip
    if dynamic and not module.any_size:
        heads = ' and '.join(type(head).__name__ for head in heads_of(model))
        raise UserError(f'{heads} can be exported for one size: drop dynamic=True, and give shape=(H, W)')
    if precision == 'fp16':
        module = module.half()
    if calibration is not None and calibration.classes is not None:
        check_same_names(found.names, checkpoint, calibration.classes)
    contract = Contract(
        found, labels, dtype, None, prepare, model.align_corners, precision, channels_of(model), threshold_of(model),
        str(module.label_dtype).removeprefix('torch.'), runtime or 'onnxruntime',
        confidence=confidence, temperature=temperature,
    )  # fmt: skip
    if not dynamic:
        contract = dataclasses.replace(contract, shape=_network_size(shape, contract))
        shape = contract.shape
    model, module = model.to(device), module.to(device)
    if calibration is None:
        pictures = [
            *_random_images(verify, contract.channels, shape, dynamic),
            *(real_image(path, contract) for path in images),
        ]
    with quiet_exporters():
        program = _trace(module, contract, shape)
        with atomic_write(out) as path:
            if not is_onnx(out):
                return _compare(_write_pt2(program, contract, path, device), model, pictures, contract)
            names = ['labels' if labels else 'logits', *(['confidence'] if confidence else [])]
            onnx_model = to_onnx(program, *names)
            _name_sizes(onnx_model, contract)
            if calibration is None:
                return _compare(_write_onnx(onnx_model, contract, path), model, pictures, contract)
            return _write_int8(onnx_model, contract, path, model, set(program.state_dict), calibration)


def _check_runtime(out: Path, runtime: str | None, precision: str) -> str | None:
    """Return the runtime that a file is made for, after checking that it is there and has the precision."""
    if precision not in PRECISIONS:
        raise UserError(f'precision={precision!r}: choose one of {", ".join(PRECISIONS)}')
    if not is_onnx(out):
        if runtime is not None:
            raise UserError(f'runtime={runtime!r} is for .onnx files, and {out} is none: drop it')
        if precision not in ('auto', 'fp32', 'fp16'):
            raise UserError(f'precision={precision!r} is for .onnx files, and {out} is none: choose fp32 or fp16')
        return None
    runtime = runtime or 'onnxruntime'
    if runtime not in RUNTIMES:
        raise UserError(f'runtime={runtime!r}: choose {" or ".join(RUNTIMES)}')
    if precision == 'bf16' and runtime == 'onnxruntime':
        raise UserError("precision='bf16' needs runtime='openvino': ONNX Runtime does not compute in it on CPUs")
    for name in ('onnx', 'onnxscript', runtime, *(('onnxruntime', 'nncf') if precision == 'int8' else ())):
        import_onnx(name)
    return runtime


def check_images(shape: tuple[int, int], number: int) -> None:
    """Check the size of a file's images, and the number of those to compare on."""
    if min(shape) < LARGEST_STRIDE:
        raise UserError(f'shape={tuple(shape)}: no side may be shorter than {LARGEST_STRIDE}')
    if shape[0] * shape[1] > MOST_PIXELS:
        raise UserError(f'shape={tuple(shape)}: these are more than {MOST_PIXELS} pixels')
    if number < 1:
        raise UserError('there is no image to compare on: pass verify=1 or more, or images=FILE')


def _random_images(number: int, channels: int, shape: tuple[int, int], dynamic: bool) -> Iterator[np.ndarray]:
    """Yield images (N, C, H, W) uint8; if ``dynamic``, one to three at a time, of sizes that no stride divides."""
    generator = np.random.default_rng(0)
    for i in range(number):
        count, height, width = (1 + i % 3, shape[0] + 7 * i, shape[1] + 29 * i) if dynamic else (1, *shape)
        yield generator.integers(256, size=(count, channels, height, width), dtype=np.uint8)


def _network_size(shape: tuple[int, int], contract: Contract) -> tuple[int, int]:
    """Return the height and width that the test pipeline makes of an image."""
    image = np.zeros((*shape, contract.channels), np.uint8)
    return tuple(Compose(contract.pipeline())(dict(img=image))['inputs'].shape[1:])


def real_image(path: str | Path, contract: Contract) -> np.ndarray:
    """Read an image to compare on, (1, C, H, W) uint8 or float32, resized for a file."""
    image = swap_rgb(read_image(path, contract.channels))
    pipeline = contract.pipeline()
    pixels = Compose(pipeline)(dict(img=image))['inputs']
    if contract.shape and contract.shape != tuple(pixels.shape[1:]):
        pipeline[1:-1] = [dict(type='Resize', scale=contract.shape[::-1])]
        pixels = Compose(pipeline)(dict(img=image))['inputs']
    if contract.channels == 3:
        pixels = pixels.flip(0)
    if min(pixels.shape[1:]) < LARGEST_STRIDE:
        raise UserError(f'{path} is too thin: no side may be shorter than {LARGEST_STRIDE} pixels')
    return pixels[None].numpy()


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters, which log a line for each of a thousand nodes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _trace(module: ExportableSegmentor, contract: Contract, shape: tuple[int, int]) -> ExportedProgram:
    sizes, example = None, torch.zeros(1, contract.channels, *shape)
    if contract.shape is None:
        # Sizes of 0 and 1 would be taken for constants: two images, of two positions in the last feature map.
        example = torch.zeros(2, contract.channels, *(max(side, 2 * LARGEST_STRIDE) for side in shape))
        sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    example = example.to(module.mean.device, getattr(torch, contract.dtype))
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=sizes)


def _versions() -> dict[str, str]:
    return dict(mmseg_inceptionnext=__version__, torch=torch.__version__, mmseg=mmseg.__version__)


def _write_pt2(program: ExportedProgram, contract: Contract, path: Path,
               device: torch.device) -> Callable[[np.ndarray], list[np.ndarray]]:  # fmt: skip
    content = BytesIO()  # torch aborts the process where it cannot write into a file
    torch.export.save(program, content, extra_files={'metadata.json': json.dumps(contract.metadata(_versions()))})
    path.write_bytes(content.getbuffer())
    module = torch.export.load(path).module()
    dtype = getattr(torch, contract.dtype)

    def run(images: np.ndarray) -> list[np.ndarray]:
        found = module(torch.from_numpy(images).to(device, dtype))
        return [x.cpu().numpy() for x in (found if isinstance(found, tuple) else (found,))]

    return run


def to_onnx(program: ExportedProgram, *outputs: str):
    """Return a program as an ONNX model whose input is called 'image'.

    Args:
        program: What was traced.
        outputs: Names of its outputs.

    Raises:
        UserError: torch is too old, or it needs an operator that is not run from a file.
    """
    try:
        model = torch.onnx.export(
            program, dynamo=True, input_names=['image'], output_names=list(outputs), verbose=False
        ).model_proto
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f'the ONNX exporter of torch {torch.__version__} cannot write this segmentor: take a newer torch '
            '(2.14 can), or write a .pt2'
        ) from error
    # The exporter itself folds small constants only, and NNCF does not read a Cast of a constant.
    model = import_onnx('onnxscript.optimizer').optimize(
        model, input_size_limit=_LARGEST_CONSTANT, output_size_limit=_LARGEST_CONSTANT
    )
    if foreign := foreign_operators(model):
        raise UserError(
            f'this segmentor needs the ONNX operator {foreign[0]}, which is not run from a file: write a .pt2'
        )
    for part in (model.graph, *model.graph.node, *model.functions):
        part.ClearField('doc_string')
        part.ClearField('metadata_props')  # source lines with local paths
    return model


def _write_onnx(model, contract: Contract, path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    onnx = import_onnx('onnx')
    versions = _versions() | {'onnx': onnx.__version__}
    if contract.precision == 'int8':
        versions['nncf'] = import_onnx('nncf').__version__
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, contract.metadata(versions))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return OnnxModel(path, contract.runtime).outputs


def _write_int8(model_proto, contract: Contract, path: Path, model: EncoderDecoder, parameters: set[str],
                calibration: Calibration) -> Verification:  # fmt: skip
    """Quantise an ONNX model, write it, and compare it with the segmentor."""
    batches = (real_image(image, contract).astype(contract.dtype) for image in calibration.images)
    quantized = quantize(model_proto, parameters, batches)
    run = _write_onnx(quantized, contract, path)

    def both_labels(image: str) -> tuple[Tensor, Tensor]:
        pixels = real_image(image, contract)
        maps = mmseg_logits(model, pixels), torch.from_numpy(run(pixels)[0])
        if contract.threshold is not None:
            maps = [x if x.ndim == 3 else two_logits(x, contract.threshold) for x in maps]
        if not maps[1].isfinite().all():
            raise UserError('the quantised segmentor returns numbers that are not finite: nothing is written')
        expected, result = (x if x.ndim == 3 else x.argmax(1) for x in maps)
        return expected[0], result[0].long()

    head = heads_of(model)[-1]
    found = compare(both_labels, calibration, len(contract.classes.names), head.ignore_index)
    _write_onnx(quantized, dataclasses.replace(contract, quantization=dataclasses.asdict(found)), path)
    return Verification(contract.shape, found.compared, None, found.differing, contract.precision, found)


def _name_sizes(model, contract: Contract) -> None:
    """Name the dynamic dimensions batch, height and width; the exporter numbers them."""
    if contract.shape is None:
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            for dim, name in ((dims[0], 'batch'), (dims[-2], 'height'), (dims[-1], 'width')):
                dim.dim_param = name
        del model.graph.value_info[:]


def _compare(run: Callable[[np.ndarray], list[np.ndarray]], model: EncoderDecoder, pictures: Sequence[np.ndarray],
             contract: Contract) -> Verification:  # fmt: skip
    tolerance = TOLERANCES[contract.precision]
    worst, worst_confidence, differing, pixels = 0.0, 0.0, 0, 0
    for images in pictures:
        logits, (result, *confidence) = mmseg_logits(model, images), map(torch.from_numpy, run(images))
        expected = logits
        if contract.threshold is not None:  # two classes, the first at the threshold
            expected = two_logits(logits, contract.threshold)
            result = result if contract.labels else two_logits(result, contract.threshold)
        largest = expected.abs().max()
        labels = result.long() if contract.labels else result.argmax(1)
        missed = expected.amax(1) - expected.gather(1, labels[:, None])[:, 0]
        # Two logits that each deviate by the tolerance can swap if they differ by less than twice that.
        error = missed.max() / 2 if contract.labels else (result - expected).abs().max()
        worst = float(np.maximum(worst, (error / largest).item()))  # Python's max drops NaN
        differing += (missed > 0).sum().item()
        pixels += labels.numel()
        for found in confidence:
            probabilities = _two(logits).div(contract.temperature).softmax(1)
            deviation = (found - probabilities.gather(1, labels[:, None])[:, 0]).abs().max()
            # A probability changes by at most half as much as a difference of logits.
            worst = float(np.maximum(worst, (deviation * contract.temperature / largest).item()))
            worst_confidence = max(worst_confidence, deviation.item())
        if not np.isfinite(worst):
            raise UserError(
                f'the exported segmentor returns numbers that are not finite, on an image of {images.shape[3]}×'
                f'{images.shape[2]}: nothing is written{"; they overflow in fp16" * (contract.precision == "fp16")}'
            )
        if not worst <= tolerance:
            raise UserError(
                f'the exported segmentor deviates by {worst:.1e} of the largest logit, more than {tolerance:.0e}, '
                f'on an image of {images.shape[3]}×{images.shape[2]}: nothing is written'
            )
    return Verification(
        contract.shape, sum(map(len, pictures)), worst, differing / pixels, contract.precision,
        confidence_error=worst_confidence if contract.confidence else None,
    )  # fmt: skip


def _two(logits: Tensor) -> Tensor:
    """Return logits whose softmax has a probability for each class: of a single logit, those of 0 and itself."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


@torch.no_grad()
def mmseg_logits(model: EncoderDecoder, images: np.ndarray) -> Tensor:
    """Return the logits of the segmentor as it was trained, by mmseg's own preprocessing and up-sampling.

    Args:
        model: The segmentor.
        images: (N, C, H, W) uint8; RGB, if they have 3 channels.

    Returns:
        (N, classes, H, W), on the CPU.

    Raises:
        UserError: They are not finite.
    """
    stored = torch.from_numpy(images)
    bgr = stored.flip(1) if images.shape[1] == 3 else stored
    inputs = model.data_preprocessor(dict(inputs=list(bgr)), False)['inputs']
    logits = model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])] * len(inputs)).cpu()
    if not logits.isfinite().all():
        raise UserError('the segmentor returns logits that are not finite numbers: train it again')
    return logits
