"""Make a data set to try everything on: procedural scenes in the layout and label coding of ADEChallengeData2016.

Four kinds of scene (street, coast, countryside, room) are painted back to front with some fifty of ADE20K's classes.
Colours overlap between classes and light varies between images, so that texture, shape and place have to be learnt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from mmseg.datasets import ADE20KDataset
from PIL import Image

from mmseg_inceptionnext.errors import UserError

# In an annotation file 0 is unlabelled and k is the k-th class.
LABEL_OF = {name.strip(): i + 1 for i, name in enumerate(ADE20KDataset.METAINFO['classes'])}
UNLABELLED = 0

_SUPERSAMPLING = 2  # images are painted larger and averaged down, for edges like a camera's


def make_mini_ade20k(out: str | Path, train: int = 64, val: int = 16, size: int = 256, seed: int = 0) -> None:
    """Write ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png`` under ``out``.

    Args:
        out: Path of a folder that does not exist yet, or is empty.
        train, val: Number of image pairs of each split, above 0. A pair depends on the seed, the split and its
            number only: a larger data set starts with the smaller one.
        size: Height and width in pixels, at least 64.
        seed: Seed of the scenes.

    Raises:
        UserError: ``out`` is not empty or cannot be written, or a number is out of range.
    """
    out = Path(out)
    if min(train, val) < 1 or size < 64 or seed < 0:
        raise UserError(
            f'train={train} and val={val} must be at least 1, size={size} at least 64, seed={seed} 0 or more'
        )
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f'{out.absolute()} is not empty: choose another folder, or remove it first')
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as partial:
            for split, (name, number) in enumerate((('training', train), ('validation', val))):
                _write_split(Path(partial), name, number, size, (seed, split))
            if out.exists():
                out.rmdir()
            Path(partial).chmod(0o755)
            Path(partial).rename(out)
            Path(partial).mkdir()  # for TemporaryDirectory to remove
    except OSError as error:
        raise UserError(f'cannot write {out.absolute()}: {error.strerror}') from error


def paint_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint one scene.

    Returns:
        The image, (size, size, 3) uint8 RGB, and its label map, (size, size) uint8 with 0 for unlabelled pixels and
        the values of ``LABEL_OF``.
    """
    canvas = Canvas(rng, size * _SUPERSAMPLING)
    scene = _SCENES[rng.integers(len(_SCENES))]
    scene(canvas)
    if rng.random() < 0.6:
        canvas.clutter()
    return canvas.finish(size)


def _write_split(root: Path, name: str, number: int, size: int, seed: tuple[int, int]) -> None:
    images, annotations = root / 'images' / name, root / 'annotations' / name
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    short = {'training': 'train', 'validation': 'val'}[name]
    for i in range(1, number + 1):
        image, labels = paint_scene(np.random.default_rng((*seed, i)), size)
        stem = f'ADE_{short}_{i:08d}'
        Image.fromarray(image).save(images / f'{stem}.jpg', quality=92)
        Image.fromarray(labels).save(annotations / f'{stem}.png')


class Canvas:
    """An image and its label map, painted over and over. Coordinates are fractions of the side, y downwards."""

    def __init__(self, rng: np.random.Generator, side: int):
        self.rng, self.side = rng, side
        self.image = np.zeros((side, side, 3), np.float32)
        self.labels = np.full((side, side), UNLABELLED, np.uint8)
        self.grain = rng.normal(0, 4, (side, side)).astype(np.float32)
        self.y, self.x = np.mgrid[0:side, 0:side].astype(np.float32) / side

    # Shapes: boolean masks of the canvas's size.

    def polygon(self, *points: tuple[float, float]) -> np.ndarray:
        mask = np.zeros((self.side, self.side), np.uint8)
        cv2.fillPoly(mask, [np.round(np.array(points) * self.side).astype(np.int32)], 1)
        return mask.astype(bool)

    def box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray:
        return (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 < 1

    def blob(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """Return an ellipse with a ragged edge."""
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 + 0.7 * self.noise(rx / 3) < 1

    def below(self, level: float, roughness: float = 0.0, cell: float = 0.3) -> np.ndarray:
        """Return everything under a line, straight or rolling."""
        return self.y > level + roughness * self.noise(cell)[:1]

    # Fields: float arrays that broadcast to the image.

    def noise(self, cell: float) -> np.ndarray:
        """Return smooth noise of about unit amplitude, with spots ``cell`` wide: (side, side)."""
        n = max(2, round(1 / cell)) + 1
        coarse = self.rng.standard_normal((n, n)).astype(np.float32)
        return cv2.resize(coarse, (self.side, self.side), interpolation=cv2.INTER_CUBIC)

    def stripes(self, across: np.ndarray, period: float) -> np.ndarray:
        """Return waves from -1 to 1 along ``across``, one of the coordinates."""
        return np.sin(across * (2 * np.pi / period) + self.rng.uniform(0, 6.3))

    def colour(self, *rgb: float, spread: float = 28.0) -> np.ndarray:
        return np.asarray(rgb, np.float32) + self.rng.normal(0, spread, 3).astype(np.float32)

    def paint(self, mask: np.ndarray, name: str, colour: np.ndarray, texture: np.ndarray | float = 0.0) -> None:
        """Cover ``mask`` by a class: its colour, brightened by ``texture`` and by fine grain."""
        painted = colour + (texture + self.grain)[..., None]
        self.image[mask] = painted[mask]
        self.labels[mask] = LABEL_OF[name]

    # Things that several scenes have.

    def sky(self) -> None:
        top, low = self.colour(96, 140, 205), self.colour(195, 205, 220)
        clouds = np.clip(self.noise(0.3) + 0.4 * self.noise(0.1), 0, 1.5) * self.rng.uniform(0, 45)
        self.paint(self.box(0, 0, 1, 1), 'sky', top + (low - top) * self.y[..., None], clouds)

    def tree(self, x: float, ground: float, height: float) -> None:
        wide = height * self.rng.uniform(0.25, 0.4)
        trunk = self.box(x - height * 0.03, ground - height * 0.5, x + height * 0.03, ground)
        self.paint(trunk, 'tree', self.colour(92, 70, 52, spread=14))
        for _ in range(3):
            dx, dy = self.rng.normal(0, wide * 0.35, 2)
            leaves = self.blob(x + dx, ground - height * 0.66 + dy, wide * 0.8, height * 0.3)
            self.paint(leaves, 'tree', self.colour(62, 98, 52, spread=16), 22 * self.noise(0.015))

    def person(self, x: float, ground: float, height: float) -> None:
        w = height * 0.13
        legs = self.box(x - w, ground - height * 0.45, x - w * 0.15, ground)
        legs |= self.box(x + w * 0.15, ground - height * 0.45, x + w, ground)
        self.paint(legs, 'person', self.colour(60, 60, 80))
        body = self.ellipse(x, ground - height * 0.6, w * 1.25, height * 0.24)
        self.paint(body, 'person', self.colour(150, 90, 90, spread=55))
        self.paint(
            self.ellipse(x, ground - height * 0.9, w * 0.75, height * 0.1),
            'person',
            self.colour(190, 150, 125, spread=25),
        )

    def windows(self, left: float, top: float, right: float, bottom: float, columns: int, rows: int) -> np.ndarray:
        """Return a mask of panes in a regular grid."""
        u = (self.x - left) / (right - left) * columns % 1
        v = (self.y - top) / (bottom - top) * rows % 1
        return self.box(left, top, right, bottom) & (abs(u - 0.5) < 0.27) & (abs(v - 0.5) < 0.3)

    def building(self, left: float, right: float, top: float, ground: float, name: str = 'building') -> None:
        bricks = 7 * self.stripes(self.y, 0.012)
        self.paint(self.box(left, top, right, ground), name, self.colour(165, 140, 125, spread=38), bricks)
        columns = max(2, round((right - left) / 0.06))
        panes = self.windows(left, top, right, ground, columns, max(2, round((ground - top) / 0.09)))
        panes &= self.box(left, top, right, ground - 0.03)
        self.image[panes] = self.colour(75, 90, 110) + 12 * self.noise(0.05)[panes][:, None]

    def clutter(self) -> None:
        """Paint something unlabelled in front of everything."""
        x, y = self.rng.uniform(0.1, 0.9, 2)
        points = [(x + dx, y + dy) for dx, dy in self.rng.normal(0, 0.06, (5, 2))]
        mask = self.polygon(*points)
        self.image[mask] = self.colour(128, 128, 128, spread=60) + 30 * self.noise(0.02)[mask][:, None]
        self.labels[mask] = UNLABELLED

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Add light, shade and the camera's noise; return image and labels at the wanted size."""
        angle = self.rng.uniform(0, 2 * np.pi)
        light = 1 + 0.22 * ((self.x - 0.5) * np.cos(angle) + (self.y - 0.5) * np.sin(angle)) + 0.05 * self.noise(0.4)
        image = self.image * (light * self.rng.uniform(0.7, 1.15))[..., None] * self.rng.uniform(0.9, 1.1, 3)
        image = cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
        image += self.rng.normal(0, 5, image.shape)
        return image.clip(0, 255).astype(np.uint8), np.ascontiguousarray(
            self.labels[::_SUPERSAMPLING, ::_SUPERSAMPLING]
        )


def street(c: Canvas) -> None:
    rng, ground = c.rng, c.rng.uniform(0.52, 0.66)
    c.sky()
    if rng.random() < 0.5:
        left = rng.uniform(0, 0.8)
        c.building(left, left + rng.uniform(0.1, 0.18), rng.uniform(0.02, 0.12), ground, 'skyscraper')
    left = rng.uniform(-0.1, 0.0)
    while left < 1:
        right = left + rng.uniform(0.16, 0.34)
        if rng.random() < 0.85:
            c.building(left, right, rng.uniform(0.15, 0.42), ground)
        left = right + rng.choice([0.0, 0.04])
    c.paint(c.below(ground), 'sidewalk', c.colour(150, 148, 142, spread=16), 8 * c.stripes(c.x + c.y, 0.05))
    centre = rng.uniform(0.3, 0.7)
    left, right = centre - rng.uniform(0.55, 0.8), centre + rng.uniform(0.55, 0.8)
    road = c.polygon((centre - 0.14, ground + 0.02), (centre + 0.14, ground + 0.02), (right, 1.01), (left, 1.01))
    c.paint(road, 'road', c.colour(92, 92, 96, spread=14), 5 * c.noise(0.01))
    dashes = road & (abs(c.x - centre) < 0.012 * (c.y - ground + 0.05) / 0.2) & (c.stripes(c.y, 0.1) > 0)
    c.image[dashes] = 215
    for _ in range(rng.integers(0, 3)):
        c.tree(rng.uniform(0.02, 0.98), ground + rng.uniform(0.02, 0.08), rng.uniform(0.3, 0.5))
    if rng.random() < 0.5:
        x = rng.uniform(0.05, 0.95)
        c.paint(
            c.box(x - 0.006, ground - 0.42, x + 0.006, ground + 0.05), 'streetlight', c.colour(70, 72, 74, spread=10)
        )
        c.paint(c.ellipse(x, ground - 0.43, 0.035, 0.016), 'streetlight', c.colour(210, 205, 185, spread=10))
    for _ in range(rng.integers(1, 4)):
        car(c, rng.uniform(0.1, 0.9), rng.uniform(ground + 0.1, 0.92), rng.uniform(0.1, 0.2))
    for _ in range(rng.integers(0, 4)):
        y = rng.uniform(ground + 0.05, 0.95)
        c.person(rng.uniform(0.04, 0.96), y, 0.18 + 0.45 * (y - ground))


def car(c: Canvas, x: float, ground: float, length: float) -> None:
    paint = c.colour(140, 60, 60, spread=65)
    h = length * 0.32
    cabin = c.polygon(
        (x - length * 0.34, ground - h), (x - length * 0.2, ground - h * 1.9),
        (x + length * 0.2, ground - h * 1.9), (x + length * 0.36, ground - h),
    )  # fmt: skip
    c.paint(cabin, 'car', paint * 0.9)
    glass = c.polygon(
        (x - length * 0.27, ground - h), (x - length * 0.17, ground - h * 1.75),
        (x + length * 0.17, ground - h * 1.75), (x + length * 0.28, ground - h),
    )  # fmt: skip
    c.image[glass] = c.colour(60, 75, 90, spread=12)
    c.paint(c.box(x - length / 2, ground - h, x + length / 2, ground), 'car', paint, 20 * c.stripes(c.y, h * 2))
    for wheel in (x - length * 0.28, x + length * 0.28):
        c.paint(c.ellipse(wheel, ground, h * 0.4, h * 0.4), 'car', c.colour(28, 28, 30, spread=5))


def coast(c: Canvas) -> None:
    rng, horizon = c.rng, c.rng.uniform(0.35, 0.5)
    shore = horizon + rng.uniform(0.18, 0.32)
    c.sky()
    if rng.random() < 0.6:
        c.paint(c.below(horizon - 0.06, 0.05), 'mountain', c.colour(105, 115, 130), 10 * c.noise(0.03))
    nearness = np.sqrt(np.clip(c.y - horizon, 0, 1) + 0.01)  # waves widen towards the viewer
    waves = 16 * c.stripes(nearness + 0.02 * c.noise(0.1), 0.03)
    c.paint(c.below(horizon), 'sea', c.colour(70, 115, 145), waves)
    c.paint(c.below(shore, 0.02), 'sand', c.colour(200, 180, 140), 7 * c.noise(0.012))
    for _ in range(rng.integers(0, 3)):
        boat(c, rng.uniform(0.1, 0.9), rng.uniform(horizon + 0.03, shore - 0.05), rng.uniform(0.1, 0.2))
    for _ in range(rng.integers(0, 3)):
        x, y, r = rng.uniform(0.05, 0.95), rng.uniform(shore - 0.03, 0.95), rng.uniform(0.04, 0.1)
        c.paint(c.blob(x, y, r, r * 0.6), 'rock', c.colour(105, 98, 92, spread=18), 22 * c.noise(0.02))
    if rng.random() < 0.6:
        palm(c, rng.uniform(0.08, 0.92), rng.uniform(shore + 0.05, 0.92), rng.uniform(0.4, 0.6))
    for _ in range(rng.integers(0, 3)):
        c.person(rng.uniform(0.05, 0.95), rng.uniform(shore + 0.08, 0.96), rng.uniform(0.15, 0.25))


def boat(c: Canvas, x: float, water: float, length: float) -> None:
    hull = c.polygon(
        (x - length / 2, water - length * 0.18), (x + length / 2, water - length * 0.18),
        (x + length * 0.35, water + length * 0.08), (x - length * 0.35, water + length * 0.08),
    )  # fmt: skip
    sail = c.polygon((x, water - length), (x, water - length * 0.2), (x + length * 0.45, water - length * 0.25))
    c.paint(sail, 'boat', c.colour(225, 220, 210, spread=18), 5 * c.stripes(c.y, 0.03))
    c.paint(hull, 'boat', c.colour(120, 70, 60, spread=45))


def palm(c: Canvas, x: float, ground: float, height: float) -> None:
    lean = c.rng.uniform(-0.1, 0.1)
    top = (x + lean, ground - height)
    trunk = c.polygon((x - 0.012, ground), (x + 0.012, ground), (top[0] + 0.008, top[1]), (top[0] - 0.008, top[1]))
    c.paint(trunk, 'palm', c.colour(130, 105, 80, spread=12), 12 * c.stripes(c.y, 0.025))
    green = c.colour(70, 110, 55, spread=16)
    for angle in np.linspace(-0.4, 3.5, 7) + c.rng.normal(0, 0.1, 7):
        tip = (top[0] + 0.17 * np.cos(angle), top[1] - 0.12 * np.sin(angle) + 0.03)
        bend = (top[0] + 0.09 * np.cos(angle), top[1] - 0.1 * np.sin(angle) - 0.02)
        c.paint(c.polygon(top, bend, tip, (bend[0], bend[1] + 0.025)), 'palm', green, 14 * c.noise(0.01))


def countryside(c: Canvas) -> None:
    rng, horizon = c.rng, c.rng.uniform(0.4, 0.55)
    c.sky()
    peak, height = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.32)
    slope = c.polygon((peak - 0.5, horizon + 0.05), (peak, horizon - height), (peak + 0.55, horizon + 0.05))
    c.paint(slope, 'mountain', c.colour(110, 112, 125), 22 * c.noise(0.05) + 10 * c.noise(0.012))
    if rng.random() < 0.5:
        c.paint(c.below(horizon - 0.03, 0.03), 'hill', c.colour(105, 125, 85), 10 * c.noise(0.03))
    if rng.random() < 0.5:
        c.paint(c.below(horizon, 0.01), 'field', c.colour(160, 150, 85), 16 * c.stripes(c.x / (c.y + 0.1), 0.06))
        c.paint(c.below(horizon + 0.2, 0.03), 'grass', c.colour(95, 135, 65), 18 * c.noise(0.008))
    else:
        c.paint(c.below(horizon, 0.01), 'grass', c.colour(95, 135, 65), 18 * c.noise(0.008))
        if rng.random() < 0.5:
            c.paint(c.below(rng.uniform(0.75, 0.88), 0.04), 'earth', c.colour(135, 105, 78), 12 * c.noise(0.02))
    x = rng.uniform(0.2, 0.8)
    if rng.random() < 0.5:
        path = c.polygon((x, horizon + 0.02), (x + 0.03, horizon + 0.02), (x + 0.25, 1.01), (x - 0.1, 1.01))
        c.paint(path, 'path', c.colour(170, 150, 120, spread=16), 9 * c.noise(0.015))
    if rng.random() < 0.4:
        lake = c.blob(rng.uniform(0.2, 0.8), rng.uniform(horizon + 0.15, 0.8), rng.uniform(0.15, 0.25), 0.06)
        c.paint(lake, 'lake', c.colour(95, 125, 150, spread=16), 8 * c.stripes(c.y, 0.02))
    if rng.random() < 0.7:
        house(c, rng.uniform(0.15, 0.85), rng.uniform(horizon + 0.08, 0.75), rng.uniform(0.2, 0.32))
    for _ in range(rng.integers(1, 5)):
        ground = rng.uniform(horizon + 0.03, 0.85)
        c.tree(rng.uniform(0.02, 0.98), ground, 0.15 + 0.7 * (ground - horizon) + rng.uniform(0, 0.1))
    if rng.random() < 0.5:
        fence(c, rng.uniform(0.75, 0.95))
    for _ in range(rng.integers(0, 3)):
        animal(c, rng.uniform(0.1, 0.9), rng.uniform(horizon + 0.15, 0.92), rng.uniform(0.1, 0.18))


def house(c: Canvas, x: float, ground: float, width: float) -> None:
    top = ground - width * 0.6
    left, right = x - width / 2, x + width / 2
    c.paint(c.box(left, top, right, ground), 'house', c.colour(205, 185, 165), 8 * c.stripes(c.y, 0.02))
    roof = c.polygon((left - 0.03, top), (x, top - width * 0.4), (right + 0.03, top))
    c.paint(roof, 'house', c.colour(140, 70, 55), 12 * c.stripes(c.y, 0.015))
    pane = c.windows(left, top + width * 0.1, right, top + width * 0.35, 3, 1)
    c.paint(pane, 'windowpane', c.colour(90, 110, 135, spread=14))
    c.paint(c.box(x - width * 0.07, ground - width * 0.28, x + width * 0.07, ground), 'door', c.colour(95, 65, 45))


def fence(c: Canvas, ground: float) -> None:
    posts = c.box(0, ground - 0.1, 1, ground) & ((c.x / 0.06) % 1 < 0.3)
    rails = c.box(0, ground - 0.08, 1, ground - 0.065) | c.box(0, ground - 0.04, 1, ground - 0.025)
    c.paint(posts | rails, 'fence', c.colour(150, 125, 100), 6 * c.stripes(c.y, 0.03))


def animal(c: Canvas, x: float, ground: float, length: float) -> None:
    coat = c.colour(140, 105, 80, spread=40)
    for leg in np.linspace(-0.3, 0.3, 4):
        c.paint(
            c.box(x + leg * length - 0.006, ground - length * 0.4, x + leg * length + 0.006, ground), 'animal', coat
        )
    side = c.rng.choice([-1, 1])
    for part in (
        c.ellipse(x, ground - length * 0.5, length * 0.45, length * 0.22),
        c.ellipse(x + side * length * 0.5, ground - length * 0.7, length * 0.14, length * 0.12),
    ):
        c.paint(part, 'animal', coat, 25 * (c.noise(0.02) > 0.6))


def room(c: Canvas) -> None:
    rng = c.rng
    top, ground = rng.uniform(0.08, 0.16), rng.uniform(0.6, 0.72)
    c.paint(c.box(0, 0, 1, 1), 'wall', c.colour(200, 190, 170), rng.uniform(0, 8) * c.stripes(c.x, 0.07))
    c.paint(c.box(0, 0, 1, top), 'ceiling', c.colour(225, 222, 215, spread=14))
    c.paint(c.below(ground), 'floor', c.colour(150, 110, 75), 10 * c.stripes(c.x + 0.6 * (c.y - ground), 0.08))
    if rng.random() < 0.6:
        c.paint(
            c.ellipse(rng.uniform(0.3, 0.7), 0.88, 0.28, 0.08),
            'rug',
            c.colour(140, 70, 75, spread=45),
            14 * c.stripes(c.x, 0.03),
        )

    # Along the wall, one thing a place.
    places = rng.permutation([0.16, 0.5, 0.84])
    things: list[Callable] = [window, door, painting, cabinet, bookcase]
    for x, thing in zip(places, rng.permutation(len(things))[:3], strict=True):
        things[thing](c, x, top, ground)
    if rng.random() < 0.5:
        x = rng.uniform(0.2, 0.8)
        c.paint(c.box(x - 0.004, 0, x + 0.004, top + 0.06), 'chandelier', c.colour(80, 75, 60, spread=10))
        c.paint(c.ellipse(x, top + 0.08, 0.07, 0.035), 'chandelier', c.colour(235, 215, 150, spread=14))

    [bed, sofa, dining][rng.integers(3)](c, rng.uniform(0.35, 0.65), ground)
    if rng.random() < 0.6:
        lamp(c, rng.choice([0.08, 0.92]), rng.uniform(ground + 0.08, 0.9))
    if rng.random() < 0.4:
        c.person(rng.uniform(0.1, 0.9), rng.uniform(ground + 0.12, 0.97), rng.uniform(0.45, 0.6))


def window(c: Canvas, x: float, top: float, ground: float) -> None:
    upper, lower = top + 0.08, top + 0.34
    pane = c.box(x - 0.1, upper, x + 0.1, lower)
    c.paint(pane, 'windowpane', c.colour(175, 205, 230, spread=22), 18 * c.noise(0.1))
    bars = pane & ((abs(c.x - x) < 0.006) | (abs(c.y - (upper + lower) / 2) < 0.006))
    c.image[bars] = 235
    for side in (-1, 1):
        cloth = c.box(x + side * 0.11 - 0.035, upper - 0.03, x + side * 0.11 + 0.035, lower + 0.08)
        c.paint(cloth, 'curtain', c.colour(165, 120, 110, spread=45), 22 * c.stripes(c.x, 0.022))


def door(c: Canvas, x: float, top: float, ground: float) -> None:
    c.paint(c.box(x - 0.085, ground - 0.44, x + 0.085, ground), 'door', c.colour(130, 90, 60), 6 * c.stripes(c.x, 0.03))
    panels = c.windows(x - 0.085, ground - 0.44, x + 0.085, ground, 2, 2)
    c.image[panels] *= 0.85
    c.image[c.ellipse(x + 0.065, ground - 0.2, 0.01, 0.01)] = (205, 185, 90)


def painting(c: Canvas, x: float, top: float, ground: float) -> None:
    w, h, y = c.rng.uniform(0.07, 0.12), c.rng.uniform(0.06, 0.1), top + 0.2
    c.paint(c.box(x - w, y - h, x + w, y + h), 'painting', c.colour(110, 80, 45, spread=18))
    inside = c.box(x - w + 0.015, y - h + 0.015, x + w - 0.015, y + h - 0.015)
    art = np.stack([120 + 55 * c.noise(0.06) for _ in range(3)], axis=-1)
    c.image[inside] = art[inside]


def cabinet(c: Canvas, x: float, top: float, ground: float) -> None:
    upper = ground - 0.3
    c.paint(c.box(x - 0.13, upper, x + 0.13, ground + 0.03), 'cabinet', c.colour(125, 85, 58), 6 * c.stripes(c.x, 0.02))
    gaps = c.box(x - 0.13, upper, x + 0.13, ground + 0.03) & (
        (abs(c.x - x) < 0.004) | (abs(c.y - ground + 0.14) < 0.004)
    )
    c.image[gaps] *= 0.5
    for side in (-1, 1):
        c.image[c.ellipse(x + side * 0.02, ground - 0.17, 0.007, 0.007)] = (205, 190, 120)
    if c.rng.random() < 0.7:
        c.paint(
            c.box(x - 0.08, upper - 0.14, x + 0.08, upper - 0.01), 'television receiver', c.colour(35, 36, 42, spread=8)
        )


def bookcase(c: Canvas, x: float, top: float, ground: float) -> None:
    left, right, upper = x - 0.12, x + 0.12, top + 0.1
    c.paint(c.box(left, upper, right, ground + 0.02), 'bookcase', c.colour(110, 78, 52))
    shelf_height = (ground - upper) / 4
    spines = c.rng.uniform(40, 210, (80, 3)).astype(np.float32)[(c.x * 79).astype(int)]
    books = c.box(left + 0.012, upper, right - 0.012, ground) & ((c.y - upper) % shelf_height > 0.03)
    c.image[books] = spines[books]
    c.labels[books] = LABEL_OF['book']


def bed(c: Canvas, x: float, ground: float) -> None:
    left, right = x - 0.3, x + 0.3
    c.paint(c.box(left, ground - 0.14, left + 0.03, 0.88), 'bed', c.colour(95, 65, 45, spread=14))
    c.paint(c.box(left, ground + 0.02, right, 0.86), 'bed', c.colour(175, 160, 165, spread=38), 10 * c.noise(0.06))
    c.paint(c.ellipse(left + 0.11, ground + 0.02, 0.08, 0.045), 'pillow', c.colour(225, 222, 218, spread=14))
    c.paint(
        c.box(x, ground + 0.05, right, 0.86),
        'blanket',
        c.colour(120, 90, 120, spread=50),
        14 * c.stripes(c.x + c.y, 0.05),
    )


def sofa(c: Canvas, x: float, ground: float) -> None:
    fabric = c.colour(125, 110, 105, spread=42)
    c.paint(c.box(x - 0.28, ground - 0.06, x + 0.28, 0.78), 'sofa', fabric, 8 * c.noise(0.02))
    c.paint(c.box(x - 0.28, ground + 0.06, x + 0.28, 0.86), 'sofa', fabric * 0.85, 8 * c.noise(0.02))
    for side in (-1, 1):
        c.paint(c.box(x + side * 0.29 - 0.035, ground, x + side * 0.29 + 0.035, 0.87), 'sofa', fabric * 0.75)
        if c.rng.random() < 0.8:
            pillow = c.box(x + side * 0.17 - 0.055, ground - 0.02, x + side * 0.17 + 0.055, ground + 0.08)
            c.paint(pillow, 'cushion', c.colour(170, 110, 80, spread=55), 12 * c.stripes(c.x - c.y, 0.03))
    wood = c.colour(110, 75, 48, spread=16)
    c.paint(c.box(x - 0.14, 0.87, x + 0.14, 0.9), 'coffee table', wood)
    for leg in (-0.12, 0.11):
        c.paint(c.box(x + leg, 0.9, x + leg + 0.015, 0.98), 'coffee table', wood * 0.8)


def dining(c: Canvas, x: float, ground: float) -> None:
    for side in (-1, 1):
        seat = c.colour(115, 80, 55)
        left = x + side * 0.26 - 0.06
        c.paint(c.box(left, ground + 0.1, left + 0.12, ground + 0.13), 'chair', seat)
        back = left if side < 0 else left + 0.1
        c.paint(c.box(back, ground - 0.08, back + 0.02, ground + 0.1), 'chair', seat)
        for leg in (left, left + 0.105):
            c.paint(c.box(leg, ground + 0.13, leg + 0.015, ground + 0.27), 'chair', seat * 0.8)
    wood = c.colour(150, 105, 68)
    c.paint(c.box(x - 0.22, ground + 0.02, x + 0.22, ground + 0.06), 'table', wood, 8 * c.stripes(c.x, 0.05))
    for leg in (-0.2, 0.18):
        c.paint(c.box(x + leg, ground + 0.06, x + leg + 0.02, ground + 0.27), 'table', wood * 0.8)
    for dx in c.rng.uniform(-0.17, 0.17, c.rng.integers(1, 3)):
        c.paint(
            c.box(x + dx - 0.014, ground - 0.05, x + dx + 0.014, ground + 0.02),
            'vase',
            c.colour(90, 120, 140, spread=50),
        )
        c.paint(
            c.blob(x + dx, ground - 0.08, 0.04, 0.04), 'flower', c.colour(200, 90, 110, spread=50), 20 * c.noise(0.01)
        )


def lamp(c: Canvas, x: float, ground: float) -> None:
    c.paint(c.box(x - 0.007, ground - 0.42, x + 0.007, ground), 'lamp', c.colour(70, 65, 60, spread=10))
    shade = c.polygon(
        (x - 0.03, ground - 0.5), (x + 0.03, ground - 0.5), (x + 0.06, ground - 0.4), (x - 0.06, ground - 0.4)
    )
    c.paint(shade, 'lamp', c.colour(235, 215, 165, spread=18))


_SCENES: tuple[Callable[[Canvas], None], ...] = (street, coast, countryside, room)
