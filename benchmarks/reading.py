"""Measure how fast tools/check_dataset.py decodes images: the figures of docs/data.md.

The images are made on the spot, 512×683 JPEGs of smoothed noise that take as many bytes as photographs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from noise import noise_image

from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.data.read_pairs import pair_reader, read_pair
from mmseg_inceptionnext.images import read_image
from mmseg_inceptionnext.measure.speed import interleave


def paint(path: Path, seed: int) -> None:
    noise_image(np.random.default_rng(seed), 512, 683).save(path, quality=90)


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
