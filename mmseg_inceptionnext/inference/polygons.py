"""Label maps as polygons, strip by strip: what is held are the polygons that reach the last row, not the label map.

A region with holes without number, as the ground between all trees, would be held like the map itself. So the points
that are held have a limit, at which the largest polygon ends: its region goes on as other polygons.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

_MOST_PIXELS = 2**19  # that are made polygons at once: rasterio holds all of a call in memory
_MOST_POINTS = 2**21  # of open polygons: some 80 MB


class Ring:
    """A closed line along the sides of pixels.

    Outer rings have a positive area in pixel coordinates (y points down), holes a negative one: the polygon is always
    at the same side.

    Attributes:
        points: (n, 2) int64: corners (x, y) of pixels, without the first at the end.
        top, bottom: The smallest and the largest y.
    """

    __slots__ = ('bottom', 'points', 'top')

    def __init__(self, points: np.ndarray):
        self.points, y = points, points[:, 1]
        self.top, self.bottom = int(y.min()), int(y.max())

    @property
    def area(self) -> int:
        """Its number of pixels, with a sign."""
        x, y = self.points.T
        return int(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) // 2

    def edges_at(self, y: int) -> np.ndarray:
        """Return where edges begin that lie on a line."""
        on_line = self.points[:, 1] == y
        return np.flatnonzero(on_line & np.concatenate([on_line[1:], on_line[:1]]))


@dataclass
class Polygon:
    """A region of pixels with the same label that hang together by their sides.

    Attributes:
        label: The label.
        rings: Rings that rows to come may change: those that reach the last row.
        finished: The other rings.
        is_part: Whether its region has other polygons, too: see :class:`Polygonizer`.
    """

    label: int
    rings: list[Ring]
    finished: list[Ring] = field(default_factory=list)
    is_part: bool = False

    @property
    def area(self) -> int:
        """Its number of pixels."""
        return sum(ring.area for ring in (*self.rings, *self.finished))

    @property
    def number_of_points(self) -> int:
        """Its number of points."""
        return sum(len(ring.points) for ring in (*self.rings, *self.finished))

    def ordered(self) -> list[np.ndarray]:
        """Return the points of all rings, those of the outer one first."""
        rings = sorted((*self.rings, *self.finished), key=lambda ring: -ring.area)
        return [ring.points for ring in rings]

    def finish(self, row: int) -> None:
        """Put rings that do not reach a row to the finished ones."""
        self.finished += [ring for ring in self.rings if ring.bottom < row]
        self.rings = [ring for ring in self.rings if ring.bottom >= row]


class Polygonizer:
    """Makes polygons of a label map that comes in strips of its full width, from the top.

    They are those of the whole map: pieces that meet at the border of two strips become one. But where those that may
    go on have more than 2**21 points, the largest ends at the row that was reached, and its region has several.

    Args:
        width: Width of the label map.
    """

    def __init__(self, width: int):
        self._width, self._row = width, 0
        self._open: list[Polygon] = []  # that reach the row before self._row
        self._ended = np.full(width, -1)  # labels of those that ended at that row although their regions may go on

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
        above, below, complete, self._open = self._open, [], [], []
        for shape, label in features.shapes(labels, mask=valid, transform=Affine.translation(0, top)):
            polygon = Polygon(int(label), _rings(shape))
            (below if any(ring.top == top for ring in polygon.rings) else complete).append(polygon)
        for polygon in (*self._joined(above, below, top), *complete):
            polygon.finish(self._row)
            if polygon.rings:
                self._open.append(polygon)
            else:
                yield polygon
        yield from self._end_largest()

    def _end_largest(self) -> Iterator[Polygon]:
        self._open.sort(key=lambda polygon: polygon.number_of_points)
        points, ended = sum(polygon.number_of_points for polygon in self._open), []
        while points > _MOST_POINTS:
            ended.append(self._open.pop())
            points -= ended[-1].number_of_points
            ended[-1].is_part = True
        at = self._at_line(ended, self._row, 0)
        self._ended = np.array([*(polygon.label for polygon in ended), -1])[at]
        yield from ended

    def _joined(self, above: list[Polygon], below: list[Polygon], y: int) -> Iterator[Polygon]:
        """Yield the polygons above and below a line, those with a common side on it as one."""
        polygons = [*above, *below]
        sides = [self._at_line(side, y, first) for side, first in ((above, 0), (below, len(above)))]
        label = np.array([polygon.label for polygon in polygons] or [0])
        for i in np.unique(sides[1][(sides[1] >= 0) & (label[sides[1]] == self._ended)]):
            polygons[i].is_part = True
        shared = (sides[0] >= 0) & (sides[1] >= 0)
        shared &= label[sides[0]] == label[sides[1]]
        groups = _Groups(len(polygons))
        for one, other in np.unique(np.stack(sides)[:, shared], axis=1).T:
            groups.join(one, other)
        members = defaultdict(list)
        for i, polygon in enumerate(polygons):
            members[groups.of(i)].append(polygon)
        for group in members.values():
            joined = max(group, key=lambda polygon: len(polygon.finished))
            if len(group) > 1:
                for polygon in group:
                    joined.is_part |= polygon.is_part
                    joined.finished += polygon.finished if polygon is not joined else []
                joined.rings = _without_line([ring for polygon in group for ring in polygon.rings], y, shared)
            yield joined

    def _at_line(self, polygons: list[Polygon], y: int, first: int) -> np.ndarray:
        """Return which polygon has a side on a line in each column, counted from ``first``; -1 for none."""
        found = np.full(self._width, -1)
        for i, polygon in enumerate(polygons, first):
            for ring in polygon.rings:
                if y in (ring.top, ring.bottom):
                    edges = ring.edges_at(y)
                    x = ring.points[:, 0]
                    for start, stop in zip(x[edges], x[(edges + 1) % len(x)], strict=True):
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
    rings = [Ring(np.array(points[:-1], np.int64)) for points in shape['coordinates']]
    return [ring if (ring.area > 0) == (i == 0) else Ring(ring.points[::-1]) for i, ring in enumerate(rings)]


def _without_line(rings: list[Ring], y: int, shared: np.ndarray) -> list[Ring]:
    """Return the rings of a polygon from those of its pieces above and below a line.

    Args:
        rings: Rings of the pieces.
        y: The line.
        shared: (width,) bool: columns in which pieces meet at the line.
    """
    kept, paths = [], []  # paths: what is left of rings without the common sides, each from and to a point on the line
    for ring in rings:
        edges = ring.edges_at(y) if y in (ring.top, ring.bottom) else ()
        if not len(edges):
            kept.append(ring)
            continue
        points = np.concatenate([ring.points[edges[0] + 1 :], ring.points[: edges[0] + 1]])  # its last edge is on y
        start = 0
        for edge in [*(edges[1:] - edges[0] - 1), len(points) - 1]:
            if edge > start:
                paths.append(points[start : edge + 1])
            start = edge + 1
            paths += _unshared(points[edge], points[start % len(points)], shared)
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
            rings += [Ring(_straight(points)) for points in _simple(np.concatenate(parts))]
    return rings


def _simple(points: np.ndarray) -> list[np.ndarray]:
    """Return a ring as rings that come to each point once.

    It comes to a point twice where two pixels of the polygon touch at a corner: outside and hole, or two holes, are
    apart there.
    """
    key = points[:, 1] * (points[:, 0].max() + 1) + points[:, 0]  # a number for each point
    _, index, counts = np.unique(key, return_inverse=True, return_counts=True)
    again = np.flatnonzero(counts[index] > 1)
    if not len(again):
        return [points]
    points, index, again = np.roll(points, -again[0], axis=0), np.roll(index, -again[0]), again - again[0]
    found, pieces = [], {}  # pieces: of the ring, by the point that each begins at, in their order
    for piece in np.split(np.arange(len(points)), again[1:]):
        if (point := index[piece[0]]) in pieces:
            loop = []
            while point in pieces:
                loop.append(pieces.popitem()[1])
            found.append(points[np.concatenate(loop[::-1])])
        pieces[point] = piece
    found.append(points[np.concatenate(list(pieces.values()))])
    return found


def _straight(points: np.ndarray) -> np.ndarray:
    """Return a ring without the points at which it goes straight on."""
    steps = np.sign(np.diff(points, axis=0, append=points[:1]))
    return points[(steps != np.concatenate([steps[-1:], steps[:-1]])).any(axis=1)]
