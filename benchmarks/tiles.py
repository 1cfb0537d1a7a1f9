"""Measure the prediction of large GeoTIFFs in tiles: megapixels a second and peak memory, the table of docs/predict.md.

The images are made on the spot, the weights are random. Each image is predicted in a process of its own.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import rasterio
import torch
from rasterio.windows import Window

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.config_files import heads
from mmseg_inceptionnext.device import peak_memory_mb
from mmseg_inceptionnext.inference.geotiff import segment_raster
from mmseg_inceptionnext.models.build import build_segmentor


def paint(path: Path, side: int, bands: int = 3) -> None:
    """Write a square GeoTIFF of smooth noise, in strips."""
    noise = np.random.default_rng(0).normal(size=(1024, 1024, bands)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 6, borderType=cv2.BORDER_REFLECT)
    noise = (128 + 60 * noise / noise.std()).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    transform = rasterio.Affine(0.2, 0, 500000, 0, -0.2, 5400000)
    with rasterio.open(
        path, 'w', driver='GTiff', width=side, height=side, count=bands, dtype='uint8', crs='EPSG:32633',
        transform=transform, tiled=True, blockxsize=512, blockysize=512, compress='deflate', zlevel=1,
    ) as file:  # fmt: skip
        for i, top in enumerate(range(0, side, 512)):
            rows = np.roll(noise, 37 * i, axis=2)[:, :512]
            rows = np.tile(rows, (1, 1, -(-side // 1024)))[..., :side]
            file.write(rows[:, : side - top], window=Window(0, top, side, min(512, side - top)))


def save_random(config: str, classes: int, folder: Path) -> None:
    """Write a config with another number of classes, and a checkpoint of random weights."""
    cfg = read_config(config)
    for _, head in heads(cfg.model):
        head.num_classes = classes
    cfg.dump(folder / 'config.py')
    torch.manual_seed(0)
    model = build_segmentor(cfg)
    meta = dict(classes=[f'class {i}' for i in range(classes)], palette=[(i % 256, 80, 160) for i in range(classes)])
    torch.save(dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict()), folder / 'model.pth')


def measure(folder: Path, side: int, tile: int, overlap: int, batch_size: int) -> tuple[float, ...]:
    """Return seconds, and MiB at the peak before and after; of this process."""
    segmentor = Segmentor(folder / 'config.py', folder / 'model.pth', device='cpu', tile=tile, overlap=overlap)
    before, start = peak_memory_mb('cpu'), time.perf_counter()
    segment_raster(segmentor, folder / f'{side}.tif', folder / 'labels.tif', batch_size=batch_size)
    return time.perf_counter() - start, before, peak_memory_mb('cpu')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default='fpn/inceptionnext_t', help='config (fpn/inceptionnext_t)')
    parser.add_argument('--classes', metavar='N', type=positive_int, default=5, help='number of classes (5)')
    parser.add_argument(
        '--megapixels', metavar='N', nargs='+', type=positive_int, default=[1, 4, 25, 100, 400], help='sizes of images'
    )
    parser.add_argument('--tile', metavar='N', type=positive_int, default=1024, help='side of the tiles (1024)')
    parser.add_argument('--overlap', metavar='N', type=positive_int, default=128, help='pixels that tiles share (128)')
    parser.add_argument('--batch-size', metavar='N', type=positive_int, default=1, help='tiles at once (1)')
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_random(args.config, args.classes, folder)
        for megapixels in args.megapixels:
            side = round(1000 * megapixels**0.5)
            paint(folder / f'{side}.tif', side)
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                arguments = folder, side, args.tile, args.overlap, args.batch_size
                seconds, before, peak = pool.apply(measure, arguments)
            speed = side**2 / 1e6 / seconds
            rows.append([f'{side}×{side}', f'{seconds:.1f}', f'{speed:.2f}', f'{before:.0f}', f'{peak:.0f}'])
    print(markdown_table(['pixels', 's', 'megapixels/s', 'MiB before', 'MiB at the peak'], rows))


if __name__ == '__main__':
    run(main)
