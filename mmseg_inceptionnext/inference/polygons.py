"""Label maps as polygons, strip by strip: what is held are the polygons that reach the last row, not the label map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_MOST_PIXELS = 2**19  # that are made polygons at once: rasterio holds all of a call in memory

# (n, 2) int64: corners (x, y) of pixels, without the first at the end. Outer rings have a positive area in pixel
# coordinates (y points down), holes a negative one: the polygon is always at the same side.
Ring = np.ndarray


@dataclass
class Polygon:
    """A region of pixels with the same label that hang together by their sides.

    Attributes:
        label: The label.
        rings: The outer ring and the holes, in pixel coordinates.
    """

    label: int
    rings: list[Ring]

    @property
    def area(self) -> int:
        """Its number of pixels."""
        return sum(map(_area, self.rings))

    def ordered(self) -> list[Ring]:
        """Return its rings, the outer one first."""
        return sorted(self.rings, key=lambda ring: -_area(ring))


class Polygonizer:
    """Makes polygons of a label map that comes in strips of its full width, from the top.

    They are those of the whole map: pieces that meet at the border of two strips become one.

    Args:
        width: Width of the label map.
    """

    def __init__(self, width: int):
        self._width, self._row = width, 0
        self._open: list[Polygon] = []  # that reach the row before self._row

    def add(self, labels: np.ndarray, valid: np.ndarray | None = None) -> Iterator[Polygon]:
        """Take some rows, and yield the polygons that are complete now.

        Args:
            labels: (rows, width) int16.
            valid: (rows, width) bool: where pixels have a label; None for everywhere.
        """
        rows = max(_MOST_PIXELS // self._width, 1)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            yield from self._add(labels[part], None if valid is None else valid[part])

    def close(self) -> Iterator[Polygon]:
        """Yield the polygons that reach the last row."""
        yield from self._open
        self._open = []

    def _add(self, labels: np.ndarray, valid: np.ndarray | None) -> Iterator[Polygon]:
        from rasterio import Affine, features  # here: it comes with the extra [geo]

        top, self._row = self._row, self._row + len(labels)
        shapes = features.shapes(labels, mask=valid, transform=Affine.translation(0, top))
        pieces = [Polygon(int(label), _rings(shape)) for shape, label in shapes]
        complete, above, self._open = [], self._open, []
        for polygon in self._joined(above, pieces, top):
            reaches = any(ring[:, 1].max() == self._row for ring in polygon.rings)
            (self._open if reaches else complete).append(polygon)
        yield from complete

    def _joined(self, above: list[Polygon], below: list[Polygon], y: int) -> Iterator[Polygon]:
        """Yield the polygons above and below a line, those with a common side on it as one."""
        polygons = [*above, *below]
        sides = [self._at_line(side, y, first) for side, first in ((above, 0), (below, len(above)))]
        label = np.array([polygon.label for polygon in polygons] or [0])
        shared = (sides[0] >= 0) & (sides[1] >= 0)
        shared &= label[sides[0]] == label[sides[1]]
        groups = _Groups(len(polygons))
        for one, other in np.unique(np.stack(sides)[:, shared], axis=1).T:
            groups.join(one, other)
        members = defaultdict(list)
        for i, polygon in enumerate(polygons):
            members[groups.of(i)].append(polygon)
        for group in members.values():
            if len(group) == 1:
                yield group[0]
            else:
                rings = [ring for polygon in group for ring in polygon.rings]
                yield Polygon(group[0].label, _without_line(rings, y, shared))

    def _at_line(self, polygons: list[Polygon], y: int, first: int) -> np.ndarray:
        """Return which polygon has a side on a line in each column, counted from ``first``; -1 for none."""
        found = np.full(self._width, -1)
        for i, polygon in enumerate(polygons, first):
            for ring in polygon.rings:
                for start, stop in _edges_at(ring, y):
                    found[min(start, stop) : max(start, stop)] = i
        return found


class _Groups:
    """Disjoint sets of numbers."""

    def __init__(self, number: int):
        self._parent = list(range(number))

    def of(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        self._parent[self.of(one)] = self.of(other)


def _rings(shape: dict) -> list[Ring]:
    """Return the rings of a GeoJSON polygon of rasterio, directed."""
    rings = [np.array(ring[:-1]).round().astype(np.int64) for ring in shape['coordinates']]
    return [ring if (_area(ring) > 0) == (i == 0) else ring[::-1] for i, ring in enumerate(rings)]


def _area(ring: Ring) -> int:
    x, y = ring.T
    return int(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) // 2


def _edges_at(ring: Ring, y: int) -> np.ndarray:
    """Return the x of both ends of each edge that lies on a line, (n, 2)."""
    on_line = ring[:, 1] == y
    if not on_line.any():
        return np.empty((0, 2), np.int64)
    both = on_line & np.roll(on_line, -1)
    return np.stack([ring[:, 0], np.roll(ring[:, 0], -1)], axis=1)[both]


def _without_line(rings: list[Ring], y: int, shared: np.ndarray) -> list[Ring]:
    """Return the rings of a polygon from those of its pieces above and below a line.

    Args:
        rings: Rings of the pieces.
        y: The line.
        shared: (width,) bool: columns in which pieces meet at the line.
    """
    kept, paths = [], []  # paths: what is left of rings without the common sides, each from and to a point on the line
    for ring in rings:
        edges = (ring[:, 1] == y) & (np.roll(ring[:, 1], -1) == y)
        if not edges.any():
            kept.append(ring)
            continue
        ring = np.roll(ring, -(np.flatnonzero(edges)[0] + 1), axis=0)  # whose last edge is on the line
        edges = np.flatnonzero((ring[:, 1] == y) & (np.roll(ring[:, 1], -1) == y))
        start = 0
        for edge in edges:
            if edge > start:
                paths.append(ring[start : edge + 1])
            start = edge + 1
            paths += _unshared(ring[edge], ring[start % len(ring)], shared)
    return kept + _closed(paths)


def _unshared(start: np.ndarray, stop: np.ndarray, shared: np.ndarray) -> list[np.ndarray]:
    """Return the parts of an edge on the line whose columns are not shared, each as two points."""
    (x, y), step = start, 1 if stop[0] > start[0] else -1
    columns = np.arange(min(x, stop[0]), max(x, stop[0]))[::step]
    left = columns[~shared[columns]]
    runs = np.split(left, np.flatnonzero(np.diff(left) != step) + 1) if len(left) else []
    behind = step > 0  # a column's first corner in this direction is its left one
    return [np.array([(run[0] + (not behind), y), (run[-1] + behind, y)]) for run in runs]


def _closed(paths: list[np.ndarray]) -> list[Ring]:
    """Connect paths to rings."""
    by_start = defaultdict(list)
    for path in paths:
        by_start[path[0, 0]].append(path)
    rings = []
    for x in list(by_start):
        while by_start[x]:
            parts, at = [], x
            while not parts or at != x:
                path = by_start[at].pop()
                parts.append(path[:-1])
                at = path[-1, 0]
            rings += map(_straight, _simple(np.concatenate(parts)))
    return rings


def _simple(ring: Ring) -> list[Ring]:
    """Return a ring as rings that come to each point once.

    It comes to a point twice where two pixels of the polygon touch at a corner: outside and hole, or two holes, are
    apart there.
    """
    key = ring[:, 1] * (ring[:, 0].max() + 1) + ring[:, 0]  # a number for each point
    _, index, counts = np.unique(key, return_inverse=True, return_counts=True)
    again = np.flatnonzero(counts[index] > 1)
    if not len(again):
        return [ring]
    ring, index, again = np.roll(ring, -again[0], axis=0), np.roll(index, -again[0]), again - again[0]
    found, pieces = [], {}  # of the ring, by the point that each begins at, in their order
    for piece in np.split(np.arange(len(ring)), again[1:]):
        if (point := index[piece[0]]) in pieces:
            loop = []
            while point in pieces:
                loop.append(pieces.popitem()[1])
            found.append(ring[np.concatenate(loop[::-1])])
        pieces[point] = piece
    found.append(ring[np.concatenate(list(pieces.values()))])
    return found


def _straight(ring: Ring) -> Ring:
    """Return a ring without the points at which it goes straight on."""
    steps = np.sign(np.diff(ring, axis=0, append=ring[:1]))
    return ring[(steps != np.concatenate([steps[-1:], steps[:-1]])).any(axis=1)]
