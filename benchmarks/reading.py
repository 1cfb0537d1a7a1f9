"""Measure how fast tools/check_dataset.py decodes images: the figures of docs/data.md.

The images are made on the spot, 512×683 JPEGs of smoothed noise that take as many bytes as photographs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.data.read_pairs import pair_reader, read_pair
from mmseg_inceptionnext.images import read_image
from mmseg_inceptionnext.measure.speed import interleave


def paint(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.full((512, 683, 3), 120, np.float32)
    for sigma, amplitude in ((1, 9), (2, 14), (5, 20), (16, 30), (64, 60)):
        noise = cv2.GaussianBlur(rng.normal(0, 1, image.shape).astype(np.float32), (0, 0), sigma)
        image += amplitude * noise / noise.std()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', metavar='N', type=positive_int, default=200, help='each is read four times (200)')
    parser.add_argument('--workers', metavar='N', type=positive_int, default=2, help='processes (2)')
    parser.add_argument('--repeat', metavar='N', type=positive_int, default=7, help='rounds (7)')
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.images):
            paint(Path(folder, f'{i}.jpg'), i)
        files = 4 * sorted(map(str, Path(folder).iterdir()))
        with pair_reader(args.workers) as read:
            ways = {
                'read_image, one process': lambda: [read_image(file) for file in files],
                'read_pair, one process': lambda: [read_pair(file, None) for file in files],
                f'read_pair, {args.workers} processes': lambda: list(read([(file, None) for file in files])),
            }
            rounds = interleave([timed(way) for way in ways.values()], args.repeat)
    cells = []
    for i, name in enumerate(ways):
        per_image = statistics.median(1000 * results[i] / len(files) for results in rounds)
        ratios = [results[0] / results[i] for results in rounds]
        cells.append([name, f'{per_image:.2f}', f'{statistics.median(ratios):.2f}',
                      f'{min(ratios):.2f} – {max(ratios):.2f}'])  # fmt: skip
    print(markdown_table(['', 'ms an image', 'ratio to the first', 'spread'], cells))


def timed(step: Callable) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return measure


if __name__ == '__main__':
    run(main)
