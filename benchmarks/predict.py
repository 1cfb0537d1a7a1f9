"""Measure tools/predict.py on many images against the network alone: what decoding, drawing and writing cost.

The images are 480×360 JPEGs of smoothed noise, of the size of CamVid's frames, predicted into a temporary folder. Both
ways take all images in each round, in turn.

python benchmarks/predict.py CONFIG CHECKPOINT --batch-size auto
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from noise import noise_image

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.command_line import positive_int, run
from mmseg_inceptionnext.inference.predict import choose_batch_size, predict
from mmseg_inceptionnext.inference.sources import Output, find_sources

SIZE = (360, 480)


def paint(path: Path, seed: int) -> None:
    octaves = ((1, 9), (4, 20), (16, 30), (64, 60))
    noise_image(np.random.default_rng(seed), *SIZE, octaves).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', metavar='N', type=positive_int, default=500, help='number of images (500)')
    parser.add_argument('--batch-size', metavar='N|auto', default='auto', help='images at once (auto)')
    parser.add_argument('--repeat', metavar='N', type=positive_int, default=5, help='rounds (5)')
    parser.add_argument('--threads', metavar='N', type=positive_int, default=2, help='threads of the network (2)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--labels', action='store_true', help='write label maps, too')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    segmentor = Segmentor(args.config, args.checkpoint, device='cpu', precision=args.precision)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / 'in').mkdir()
        for i in range(args.images):
            paint(folder / 'in' / f'{i}.jpg', i)
        sources = find_sources([str(folder / 'in')], folder / 'out')
        batch = choose_batch_size(segmentor, sources) if args.batch_size == 'auto' else int(args.batch_size)
        prepared = [segmentor.prepare(segmentor.read(source.path)) for source in sources[: 8 * batch]]

        def network() -> None:
            for start in range(0, args.images, batch):
                first = start % len(prepared)
                segmentor.predict(prepared[first : first + min(batch, args.images - start)], batch, False)

        def whole() -> None:
            shutil.rmtree(folder / 'out', ignore_errors=True)
            output = Output(folder / 'out', labels=args.labels)
            assert not predict(segmentor, sources, output, batch)

        network()  # sets up kernels and memory
        rounds = [(seconds(network), seconds(whole)) for _ in range(args.repeat)]
    print(f'{args.images} images of {SIZE[1]}×{SIZE[0]}, batch size {batch}, {args.threads} threads, {args.precision}')
    for name, index in (('network alone', 0), ('predict', 1)):
        rates = [args.images / each[index] for each in rounds]
        print(f'{name}: {statistics.median(rates):.2f} images/s ({min(rates):.2f} – {max(rates):.2f})')
    shares = [alone / both for alone, both in rounds]
    print(f'share: {statistics.median(shares):.1%} ({min(shares):.1%} – {max(shares):.1%})')


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == '__main__':
    run(main)
