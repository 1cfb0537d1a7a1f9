"""Images of noise for benchmarks: their JPEGs take about as many bytes as photographs."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

OCTAVES = ((1, 9), (2, 14), (5, 20), (16, 30), (64, 60))


def noise_image(
    rng: np.random.Generator, height: int, width: int, octaves: Sequence[tuple[float, float]] = OCTAVES
) -> Image.Image:
    """Return an image of noise, the sum of several that are smoothed by a sigma in pixels and have an amplitude."""
    image = np.full((height, width, 3), 120, np.float32)
    for sigma, amplitude in octaves:
        noise = cv2.GaussianBlur(rng.normal(0, 1, image.shape).astype(np.float32), (0, 0), sigma)
        image += amplitude * noise / noise.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))
