"""Images are read as mmseg's pipelines read them, and what cannot be read says why."""

import os
import struct

import mmcv
import numpy as np
import pytest
from PIL import Image

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.images import image_size, read_image, read_picture


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 48))


def saved(picture, path, mode: str, **options):
    picture.convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ('mode', 'name'),
    [('RGB', 'a.jpg'), ('L', 'a.jpg'), ('RGB', 'a.png'), ('L', 'a.png'), ('1', 'a.png'), ('P', 'a.png'),
     ('RGBA', 'a.png'), ('LA', 'a.png'), ('RGB', 'a.webp'), ('RGB', 'a.bmp'), ('RGB', 'a.tif'), ('P', 'a.gif')],
)  # fmt: skip
def test_as_mmsegs_pipelines_read_it(picture, tmp_path, mode, name):
    path = saved(picture, tmp_path / name, mode)
    pixels = read_image(path)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, mmcv.imread(str(path), channel_order='rgb'))
    with Image.open(path) as image:
        assert np.array_equal(read_image(image), pixels)


def test_cmyk_differs_by_one_at_most(picture, tmp_path):
    path = saved(picture, tmp_path / 'a.jpg', 'CMYK')
    difference = read_image(path).astype(int) - mmcv.imread(str(path), channel_order='rgb')
    assert abs(difference).max() <= 1


def test_16_bits_become_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / 'a.png')
    pixels = read_image(tmp_path / 'a.png')
    assert np.array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=2))
    assert np.array_equal(pixels, mmcv.imread(str(tmp_path / 'a.png')))


@pytest.mark.parametrize('name', ['a.jpg', 'a.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_as_exif_says(picture, tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(picture, tmp_path / name, 'RGB', exif=exif)
    pixels = read_image(str(path))
    assert pixels.shape == ((64, 48, 3) if orientation > 4 else (48, 64, 3))
    assert image_size(path) == pixels.shape[1::-1]
    assert np.array_equal(pixels, mmcv.imread(str(path), channel_order='rgb'))


@pytest.mark.parametrize('tag, kind, count, value', [
    (296, 2, 2, b'2\0\0\0'),  # the unit of the resolution, as text
    (282, 2, 3, b'72\0\0'),
    (305, 3, 1, b'\0\1\0\0'),
    (34665, 2, 2, b'x\0\0\0'),
])  # fmt: skip
def test_a_damaged_tag_beside_the_orientation(picture, tmp_path, tag, kind, count, value):
    entries = sorted([(0x0112, 3, 1, b'\0\6\0\0'), (tag, kind, count, value)])
    block = b'MM\0*' + struct.pack('>LH', 8, 2) + b''.join(struct.pack('>HHL4s', *entry) for entry in entries)
    picture.save(tmp_path / 'plain.jpg')
    picture.save(tmp_path / 'a.jpg', exif=b'Exif\0\0' + block + bytes(4))
    pixels = read_image(tmp_path / 'a.jpg')
    assert np.array_equal(pixels, np.rot90(read_image(tmp_path / 'plain.jpg'), -1))


def test_arrays():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(read_image(grey), np.stack([grey] * 3, axis=2))
    rgb = np.zeros((3, 4, 3), np.uint8)
    assert np.array_equal(read_image(rgb), rgb) and not np.shares_memory(read_image(rgb), rgb)
    for wrong in (rgb.astype(np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(TypeError, match=r'expected an array \(H, W, 3\)'):
            read_image(wrong)
    with pytest.raises(TypeError, match='got bytes'):
        read_image(b'')


def broken(folder, how: str):
    path = folder / f'{how}.jpg'
    content = {'empty': b'', 'text': b'not an image', 'nowhere': None}.get(how)
    if how == 'truncated':
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:5000]
    elif how == 'bomb':
        Image.new('1', (20000, 20000)).save(path.with_suffix('.png'))
        return path.with_suffix('.png')
    elif how == 'float':
        Image.fromarray(np.ones((4, 4), np.float32)).save(path.with_suffix('.tif'))
        return path.with_suffix('.tif')
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ('how', 'message'),
    [('empty', 'not an image'), ('text', 'not an image'), ('nowhere', 'no such file'), ('truncated', 'truncated'),
     ('bomb', 'decompression bomb'), ('float', 'floating-point')],
)  # fmt: skip
def test_what_cannot_be_read_says_why(tmp_path, how, message):
    path = broken(tmp_path, how)
    with pytest.raises(UserError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_neither_folders_nor_pipes_are_images(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    for path in (tmp_path, tmp_path / 'pipe.jpg'):
        for read in (read_image, read_picture, image_size):
            with pytest.raises(UserError, match='not a file'):
                read(path)


@pytest.mark.parametrize(
    'source', [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), Image.new('RGB', (0, 4))]
)
def test_an_image_without_a_pixel(source):
    with pytest.raises(UserError, match='without a pixel'):
        read_image(source)
