"""Measure what a worker of the training data loader does in a second: the table of docs/gpu.md.

A recipe's pipeline on one thread, with mmseg's transforms and with ours, in turn. The images are made on the spot:
512×683 JPEGs of smoothed noise, and label maps of patches as PNGs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope
from noise import noise_image
from PIL import Image

from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.data.faster_transforms import use_faster_transforms
from mmseg_inceptionnext.data.pipeline import read_images_safely
from mmseg_inceptionnext.measure.speed import interleave

OURS_ALONE = ('SeedAugmentation', 'CheckAnnotation')


def paint(image_path: str, labels_path: str, seed: int) -> None:
    """Write smoothed noise, and large patches of 150 classes, some of them of small ones."""
    rng = np.random.default_rng(seed)
    noise_image(rng, 512, 683).save(image_path, quality=90)
    large, small, is_small = (
        cv2.resize(rng.integers(0, high, size, dtype=np.uint8), (683, 512), interpolation=cv2.INTER_NEAREST)
        for high, size in ((151, (8, 10)), (151, (40, 50)), (4, (8, 10)))
    )
    Image.fromarray(np.where(is_small == 0, small, large)).save(labels_path)


def pipelines(config: str) -> dict[str, Compose]:
    """Return the training pipeline as mmseg's users have it, with our checks, and as our runs have it."""
    found = {}
    for name in ('mmseg', 'ours, with the transforms of mmseg', 'ours'):
        dataset = read_config(config).train_dataloader.dataset
        if name == 'mmseg':
            dataset.pipeline = [step for step in dataset.pipeline if step.type not in OURS_ALONE]
        else:
            read_images_safely(dataset)
        if name == 'ours':
            use_faster_transforms(dataset)
        found[name] = Compose(dataset.pipeline)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default='upernet/inceptionnext_t', help='recipe (upernet/inceptionnext_t)')
    parser.add_argument('--images', metavar='N', type=positive_int, default=100, help='samples a round (100)')
    parser.add_argument('--repeat', metavar='N', type=positive_int, default=7, help='rounds (7)')
    args = parser.parse_args()

    init_default_scope('mmseg')
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as the recipes' env_cfg
    ways = pipelines(args.config)
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for i in range(args.images):
            image, labels = (str(Path(folder, f'{i}.{suffix}')) for suffix in ('jpg', 'png'))
            paint(image, labels, i)
            samples.append(dict(img_path=image, seg_map_path=labels, label_map=None, reduce_zero_label=True,
                                seg_fields=[], sample_idx=i))  # fmt: skip

        def seconds(pipeline: Compose) -> float:
            np.random.seed(0)
            start = time.perf_counter()
            for sample in samples:
                pipeline(dict(sample, seg_fields=[]))
            return time.perf_counter() - start

        steps = [lambda pipeline=pipeline: seconds(pipeline) for pipeline in ways.values()]
        interleave(steps, 1)
        rounds = interleave(steps, args.repeat)
    cells = []
    for i, name in enumerate(ways):
        rates = [args.images / results[i] for results in rounds]
        ratios = [results[0] / results[i] for results in rounds]
        cells.append([name, f'{statistics.median(rates):.0f}', f'{min(rates):.0f} – {max(rates):.0f}',
                      f'{statistics.median(ratios):.2f}', f'{min(ratios):.2f} – {max(ratios):.2f}'])  # fmt: skip
    print(markdown_table(['pipeline', 'samples/s', 'spread', 'ratio to the first', 'spread'], cells))


if __name__ == '__main__':
    run(main)
