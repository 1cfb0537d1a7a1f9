"""A data set of ten classes of textures, which a linear classifier of pixels cannot tell apart."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

NAMES = ('blobs', 'checks', 'diagonals', 'discs', 'grids', 'noise', 'rays', 'rings', 'rows', 'stripes')


def make_textures(root: Path, train: int, val: int, size: int = 64) -> Path:
    """Write ``root/train`` and ``root/val`` with some images a class; phase, period and polarity are random."""
    random = np.random.default_rng(0)
    for split, number in (('train', train), ('val', val)):
        for name in NAMES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                colours = [random.integers(low, low + 64, size=3) for low in (0, 192)]
                pixels = np.where(_pattern(name, size, random)[..., None], *colours).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


def _pattern(name: str, size: int, random: np.random.Generator) -> np.ndarray:
    """Return a pattern, (size, size) bool, half of it True, and each pixel in half of all images."""
    period = random.uniform(8, 16)
    y, x = np.mgrid[:size, :size] / period + random.uniform(size=(2, 1, 1))
    dy, dx = (np.mgrid[:size, :size] - random.uniform(0, size, size=(2, 1, 1))) / period
    noise = random.normal(size=(size, size))
    pattern = {
        'blobs': cv2.GaussianBlur(noise, (0, 0), period / 5),
        'checks': np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y),
        'diagonals': np.sin(2 * np.pi * (x + random.choice([-1, 1]) * y)),
        'discs': (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2,
        'grids': np.minimum(x % 1, y % 1),
        'noise': noise,
        'rays': np.sin(8 * np.arctan2(dy, dx)),
        'rings': np.sin(2 * np.pi * np.hypot(dy, dx)),
        'rows': np.sin(2 * np.pi * y),
        'stripes': np.sin(2 * np.pi * x),
    }[name]
    return (pattern > np.median(pattern)) ^ bool(random.integers(2))
