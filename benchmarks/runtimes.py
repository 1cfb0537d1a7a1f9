"""Measure a UperNet on the CPU in PyTorch, ONNX Runtime and OpenVINO, in fp32, bf16 and int8, against the stock model.

InceptionNeXt-T and random weights, from an image of uint8 to its label map: the table of docs/speed.md. "Stock" is what
mmseg's users build without this project: its UPerHead and preprocessing on timm's backbone, and torch.onnx's export of
that. The contestants are measured in turn, each PyTorch model and each runtime in a process of its own; ratios are
taken round by round.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmseg.structures import SegDataSample
from PIL import Image

from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.config import find_config, read_config
from mmseg_inceptionnext.device import device_name
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.export.quantize import calibration_of_folder, quantize
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.inference.runtimes import RUNTIMES
from mmseg_inceptionnext.measure.speed import interleave
from mmseg_inceptionnext.models.build import build_segmentor

STOCK = Path(__file__).parent / 'stock_upernet_t.py'
OURS = find_config('upernet/inceptionnext_t')
# Names of the contestants: whose, where, in what.
TORCH = [(whose, 'PyTorch', precision) for precision in ('fp32', 'bf16') for whose in ('stock', 'ours')]
FILES = [
    (whose, runtime, precision)
    for runtime, precisions in (('onnxruntime', ('fp32', 'int8')), ('openvino', ('fp32', 'bf16', 'int8')))
    for precision in precisions
    for whose in ('stock', 'ours')
]

steps: dict[tuple, Callable] = {}  # of this process


def segmentor(config: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_segmentor(read_config(config)).eval().requires_grad_(False)


def start_torch(whose: str, precision: str, image: np.ndarray) -> None:
    model = segmentor(STOCK if whose == 'stock' else OURS)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=whose == 'stock' and precision == 'bf16')
    if whose == 'ours':
        model = optimize_for_inference(model, precision=precision)
    elif precision == 'bf16':
        model.to(memory_format=torch.channels_last)
    inputs, shape = torch.from_numpy(image[0]), image.shape[2:]

    @torch.inference_mode()
    def step() -> None:
        sample = SegDataSample(metainfo=dict(ori_shape=shape, img_shape=shape))
        with autocast:
            model.test_step(dict(inputs=[inputs], data_samples=[sample]))

    steps[whose, 'PyTorch', precision] = step


def start_files(runtime: str, files: dict[tuple, Path], image: np.ndarray) -> None:
    for key, path in files.items():
        session = RUNTIMES[runtime](path.read_bytes(), key[2], torch.get_num_threads())
        steps[key] = partial(session.run, image)


def seconds(key: tuple) -> float:
    start = time.perf_counter()
    steps[key]()
    return time.perf_counter() - start


class StockGraph(torch.nn.Module):
    """The stock segmentor as a graph from pixels to labels, by mmseg's own modules."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        preprocessor = self.model.data_preprocessor
        x = (image.float() - preprocessor.mean) / preprocessor.std
        logits = self.model.decode_head.forward(self.model.backbone(x))
        return F.interpolate(logits, image.shape[2:], mode='bilinear').argmax(1)


def write_stock(folder: Path, image: np.ndarray) -> dict[str, Path]:
    """Export the stock segmentor, and quantise it by NNCF's defaults; return the file of each precision."""
    import onnx

    graph = StockGraph(segmentor(STOCK))
    program = torch.export.export(graph, (torch.from_numpy(image),))
    model = torch.onnx.export(program, dynamo=True, input_names=['image'], verbose=False).model_proto
    onnx.save(model, folder / 'stock.onnx')
    onnx.save(quantize(model, set(program.state_dict), [image] * 4), folder / 'stock_int8.onnx')
    plain = folder / 'stock.onnx'
    return {'fp32': plain, 'bf16': plain, 'int8': folder / 'stock_int8.onnx'}


def write_ours(folder: Path, image: np.ndarray) -> dict[tuple[str, str], Path]:
    """Export our segmentor for each runtime in each precision."""
    checkpoint, files = folder / 'model.pth', {}
    torch.save({'state_dict': segmentor(OURS).state_dict()}, checkpoint)
    for i in range(8):
        Image.fromarray(image[0].transpose(1, 2, 0)).save(folder / f'{i}.png')
    for whose, runtime, precision in FILES:
        if whose == 'ours':
            files[runtime, precision] = path = folder / f'{runtime}_{precision}.onnx'
            # Random weights have no labels to hold: the loss of int8 is measured on trained ones elsewhere.
            calibration = calibration_of_folder(folder, 4, max_drop=100) if precision == 'int8' else None
            export(OURS, checkpoint, path, image.shape[2:], labels=True, precision=precision, verify=1,
                   classes='ade20k', runtime=runtime, calibration=calibration)  # fmt: skip
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), default=(512, 512), help='(512 512)')
    parser.add_argument('--repeat', type=positive_int, default=7, metavar='N', help='rounds (7)')
    args = parser.parse_args()

    image = np.random.default_rng(0).integers(256, size=(1, 3, *args.shape), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        stock, ours = write_stock(Path(name), image), write_ours(Path(name), image)
        files = {key: stock[key[2]] if key[0] == 'stock' else ours[key[1:]] for key in FILES}
        context = multiprocessing.get_context('spawn')
        pools = {key: ProcessPoolExecutor(1, context, start_torch, (key[0], key[2], image)) for key in TORCH}
        for runtime in RUNTIMES:
            theirs = {key: path for key, path in files.items() if key[1] == runtime}
            pool = ProcessPoolExecutor(1, context, start_files, (runtime, theirs, image))
            pools |= dict.fromkeys(theirs, pool)
        runs = [lambda key=key: dict(seconds=pools[key].submit(seconds, key).result()) for key in pools]
        interleave(runs, 2)  # to warm up
        rounds = interleave(runs, args.repeat)
        for pool in pools.values():
            pool.shutdown()
    times = {key: [results[i]['seconds'] for results in rounds] for i, key in enumerate(pools)}
    cells = []
    for whose, runtime, precision in times:
        row = [whose, RUNTIMES[runtime].name if runtime in RUNTIMES else runtime, precision]
        found = times[whose, runtime, precision]
        row += [f'{statistics.median(found):.3f}', f'{min(found):.3f} – {max(found):.3f}']
        for rival in (TORCH[0], ('stock', runtime, precision)):
            ratios = [a / b for a, b in zip(times[rival], found, strict=True)]
            row.append(f'{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})')
        cells.append(row)
    print(markdown_table(['', 'runtime', 'precision', 's', 'spread', 'times stock fp32', 'times stock there'], cells))
    where = f'{torch.get_num_threads()} threads, {device_name("cpu")}, torch {torch.__version__}'
    print(f'{len(rounds)} rounds, {args.shape[0]}×{args.shape[1]}, {where}')


if __name__ == '__main__':
    run(main)
