"""TIFFs in tiles: the labels of the whole image, where it lies, in files that others open; and what goes wrong."""

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import tifffile
import torch
from mmengine.config import Config
from PIL import Image
from rasterio import Affine, features
from rasterio.enums import ColorInterp
from support import ROOT, assert_user_error, save_segmentor

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.errors import UnreadableFile
from mmseg_inceptionnext.inference import geotiff
from mmseg_inceptionnext.inference.geotiff import Raster, segment_raster
from mmseg_inceptionnext.inference.predict import predict
from mmseg_inceptionnext.inference.sources import Output, find_sources
from mmseg_inceptionnext.models.build import build_segmentor

TRANSFORM = Affine(0.5, 0, 500000, 0, -0.5, 5400000)
SIZE = (150, 200)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> tuple[Path, Path]:
    return save_segmentor(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def tiled(files) -> Segmentor:
    return Segmentor(*files, device='cpu', tile=64, overlap=16)


def picture(size=SIZE, bands=3, seed=0) -> np.ndarray:
    """(bands, height, width) uint8: smooth, so that classes form areas."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, bands), np.uint8)
    planes = [np.asarray(Image.fromarray(noise[..., i]).resize(size[::-1])) for i in range(bands)]
    return np.stack(planes)


def write(path, values: np.ndarray, **options) -> Path:
    profile = dict(
        driver='GTiff', count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype,
        crs='EPSG:32633', transform=TRANSFORM, tiled=True, blockxsize=64, blockysize=64, compress='deflate',
    )  # fmt: skip
    colours = options.pop('colorinterp', None)
    with rasterio.open(path, 'w', **(profile | options)) as file:
        if colours:
            file.colorinterp = colours
        file.write(values)
    return Path(path)


def labels_of(path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def test_the_output_has_coordinates_coding_and_colours(tiled, tmp_path):
    path = write(tmp_path / 'a.tif', picture())
    segment_raster(tiled, path, tmp_path / 'out.tif', batch_size=3)
    expected = tiled(picture().transpose(1, 2, 0))
    with rasterio.open(tmp_path / 'out.tif') as file:
        assert file.crs == 'EPSG:32633' and file.transform == TRANSFORM and file.shape == SIZE
        assert file.nodata is None and file.dtypes == ('uint8',) and file.count == 1
        assert file.profile['tiled'] and file.compression.value == 'DEFLATE'
        assert {code: file.colormap(1)[code][:3] for code in (1, 2, 3)} == dict(
            enumerate(tiled.classes.palette, start=1)
        )
    assert len(np.unique(expected.labels)) == 3
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(expected.label_image()))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_without_tiles_the_labels_are_those_of_the_whole_image(files, tmp_path):
    path, whole = write(tmp_path / 'a.tif', picture()), Segmentor(*files, device='cpu')
    segment_raster(whole, path, tmp_path / 'out.tif', bands=(1, 2, 3))
    expected = whole(picture().transpose(1, 2, 0)).label_image()
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(expected))


def test_bands_are_read_in_the_order_that_is_asked_for(tiled, tmp_path):
    values = picture(bands=5)
    segment_raster(tiled, write(tmp_path / 'a.tif', values), tmp_path / 'out.tif', bands=(4, 3, 2))
    expected = tiled(np.ascontiguousarray(values[[3, 2, 1]].transpose(1, 2, 0))).label_image()
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(expected))


@pytest.mark.parametrize('dtype', ['uint16', 'int16', 'float32', 'float64'])
def test_a_scale_says_which_values_are_black_and_white(tiled, tmp_path, dtype):
    values = (picture().astype(np.float64) * 40 - 300).clip(0 if dtype == 'uint16' else None).astype(dtype)
    path = write(tmp_path / 'a.tif', values)
    with Raster(path, 3, scale=(0, 8000)) as raster:
        pixels, valid = raster.read(next(tiled.tiles._tiling.grid(SIZE, 64).windows()))
    expected = (values[:, :64, :64].astype(np.float64) / 8000 * 255).clip(0, 255).transpose(1, 2, 0)
    assert valid is None and pixels.dtype == np.float32 and np.allclose(pixels, expected, atol=1e-4)
    assert pixels.min() == 0 and pixels.max() == 255
    segment_raster(tiled, path, tmp_path / 'out.tif', scale=(0, 8000))
    assert len(np.unique(labels_of(tmp_path / 'out.tif'))) == 3
    with pytest.raises(UnreadableFile, match=rf'a.tif: holds {dtype} values, .* such as scale=\(0, 10000\)'):
        segment_raster(tiled, path, tmp_path / 'none.tif')
    assert not (tmp_path / 'none.tif').exists()


def test_other_channels_than_three_are_taken_as_they_are_stored(tmp_path):
    model = dict(backbone=dict(in_channels=5), data_preprocessor=dict(mean=[900.0], std=[700.0], bgr_to_rgb=False))
    config, checkpoint = save_segmentor(tmp_path / 'model')
    text = config.read_text().replace("model = {", f"model = {{'backbone': {model['backbone']}, "
                                      f"'data_preprocessor': {model['data_preprocessor']}, ")  # fmt: skip
    config.write_text(text)
    content = torch.load(checkpoint, weights_only=True)
    content['state_dict'] = build_segmentor(Config.fromfile(config)).state_dict()
    torch.save(content, checkpoint)
    tiled, values = Segmentor(config, checkpoint, 'cpu', tile=64), picture(bands=5).astype(np.uint16) * 9
    segment_raster(tiled, write(tmp_path / 'a.tif', values), tmp_path / 'out.tif')
    expected = tiled(values.transpose(1, 2, 0).astype(np.float32)).label_image()
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(expected))


def test_grey_and_palette_become_colours_and_alpha_is_the_mask(tiled, tmp_path):
    grey = picture(bands=1)
    segment_raster(tiled, write(tmp_path / 'grey.tif', grey), tmp_path / 'out.tif')
    expected = tiled(np.repeat(grey, 3, axis=0).transpose(1, 2, 0)).label_image()
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(expected))

    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    Image.fromarray(grey[0]).save(tmp_path / 'l.tif')
    indexed = Image.fromarray(grey[0], 'P')
    indexed.putpalette(colours.tobytes())
    indexed.save(tmp_path / 'p.tif')
    segment_raster(tiled, tmp_path / 'p.tif', tmp_path / 'out.tif')
    assert np.array_equal(labels_of(tmp_path / 'out.tif'), np.asarray(tiled(colours[grey[0]]).label_image()))

    alpha = np.full(SIZE, 255, np.uint8)
    alpha[:, :70] = 0
    kinds = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    segment_raster(
        tiled, write(tmp_path / 'rgba.tif', np.stack([*picture(), alpha]), colorinterp=kinds), tmp_path / 'out.tif'
    )
    assert np.array_equal(labels_of(tmp_path / 'out.tif') == 0, alpha == 0)


@pytest.mark.parametrize('nodata', [0, -9999, np.nan])
def test_what_is_nodata_stays_nodata_and_changes_nothing_far_from_it(tiled, tmp_path, nodata):
    values = picture().clip(1).astype(np.uint8 if nodata == 0 else np.float32)
    segment_raster(tiled, write(tmp_path / 'a.tif', values), tmp_path / 'whole.tif', scale=(0, 255))
    hole = np.zeros(SIZE, bool)
    hole[:70, :80] = True  # a whole tile, and parts of others
    values[:, hole] = nodata
    values[0, 100, 100] = nodata  # in one band alone: the pixel has data
    segment_raster(tiled, write(tmp_path / 'a.tif', values, nodata=nodata), tmp_path / 'out.tif', scale=(0, 255))
    with rasterio.open(tmp_path / 'out.tif') as file:
        assert file.nodata == 0  # which no class is coded by
        labels = file.read(1)
        assert np.array_equal(file.dataset_mask() == 0, hole)
    assert np.array_equal(labels == 0, hole)
    far = np.s_[-48:-16, -60:]
    assert np.array_equal(labels[far], labels_of(tmp_path / 'whole.tif')[far])


@pytest.mark.parametrize('nodata', [-9999.0, np.nan])
def test_a_band_without_data_in_a_tile_has_its_mean_there(tiled, tmp_path, nodata):
    """Of -9999 the network would make labels of its own, and of NaN nothing."""
    values = picture().astype(np.float32)
    values[1, :, :90] = 77
    expected = values.copy()
    values[1, :, :90] = nodata
    expected[1, :, :90] = values[1, :, 90:].mean(dtype=np.float64)
    segment_raster(tiled, write(tmp_path / 'a.tif', expected), tmp_path / 'expected.tif', scale=(0, 255))
    segment_raster(tiled, write(tmp_path / 'a.tif', values, nodata=nodata), tmp_path / 'out.tif', scale=(0, 255))
    # From column 48 on, tiles have data of the band, whose own mean is taken.
    assert np.array_equal(labels_of(tmp_path / 'out.tif')[:, :32], labels_of(tmp_path / 'expected.tif')[:, :32])
    values[1] = nodata
    with pytest.raises(UnreadableFile, match='a.tif: band 2 has no data: choose others by bands='):
        segment_raster(tiled, write(tmp_path / 'a.tif', values, nodata=nodata), tmp_path / 'out.tif', scale=(0, 255))


@pytest.mark.parametrize('tile', [64, None])
def test_a_piece_that_is_too_thin_does_not_stop_the_others(files, tmp_path, tool_here, tile):
    (tmp_path / 'in').mkdir()
    for name, size in (('a', (20, 100)), ('b', (100, 100)), ('c', (5, 100))):
        write(tmp_path / f'in/{name}.tif', picture(size))
    options = ('--tile', tile) if tile else ('--bands', '1,2,3')
    process = tool_here('predict', *files, 'in', *options, '--out', 'out')
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    assert 'a.tif' in process.stderr and 'c.tif' in process.stderr and 'too thin' in process.stderr
    assert (tmp_path / 'out/labels/b.tif').exists()


@pytest.mark.skipif(sys.platform == 'darwin', reason='file names are UTF-8')
def test_a_name_that_is_no_utf8(files, tmp_path, tool):
    (tmp_path / 'in').mkdir()
    path = write(tmp_path / 'in/a.tif', picture())
    shutil.copy(path, os.fsencode(tmp_path) + b'/in/b\xff.tif')
    process = tool('predict', *files, 'in', '--tile', 64, '--out', 'out')
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    assert 'no UTF-8' in process.stderr and (tmp_path / 'out/labels/a.tif').exists()


def test_codes_that_leave_no_byte_free_and_colours(tmp_path):
    values = picture()
    values[:, :40] = 0
    source = write(tmp_path / 'a.tif', values, nodata=0)
    for codes, count, dtype, nodata in (
        (tuple(range(256)), 1, 'uint16', 256),
        ((0, 255, 300), 1, 'uint16', 1),
        (((0, 0, 0), (255, 255, 255), (9, 0, 0)), 3, 'uint8', 1),
    ):
        tiled = Segmentor(*save_segmentor(tmp_path / 'model', len(codes), codes), device='cpu', tile=64)
        segment_raster(tiled, source, tmp_path / 'out.tif')
        with rasterio.open(tmp_path / 'out.tif') as file:
            assert (file.count, file.dtypes[0], file.nodata) == (count, dtype, nodata)
            assert np.array_equal(file.dataset_mask()[:40] > 0, np.zeros((40, SIZE[1]), bool))
            valid = file.read()[:, 40:].reshape(count, -1).T
        assert set(map(tuple, valid)) <= {code if isinstance(code, tuple) else (code,) for code in codes}
        assert len(np.unique(valid, axis=0)) > 1


@pytest.mark.parametrize('suffix', ['.gpkg', '.geojson'])
def test_polygons_drawn_again_give_the_labels(tiled, tmp_path, suffix):
    values = picture().clip(1)
    values[:, 10:60, 20:90] = 0
    path = write(tmp_path / 'a.tif', values, nodata=0)
    segment_raster(tiled, path, tmp_path / 'out.tif', polygons=tmp_path / f'p{suffix}')
    info = pyogrio.read_info(tmp_path / f'p{suffix}')
    assert info['crs'] == ('EPSG:32633' if suffix == '.gpkg' else 'EPSG:4326')
    _, _, shapes, (names, codes, pixels) = pyogrio.raw.read(tmp_path / f'p{suffix}')
    assert {(name, code) for name, code in zip(names, codes, strict=True)} == {
        (f'class {i}', str(i + 1)) for i in range(3)
    }
    geometries = [geometry_of(shape) for shape in shapes]
    if suffix == '.geojson':
        content = json.loads((tmp_path / 'p.geojson').read_text())
        assert all(is_counter_clockwise(f['geometry']['coordinates'][0]) for f in content['features'])
        geometries = [rasterio.warp.transform_geom('OGC:CRS84', 'EPSG:32633', geometry) for geometry in geometries]
    pairs = zip(geometries, map(int, codes), strict=True)
    labels = labels_of(tmp_path / 'out.tif')
    assert np.array_equal(features.rasterize(pairs, SIZE, fill=0, transform=TRANSFORM, dtype='uint8'), labels)
    assert pixels.sum() == (labels > 0).sum()

    segment_raster(tiled, path, tmp_path / 'out.tif', polygons=tmp_path / f'p{suffix}', min_area=50)
    assert (
        sorted(pyogrio.raw.read(tmp_path / f'p{suffix}')[3][2])
        == sorted(n for n in pixels if n >= 50)
        != sorted(pixels)
    )
    segment_raster(tiled, path, tmp_path / 'out.tif', polygons=tmp_path / f'p{suffix}', min_area=10**6)
    assert pyogrio.read_info(tmp_path / f'p{suffix}')['features'] == 0


def test_no_part_of_a_region_is_too_small(tiled, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(geotiff, 'say', said.append)
    monkeypatch.setattr(geotiff, '_POINTS', 500)  # several writes
    monkeypatch.setattr('mmseg_inceptionnext.inference.polygons._MOST_PIXELS', 10 * SIZE[1])
    monkeypatch.setattr('mmseg_inceptionnext.inference.polygons._MOST_POINTS', 100)
    path = write(tmp_path / 'a.tif', picture())
    segment_raster(tiled, path, tmp_path / 'out.tif', polygons=tmp_path / 'p.gpkg', min_area=50)
    assert ['in several parts' in line for line in said] == [True]
    _, _, shapes, (_, codes, pixels) = pyogrio.raw.read(tmp_path / 'p.gpkg')
    assert pixels.min() < 50
    pairs = zip(map(geometry_of, shapes), map(int, codes), strict=True)
    drawn = features.rasterize(pairs, SIZE, fill=0, transform=TRANSFORM, dtype='uint8')
    labels = labels_of(tmp_path / 'out.tif')
    assert np.array_equal(drawn[drawn > 0], labels[drawn > 0])
    for shape, _ in features.shapes(labels):
        region = features.rasterize([shape], SIZE, dtype='uint8') > 0
        assert region.sum() < 50 or drawn[region].all()


def geometry_of(content: bytes) -> dict:
    """GeoJSON of a polygon in well-known binary."""
    rings, at = [], 9
    for _ in range(np.frombuffer(content, '<u4', 1, 5)[0]):
        number = int(np.frombuffer(content, '<u4', 1, at)[0])
        rings.append(np.frombuffer(content, '<f8', 2 * number, at + 4).reshape(-1, 2).tolist())
        at += 4 + 16 * number
    assert at == len(content)
    return dict(type='Polygon', coordinates=rings)


def is_counter_clockwise(ring: list) -> bool:
    x, y = (np.array(ring) - ring[0]).T
    return x @ np.roll(y, -1) - y @ np.roll(x, -1) > 0


def test_the_tool_writes_labels_and_polygons(files, tmp_path, tool_here):
    write(tmp_path / 'a.tif', picture(bands=4))
    command = ('predict', *files, 'a.tif', '--out', 'out', '--tile', 64, '--overlap', 16, '--blend', '--batch-size', 2,
               '--bands', '3,2,1', '--polygons', 'p.gpkg', '--min-area', 4)  # fmt: skip
    process = tool_here(*command)
    assert process.returncode == 0, process.stderr
    assert '1 images in out' in process.stdout
    written = sorted(str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*.*'))
    assert written == ['labels/a.tif', 'manifest.jsonl']
    assert pyogrio.read_info(tmp_path / 'p.gpkg')['features'] > 3
    assert_user_error(tool_here(*command), 'exist already', '--overwrite')
    assert tool_here(*command, '--overwrite').returncode == 0


def test_pictures_of_other_kinds_are_predicted_in_tiles_as_well(files, tiled, tmp_path):
    pixels = picture().transpose(1, 2, 0)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    assert (
        predict(tiled, find_sources([str(tmp_path / 'a.png')], tmp_path / 'out'), Output(tmp_path / 'out', labels=True))
        == {}
    )
    written = np.asarray(Image.open(tmp_path / 'out' / 'labels' / 'a.png'))
    assert np.array_equal(written, np.asarray(tiled(pixels).label_image()))
    assert Image.open(tmp_path / 'out' / 'a.png').size == SIZE[::-1]
    far = np.s_[:32, :32]  # from the seams and what a tile does not see
    whole = Segmentor(*files, device='cpu')(pixels)
    assert np.mean(whole.labels[far] == tiled(pixels).labels[far]) > 0.8


def test_a_raster_without_crs_keeps_its_pixels_as_coordinates_and_that_is_said(tiled, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(geotiff, 'say', said.append)
    path = write(tmp_path / 'a.tif', picture(), crs=None, transform=None)
    for suffix in ('.gpkg', '.geojson'):
        segment_raster(tiled, path, tmp_path / 'out.tif', polygons=tmp_path / f'p{suffix}')
        bounds = pyogrio.read_info(tmp_path / f'p{suffix}', force_total_bounds=True)['total_bounds']
        assert tuple(bounds) == (0, 0, *SIZE[::-1])
    with rasterio.open(tmp_path / 'out.tif') as file:
        assert file.crs is None and file.transform == Affine.identity()
    assert len(said) == 2 and 'a.tif has no CRS' in said[0]


def damaged_tile(path: Path, **options) -> Path:
    write(path, picture(), **options)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[5]  # second row, second column
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('options', [dict(), dict(compress='lzw'), dict(compress='jpeg', photometric='ycbcr')],
                         ids=['deflate', 'lzw', 'jpeg'])  # fmt: skip
def test_a_damaged_tile_costs_its_image_alone(tiled, tmp_path, options):
    (tmp_path / 'in').mkdir()
    for name in 'ac':
        write(tmp_path / 'in' / f'{name}.tif', picture())
    bad = damaged_tile(tmp_path / 'in' / 'b.tif', **options)
    failures = predict(tiled, find_sources([str(tmp_path / 'in')], tmp_path / 'out'), Output(tmp_path / 'out'))
    assert list(failures) == [str(bad)] and 'rows 48 to 111, columns ' in failures[str(bad)]
    assert sorted(p.name for p in (tmp_path / 'out' / 'labels').iterdir()) == ['a.tif', 'c.tif']


def test_a_truncated_file(tiled, tmp_path):
    path = write(tmp_path / 'a.tif', picture())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnreadableFile, match='a.tif: '):
        segment_raster(tiled, path, tmp_path / 'out.tif')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.tif']


def test_values_that_are_not_finite(tiled, tmp_path):
    values = picture().astype(np.float32)
    values[1, 80, 80] = np.inf
    with pytest.raises(UnreadableFile, match='rows 48 to 111 hold values that are not finite: declare them as nodata'):
        segment_raster(tiled, write(tmp_path / 'a.tif', values), tmp_path / 'out.tif', scale=(0, 255))


def test_mistakes_are_one_line_and_nothing_is_written(files, tmp_path, tool_here):
    write(tmp_path / 'a.tif', picture(bands=5))
    Image.fromarray(picture().transpose(1, 2, 0)).save(tmp_path / 'b.png')
    for options, *parts in (
        (('--tile', 64, '--overlap', 64), '--overlap 64 must be from 0 to 63'),
        (('--tile', 16), '--tile 16 must be'),
        (('--overlap', 8), '--overlap 8 is for tiles', '--tile auto'),
        (('--blend',), '--blend is for tiles'),
        (('--tile', 64, '--bands', '4,3,6'), 'a.tif: has no band 6, but 5: correct'),
        (('--tile', 64, '--bands', '4,3'), 'the model takes 3 bands'),
        (('--tile', 64), 'a.tif: has 5 bands, but the model takes 3: choose them, such as --bands 1,2,3'),
        (('--tile', 64, '--bands', '1,2,3', '--scale', 5, 5), '--scale 5.0 5.0: the second value must be larger'),
        (('--bands', '1,2,3', '--polygons', 'p.shp'), '--polygons p.shp must end in .gpkg or .geojson'),
        (('--min-area', 5), '--min-area 5 is for polygons', '--polygons FILE'),
        (('b.png', '--bands', '1,2,3'), '--bands 1,2,3 is for TIFF files, and b.png is none'),
        (('a2.tif', '--polygons', 'p.gpkg', '--bands', '1,2,3'), '--polygons p.gpkg is for one image, not for 2'),
    ):  # fmt: skip
        if 'a2.tif' in options:
            write(tmp_path / 'a2.tif', picture())
        assert_user_error(tool_here('predict', *files, 'a.tif', *options, '--out', 'out'), *parts)
        written = {path.name for path in (tmp_path / 'out').rglob('*.*')}
        assert written <= {'manifest.jsonl'} and not list(tmp_path.glob('p.*'))
    process = tool_here('predict', *files, 'a.tif', '--tile', 64, '--bands', '1,2,3', '--out', 'out')
    assert process.returncode == 0, process.stderr  # the runs before have nothing to go on with


@pytest.fixture
def small_disk():
    """Files cannot grow beyond a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('polygons', [None, 'p.gpkg', 'p.geojson'])
@pytest.mark.parametrize('share', [0.3, 0.999])
def test_a_disk_that_fills_leaves_nothing_half_written_and_what_was_there(tiled, tmp_path, small_disk, share, polygons):
    path = write(tmp_path / 'a.tif', picture((700, 300)))
    output = Output(tmp_path / 'out', polygons=polygons and tmp_path / polygons)
    sources = find_sources([str(path)], tmp_path / 'out')
    predict(tiled, sources, output)
    written = [p for p in (output.raster_of(sources[0]), output.polygons) if p]
    before = {p: p.read_bytes() for p in written}
    small_disk(int(share * len(before[written[-1]])))
    with pytest.raises(UserError, match=r'cannot write .*(MiB are free there|File too large)'):
        predict(tiled, sources, output, overwrite=True)
    assert {p: p.read_bytes() for p in written} == before
    assert not [p for p in tmp_path.rglob('.*') if p.is_file()]


def test_polygons_take_their_place_with_the_labels_alone(tiled, tmp_path, monkeypatch):
    path, out, polygons = write(tmp_path / 'a.tif', picture()), tmp_path / 'out.tif', tmp_path / 'p.gpkg'
    segment_raster(tiled, path, out, polygons=polygons)
    before = out.read_bytes(), polygons.read_bytes()
    write(path, picture(seed=1))
    sums = iter(range(10**6))
    monkeypatch.setattr(geotiff.zlib, 'crc32', lambda content: next(sums))  # the labels are found damaged, at the end
    with pytest.raises(OSError, match='it is not what was written'):
        segment_raster(tiled, path, out, polygons=polygons)
    assert (out.read_bytes(), polygons.read_bytes()) == before


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
sys.argv = sys.argv[1:]
sys.orig_argv = ['python', *sys.argv]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    from mmseg_inceptionnext.device import peak_memory_mb
    print('peak', peak_memory_mb('cpu'))
"""


@pytest.mark.parametrize('side', [1600, pytest.param(20000, marks=pytest.mark.slow)])
def test_any_size_goes_through_two_gibibytes(files, tmp_path, side):
    """The kernel limits what the process allocates (RLIMIT_DATA); what it had in memory at the peak is measured."""
    paint = runpy.run_path(str(ROOT / 'benchmarks' / 'tiles.py'))['paint']
    paint(tmp_path / 'large.tif', side)
    command = (
        'predict.py',
        *files,
        'large.tif',
        '--out',
        'out',
        '--tile',
        1024,
        '--polygons',
        'p.gpkg',
        '--min-area',
        64,
    )
    process = subprocess.run(
        [sys.executable, '-c', LIMITED, ROOT / 'tools' / command[0], *map(str, command[1:])],
        cwd=tmp_path, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert float(process.stdout.split()[-1]) < 2048
    with (
        rasterio.open(tmp_path / 'large.tif') as image,
        rasterio.open(tmp_path / 'out' / 'labels' / 'large.tif') as file,
    ):
        assert file.shape == (side, side) and file.transform == image.transform and file.crs == image.crs
        assert file.bounds == image.bounds
        # The image repeats itself; here far from where tiles meet, and across a seam of tiles.
        found = [file.read(1, window=((top, top + 64), (left, left + 64))) for top, left in ((300, 300), (860, 860))]
    assert all(labels.min() >= 1 and labels.max() <= 3 for labels in found)
    assert pyogrio.read_info(tmp_path / 'p.gpkg')['features'] > 10
