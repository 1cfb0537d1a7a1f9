"""Polygons of a label map that comes in strips: those of the whole map."""

import numpy as np
import pytest
from rasterio import features

from mmseg_inceptionnext.inference import polygons as module
from mmseg_inceptionnext.inference.polygons import Polygonizer


def polygons(labels, rows, valid=None) -> list:
    polygonizer, found = Polygonizer(labels.shape[1]), []
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        found += polygonizer.add(labels[part], None if valid is None else valid[part])
    return [*found, *polygonizer.close()]


def as_set(shapes) -> set:
    """Label and rings of each polygon, whatever they begin with and their direction."""
    return {(int(label), frozenset(frozenset(map(tuple, np.asarray(ring, int))) for ring in rings))
            for label, rings in shapes}  # fmt: skip


def blobs(seed: int, shape=(60, 70), classes=3) -> np.ndarray:
    """From noise to smooth: holes in holes, and pixels that touch at corners."""
    noise = np.random.default_rng(seed).normal(size=shape)
    for _ in range(seed % 3):
        noise = noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (2, 1), (0, 1))
    return np.digitize(noise / noise.std(), np.linspace(-1, 1, classes - 1)).astype(np.int16)


@pytest.mark.parametrize('rows', [1, 2, 7, 59])
@pytest.mark.parametrize('seed', range(6))
def test_they_are_those_of_the_whole_map(seed, rows):
    labels = blobs(seed)
    valid = np.random.default_rng(seed).random(labels.shape) < 0.97 if seed > 2 else None
    found = polygons(labels, rows, valid)
    expected = features.shapes(labels, mask=valid)
    assert as_set((p.label, p.ordered()) for p in found) == as_set(
        (label, [ring[:-1] for ring in shape['coordinates']]) for shape, label in expected
    )
    assert sum(p.area for p in found) == (labels.size if valid is None else valid.sum())


@pytest.mark.parametrize('rows', [1, 2, 3])
def test_drawn_again_they_give_the_map(rows):
    labels = blobs(0)
    shapes = []
    for polygon in polygons(labels, rows):
        outer, *holes = [[*map(tuple, ring.tolist()), tuple(ring[0].tolist())] for ring in polygon.ordered()]
        shapes.append((dict(type='Polygon', coordinates=[outer, *holes]), polygon.label))
    drawn = features.rasterize(shapes, labels.shape, fill=-1, dtype='int16')
    assert np.array_equal(drawn, labels)


def test_a_ring_that_closes_at_the_last_row_has_a_hole():
    labels = np.zeros((6, 6), np.int16)
    labels[1:5, 1:5] = 1
    labels[2:4, 2:4] = 2
    by_label = {p.label: p for p in polygons(labels, 1)}
    assert [len(by_label[label].ordered()) for label in (0, 1, 2)] == [2, 2, 1]
    assert [by_label[label].area for label in (0, 1, 2)] == [20, 12, 4]
    assert len(by_label[1].ordered()[0]) == 4  # a square: nothing is left of the borders of strips


@pytest.mark.parametrize('rows', [1, 7])
@pytest.mark.parametrize('seed', range(6))
def test_regions_of_many_points_come_in_parts(seed, rows, monkeypatch):
    monkeypatch.setattr(module, '_MOST_POINTS', 60)
    labels = blobs(seed, classes=2)
    valid = np.random.default_rng(seed).random(labels.shape) < 0.97 if seed > 2 else None
    regions = np.zeros(labels.shape, np.int32)  # a number for each
    expected = list(features.shapes(labels, mask=valid))
    features.rasterize(((shape, i) for i, (shape, _) in enumerate(expected, 1)), out=regions)
    drawn, parts = np.zeros(labels.shape, np.int32), [[] for _ in range(len(expected) + 1)]
    for number, polygon in enumerate(polygons(labels, rows, valid), 1):
        outer, *holes = [[*map(tuple, ring.tolist()), tuple(ring[0].tolist())] for ring in polygon.ordered()]
        shape = dict(type='Polygon', coordinates=[outer, *holes])
        own = features.rasterize([shape], labels.shape, dtype='uint8').astype(bool)
        assert own.sum() == polygon.area and not drawn[own].any()
        drawn[own] = number
        (region,) = np.unique(regions[own])  # never of two
        assert expected[region - 1][1] == polygon.label
        parts[region].append(polygon)
    assert np.array_equal(drawn > 0, regions > 0)
    assert any(len(of_region) > 1 for of_region in parts)
    for of_region in parts[1:]:
        assert all(polygon.is_part for polygon in of_region) if len(of_region) > 1 else True


def test_what_is_held_has_a_limit(monkeypatch):
    """A region from the top to the bottom, with 200 finished holes in each strip."""
    monkeypatch.setattr(module, '_MOST_POINTS', 2000)
    strip = np.zeros((8, 400), np.int16)
    strip[2:4, 1::2] = 1
    polygonizer, held = Polygonizer(400), []
    for _ in range(20):
        list(polygonizer.add(strip))
        held.append(sum(polygon.number_of_points for polygon in polygonizer._open))
    assert max(held) <= 2000
