"""Measure exported files under ONNX Runtime against mmseg's eager model: the table of docs/speed.md.

InceptionNeXt-T with UperNet and random weights, from an image of uint8 to its label map. The contestants are measured
in turn, each in a process of its own; ratios are taken round by round.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from mmseg.structures import SegDataSample

from mmseg_inceptionnext.command_line import markdown_table, run
from mmseg_inceptionnext.config import find_config, read_config
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.inference.onnx_model import OnnxModel
from mmseg_inceptionnext.measure.speed import interleave
from mmseg_inceptionnext.models.build import build_segmentor

STOCK = Path(__file__).parent / 'stock_upernet_t.py'
OURS = find_config('upernet/inceptionnext_t')
FILES = {
    '.onnx, --labels': dict(labels=True),
    '.onnx, --labels --dynamic': dict(labels=True, dynamic=True),
    '.onnx, --logits': dict(),
}

step: Callable  # of this process


def segmentor(config: Path) -> torch.nn.Module:
    return build_segmentor(read_config(config)).eval()


def start_torch(config: Path, fast: bool, image: np.ndarray) -> None:
    global step
    model = segmentor(config)
    model = optimize_for_inference(model) if fast else model
    inputs, shape = torch.from_numpy(image[0]), image.shape[2:]

    @torch.inference_mode()
    def step() -> None:
        sample = SegDataSample(metainfo=dict(ori_shape=shape, img_shape=shape))
        model.test_step(dict(inputs=[inputs], data_samples=[sample]))


def start_onnx(path: Path, image: np.ndarray) -> None:
    global step
    model = OnnxModel(path)

    def step() -> None:
        model.run(image)


def seconds() -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), default=(512, 512), help='(512 512)')
    parser.add_argument('--repeat', type=int, default=7, metavar='N', help='rounds (7)')
    args = parser.parse_args()

    image = np.random.default_rng(0).integers(256, size=(1, 3, *args.shape), dtype=np.uint8)
    contestants = {
        'mmseg + timm, PyTorch': (start_torch, (STOCK, False, image)),
        'ours, PyTorch': (start_torch, (OURS, True, image)),
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, 'model.pth')
        torch.save({'state_dict': segmentor(OURS).state_dict()}, checkpoint)
        for name, options in FILES.items():
            path = Path(folder, f'{len(contestants)}.onnx')
            export(OURS, checkpoint, path, tuple(args.shape), verify=1, classes='ade20k', **options)
            contestants[name] = (start_onnx, (path, image))
        context = multiprocessing.get_context('spawn')
        pools = [ProcessPoolExecutor(1, context, *contestant) for contestant in contestants.values()]
        runs = [lambda pool=pool: dict(seconds=pool.submit(seconds).result()) for pool in pools]
        interleave(runs, 2)  # to warm up
        rounds = interleave(runs, args.repeat)
        for pool in pools:
            pool.shutdown()
    cells = []
    for i, name in enumerate(contestants):
        rates = [1 / results[i]['seconds'] for results in rounds]
        ratios = [results[0]['seconds'] / results[i]['seconds'] for results in rounds]
        cells.append([
            name, f'{statistics.median(rates):.3f}', f'{min(rates):.3f}', f'{max(rates):.3f}',
            f'{statistics.median(ratios):.2f}', f'{min(ratios):.2f} – {max(ratios):.2f}',
        ])  # fmt: skip
    print(markdown_table(['', 'images/s', 'min', 'max', 'ratio to the first', 'spread'], cells))
    print(f'{len(rounds)} rounds, {args.shape[0]}×{args.shape[1]}, {torch.get_num_threads()} threads')


if __name__ == '__main__':
    run(main)
