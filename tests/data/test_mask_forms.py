"""Every form in which a file holds a mask is read as it is stored or refused: by the check, in training, in a test."""

import contextlib
import copy
import os
import re
import shutil
import socket
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from PIL import Image
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.data.draft import draft_data_file
from mmseg_inceptionnext.data.guard import CurrentFiles, guard_pipelines
from mmseg_inceptionnext.data.inspection import inspect_data
from mmseg_inceptionnext.data.pipeline import read_images_safely

SIZE = (48, 64)
LABELS = (np.arange(SIZE[1])[None] + np.zeros((SIZE[0], 1), int)) // 16 % 4  # four stripes, 0 … 3
CLASSES = list('abcd')
KINDS = ('mmseg', 'ids', 'colours')  # of data sets: what masks hold, and who reads them
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [9, 9, 9]], np.uint8)
COLOUR_CLASSES = {i: dict(name=name, labels=[COLOURS[i].tolist()]) for i, name in enumerate(CLASSES)}


def saved(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values: np.ndarray = LABELS, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(values.astype(dtype)))


def png(bits: int, colour: int, rows: list[bytes], more: bytes = b'', passes: bool = False) -> bytes:
    """A PNG of forms that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    header = struct.pack('>IIBBBBB', SIZE[1], SIZE[0], bits, colour, 0, 0, passes)
    pixels = zlib.compress(b''.join(b'\0' + row for row in rows))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + more + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def packed(bits: int, labels: np.ndarray = LABELS) -> list[bytes]:
    shifts = np.unpackbits(labels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return [bytes(np.packbits(row)) for row in shifts.reshape(len(labels), -1)]


def adam7(labels: np.ndarray) -> list[bytes]:
    """The rows of an interlaced PNG of 8 bits."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    return [bytes(row) for top, left, down, right in passes for row in labels[top::down, left::right].astype(np.uint8)]


def palette(labels: np.ndarray = LABELS) -> Image.Image:
    image = grey(labels).convert('L')
    image.putpalette(COLOURS.tobytes())
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def big_endian_tiff(**tags) -> bytes:
    """A TIFF of 8-bit grey, with tags in the place of the usual ones."""
    values = {256: SIZE[1], 257: SIZE[0], 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: SIZE[0], 279: LABELS.size}
    values.update({int(key[1:]): value for key, value in tags.items()})
    values[273] = 8 + 2 + 12 * len(values) + 4
    entries = b''.join(struct.pack('>HHII', tag, 4, 1, value) for tag, value in sorted(values.items()))
    pixels = LABELS.astype(np.uint8).tobytes() * values[277]
    return b'MM\0*' + struct.pack('>IH', 8, len(values)) + entries + bytes(4) + pixels


CHRM = struct.pack('>I', 12) + b'PLTE' + COLOURS.tobytes()
PLTE = CHRM + struct.pack('>I', zlib.crc32(CHRM[4:]))

# For each form, the content of the file and what happens where masks hold ids of 8 bits, as mmseg reads them, in a data
# file of ids, and in one of colours: the labels that are read, or a part of the line that refuses it.
NO_IDS, NO_COLOURS = 'has 3 channels', r'the colour \[\d+, \d+, \d+\]'
LOSSY = 'make the masks again from their source, and save them as PNG'
STRETCHED = 'that are stretched when read: save it with 8 bits'
READ = LABELS
FORMS = {
    'grey': (saved(grey()), READ, READ, NO_COLOURS),
    'interlaced': (png(8, 0, adam7(LABELS), passes=True), READ, READ, NO_COLOURS),
    '1 bit': (saved(grey(LABELS % 2 > 0, bool)), LABELS % 2, LABELS % 2, r'\[255, 255, 255\]'),
    '2 bits': (png(2, 0, packed(2)), STRETCHED, STRETCHED, STRETCHED),
    '4 bits': (png(4, 0, packed(4)), STRETCHED, STRETCHED, STRETCHED),
    '16 bits': (saved(grey(dtype=np.uint16)), READ, READ, 'is of mode I;16'),
    'ids of 16 bits': (saved(grey(LABELS + 256, np.uint16)), 'has label 259', r'has id 2\d+', 'is of mode I;16'),
    'palette': (saved(palette()), READ, READ, READ),
    'palette of 1 bit': (png(1, 3, packed(1, LABELS % 2), PLTE), LABELS % 2, LABELS % 2, LABELS % 2),
    'palette of 2 bits': (png(2, 3, packed(2), PLTE), READ, READ, READ),
    'palette of 4 bits': (png(4, 3, packed(4), PLTE), READ, READ, READ),
    'transparent palette': (saved(palette(), transparency=bytes([0, 255])), READ, READ, READ),
    'transparent grey': (saved(grey(), transparency=1), READ, READ, NO_COLOURS),
    'RGB': (saved(Image.fromarray(COLOURS[LABELS])), NO_IDS, NO_IDS, READ),
    'grey as RGB': (saved(grey().convert('RGB')), NO_IDS, NO_IDS, NO_COLOURS),
    'RGBA': (saved(Image.fromarray(COLOURS[LABELS]).convert('RGBA')), 'has 4 channels', 'has 4 channels', READ),
    'transparent RGB': (saved(Image.fromarray(COLOURS[LABELS]), transparency=(0, 0, 0)), NO_IDS, NO_IDS, READ),
    'LA': (saved(grey().convert('LA')), 'has 2 channels', 'has 2 channels', 'is of mode LA'),
    'RGB of 16 bits': (
        png(16, 2, [row.astype('>u2').tobytes() for row in COLOURS[LABELS].astype(int) * 256]),
        *['other than 8 bits a channel'] * 3,
    ),
    'turned': (saved(grey(), exif=turned(3)), *['has the EXIF orientation 3, which is not applied to masks'] * 3),
    'turned TIFF': (saved(grey(LABELS[:, ::-1]), 'TIFF', exif=turned(2)), READ, READ, NO_COLOURS),
    'TIFF': (saved(grey(), 'TIFF', compression='tiff_lzw'), READ, READ, NO_COLOURS),
    'inverted TIFF': (big_endian_tiff(_262=0), *['has inverted grey values'] * 3),
    'TIFF of 32 bits': (saved(grey(dtype=np.int32), 'TIFF'), READ, READ, 'is of mode I'),
    'negative': (saved(grey(LABELS - 1, np.int32), 'TIFF'), 'has label -1', 'no ids', 'is of mode I'),
    'fractions': (saved(grey(LABELS + 0.5, np.float32), 'TIFF'), 'has label 3.5', 'no ids', 'is of mode F'),
    'not a number': (saved(grey(LABELS + np.nan, np.float32), 'TIFF'), 'has label nan', 'no ids', 'is of mode F'),
    'PGM': (saved(grey(), 'PPM'), READ, READ, NO_COLOURS),
    'PGM of 0 … 3': (b'P5 64 48 3\n' + LABELS.astype(np.uint8).tobytes(), *[STRETCHED] * 3),
    'PGM of 0 … 300': (b'P5 64 48 300\n' + LABELS.astype('>u2').tobytes(), *[STRETCHED] * 3),
    'PBM': (saved(grey(LABELS % 2 > 0, bool), 'PPM'), *['has inverted grey values'] * 3),
    'GIF': (saved(palette(), 'GIF'), READ, READ, READ),
    'BMP': (saved(grey(), 'BMP'), READ, READ, NO_COLOURS),
    'JPEG': (saved(grey(), 'JPEG'), *[f'is stored as JPEG, which changes ids and colours.*{LOSSY}'] * 3),
    'coloured JPEG': (saved(Image.fromarray(COLOURS[LABELS]), 'JPEG'), *['is stored as JPEG'] * 3),
    'MPO': (saved(grey(), 'MPO', save_all=True, append_images=[grey()]), *['is stored as JPEG'] * 3),
    'WebP': (saved(Image.fromarray(COLOURS[LABELS]), 'WEBP'), *['is stored as lossy WebP'] * 3),
    'lossless WebP': (saved(Image.fromarray(COLOURS[LABELS]), 'WEBP', lossless=True), NO_IDS, NO_IDS, READ),
    'animated WebP': (
        saved(Image.fromarray(COLOURS[LABELS]), 'WEBP', save_all=True, append_images=[grey().convert('RGB')]),
        *['is stored as lossy WebP'] * 3,
    ),
    'lossless animated WebP': (
        saved(Image.fromarray(COLOURS[LABELS]), 'WEBP', lossless=True, save_all=True, append_images=[palette()]),
        NO_IDS, NO_IDS, READ,
    ),
    'JPEG 2000': (saved(grey(), 'JPEG2000'), *['is stored as JPEG 2000, which may change ids'] * 3),
    'TIFF of JPEG': (saved(grey(), 'TIFF', compression='jpeg'), *['is stored as TIFF with JPEG compression'] * 3),
}  # fmt: skip


def write(root: Path, mask: bytes, image: bytes = saved(Image.new('RGB', SIZE[::-1]), 'JPEG')) -> None:
    for split in ('training', 'validation'):
        for kind, name in (('images', '0.jpg'), ('annotations', '0.png')):
            path = root / kind / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(mask if kind == 'annotations' else image)


def configured(root: Path, kind: str) -> Config:
    """A config of one image for training, and one for validation."""
    if kind != 'mmseg':
        folders = {split: dict(images=f'images/{name}', masks=f'annotations/{name}')
                   for split, name in (('train', 'training'), ('val', 'validation'))}  # fmt: skip
        content = dict(folders, path=str(root), classes=CLASSES if kind == 'ids' else COLOUR_CLASSES)
        return load_config(TINY_CONFIG, root / 'work', data=content)
    cfg = load_config(TINY_CONFIG, root / 'work')
    for split in ('train', 'val', 'test'):
        old = cfg[f'{split}_dataloader'].dataset
        cfg[f'{split}_dataloader'].dataset = dict(
            type='BaseSegDataset', data_root=str(root), data_prefix=old.data_prefix, pipeline=old.pipeline,
            metainfo=dict(classes=CLASSES, palette=[[i, i, i] for i in range(4)]), reduce_zero_label=False,
        )  # fmt: skip
        for transform in old.pipeline:
            if transform['type'] == 'CheckAnnotation':
                transform['num_classes'] = len(CLASSES)
    cfg.model.decode_head.num_classes = len(CLASSES)
    return cfg


def read(cfg: Config, split: str) -> np.ndarray:
    """Return the label map that a split's pipeline reads; what comes after it is left out."""
    dataset = cfg[f'{split}_dataloader'].dataset
    last = max(i for i, t in enumerate(dataset.pipeline) if t['type'] in ('CheckAnnotation', 'ReadMask'))
    loaders = [t for t in dataset.pipeline[: last + 1] if t['type'] not in ('Resize', 'RandomResize')]
    return DATASETS.build(dict(dataset, pipeline=loaders, serialize_data=False))[0]['gt_seg_map']


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A data set of each kind, and its config; tests replace the masks."""
    roots = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for root in roots.values():
        write(root, saved(grey()))
    return {kind: (root, configured(root, kind)) for kind, root in roots.items()}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('form', FORMS)
def test_a_mask_is_read_as_it_is_stored_or_refused(form, kind, prepared):
    content, *outcomes = FORMS[form]
    expected = outcomes[KINDS.index(kind)]
    root, cfg = prepared[kind]
    write(root, content)
    found = inspect_data(cfg)
    if isinstance(expected, str):
        for name, split in found.splits.items():
            reasons = [entry['reason'] for entry in split.wrong] + [p for p in found.problems if p.startswith(name)]
            assert reasons and all(re.search(expected.removeprefix('has '), reason) for reason in reasons), reasons
        for split in ('train', 'test'):
            with pytest.raises(UserError, match=rf'annotations/\w+/0\.png.*{expected}'):
                read(cfg, split)
        return
    check_data(cfg, 'train', 'val')
    assert found.ok, (found.problems, found.splits['train'].wrong)
    pixels = [found.splits['train'].classes[name]['pixels'] for name in CLASSES]
    assert pixels == np.bincount(expected.ravel(), minlength=4).tolist()
    for split in ('train', 'test'):
        assert np.array_equal(read(cfg, split), expected)


def write_data_file(root: Path) -> Path:
    folders = ''.join(f'{split}: {{images: images/{name}, masks: annotations/{name}}}\n'
                      for split, name in (('train', 'training'), ('val', 'validation')))  # fmt: skip
    path = root / 'd.yaml'
    path.write_text(f'{folders}classes: [a, b, c, d]\n')
    return path


@pytest.mark.parametrize('kind', ['mmseg', 'ids'])
@pytest.mark.parametrize('split', ['training', 'validation'])
def test_masks_compressed_with_loss_end_a_run_before_it_starts(kind, split, tmp_path, tool_here, mini_root):
    """JPEGs, whatever their names end in."""
    if kind == 'ids':
        write(tmp_path / 'data', saved(grey()))
        options = ('--data', write_data_file(tmp_path / 'data'))
    else:
        shutil.copytree(mini_root, tmp_path / 'data')
        options = ('--data-root', tmp_path / 'data')
    mask = min((tmp_path / 'data' / 'annotations' / split).iterdir())
    mask.write_bytes(saved(Image.open(mask), 'JPEG'))
    line = f'{mask} is stored as JPEG, which changes ids and colours, above all at borders: {LOSSY}'
    process = tool_here('train', TINY_CONFIG, *options, '--weights', 'none', '--work-dir', 'work')
    assert_user_error(process, line)
    assert not list((tmp_path / 'work').glob('*'))


def test_a_test_does_not_score_against_masks_compressed_with_loss(tmp_path, tool_here, mini_root, trained):
    shutil.copytree(mini_root, tmp_path / 'data')
    for mask in (tmp_path / 'data' / 'annotations' / 'validation').iterdir():
        mask.write_bytes(saved(Image.open(mask), 'JPEG'))
    process = tool_here('test', TINY_CONFIG, trained, '--data-root', tmp_path / 'data', '--work-dir', 't')
    assert_user_error(process, 'annotations/validation', 'is stored as JPEG', LOSSY)


def test_the_check_groups_masks_compressed_with_loss_and_draws_the_first(tmp_path, tool_here):
    write(tmp_path / 'data', saved(grey()))
    path = write_data_file(tmp_path / 'data')
    labels = 60 * ((np.arange(300)[None] + np.arange(200)[:, None] // 2) // 75 % 4)
    image, mask = (saved(Image.fromarray(labels.astype(np.uint8)), 'JPEG', quality=60) for _ in range(2))
    for split in ('training', 'validation'):
        for i in range(6 if split == 'training' else 1):
            (tmp_path / 'data' / 'images' / split / f'{i}.jpg').write_bytes(image)
            (tmp_path / 'data' / 'annotations' / split / f'{i}.png').write_bytes(mask)
    process = tool_here('check_dataset', '--data', path, '--workers', 1, '--report', 'report')
    assert process.returncode == 1
    lines = [line for line in process.stdout.splitlines() if LOSSY in line]
    assert len(lines) == 1 and '7 files, such as' in lines[0] and 'annotations/training/0.png: is stored' in lines[0]
    assert process.stderr.strip().endswith('error: 7 wrong files and 0 other problems')
    drawn = sorted(path.name for path in (tmp_path / 'report').iterdir())
    assert drawn == ['lossy_train_0.png', 'lossy_train_1.png', 'lossy_val_0.png']
    with Image.open(BytesIO(mask)) as stored:
        stray = ~np.isin(np.asarray(stored), np.unique(labels))
    picture = np.asarray(Image.open(tmp_path / 'report' / 'lossy_train_0.png'))
    marked = (picture[28 : 28 + 400, :600] == 0).all(-1)[::2, ::2]  # twice as large, below the title
    assert 0.02 < stray.mean() < 0.5 and (marked == stray).mean() > 0.99


def test_a_draft_of_masks_compressed_with_loss_is_refused(tmp_path):
    write(tmp_path, saved(grey(), 'JPEG'))
    with pytest.raises(UserError, match=rf'annotations/training/0\.png is stored as JPEG.*{LOSSY}'):
        draft_data_file(tmp_path)


@pytest.mark.parametrize('kind', ['mmseg', 'ids'])
@pytest.mark.parametrize('size', [(20000, 10), (10, 20000), (20000, 2), (1, 64), (64, 1), (1, 1)], ids=str)
def test_a_run_says_of_a_thin_image_what_the_check_says(size, kind, prepared):
    root, cfg = prepared[kind]
    write(root, saved(Image.new('L', size)), saved(Image.new('RGB', size), 'JPEG'))
    wrong = {name: split.wrong for name, split in inspect_data(cfg).splits.items()}
    for checked, split in (('train', 'train'), ('val', 'test')):
        ((file, reason),) = (tuple(entry.values()) for entry in wrong[checked])
        assert file.endswith('0.jpg') and reason.endswith('leave it out')
        dataset_cfg = copy.deepcopy(cfg[f'{split}_dataloader'].dataset)
        read_images_safely(dataset_cfg)  # as a run does
        dataset = DATASETS.build(dict(dataset_cfg, serialize_data=False))
        guard_pipelines(dataset, CurrentFiles(0), None)
        with pytest.raises(UserError) as error:
            dataset[0]
        sizes = re.compile(r'\d+×\d+: crop')  # by a random scale in training
        assert sizes.sub('', str(error.value)) == sizes.sub('', f'{file} {reason}')


def test_pipes_and_folders_in_the_place_of_files_are_named(tmp_path, tool_here):
    """Whoever opened a pipe would wait for a writer without an end."""
    write(tmp_path / 'data', saved(grey()))
    path = write_data_file(tmp_path / 'data')
    images, masks = (tmp_path / 'data' / kind / 'training' for kind in ('images', 'annotations'))
    for i in range(1, 4):
        shutil.copy(images / '0.jpg', images / f'{i}.jpg')
        shutil.copy(masks / '0.png', masks / f'{i}.png')
    os.mkfifo(replaced(masks / '0.png'))
    replaced(masks / '1.png').mkdir()
    with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(masks):
        replaced(masks / '2.png')
        opened.bind('2.png')
    os.mkfifo(replaced(images / '3.jpg'))
    process = tool_here('check_dataset', '--data', path, '--workers', 1)
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith(str(tmp_path))) == [
        f'{images / f"{i}.jpg"}: has no annotation: expected {masks / f"{i}.png"}' for i in range(3)
    ]
    for left_out in (masks / '0.png', masks / '1.png', masks / '2.png', images / '3.jpg'):
        assert any(line.startswith(f'warning: {left_out} is left out: ') for line in lines), left_out
    process = tool_here('train', TINY_CONFIG, '--data', path, '--weights', 'none', '--work-dir', 'work')
    assert_user_error(process, 'have no annotation', '0.jpg')


def test_pipes_in_the_place_of_files_in_mmsegs_data_sets(tmp_path, tool_here, mini_root, trained):
    shutil.copytree(mini_root, tmp_path / 'data')
    kinds = {kind: tmp_path / 'data' / kind / 'validation' for kind in ('images', 'annotations')}
    os.mkfifo(replaced(min(kinds['annotations'].iterdir())))
    root = ('--data-root', tmp_path / 'data')
    for command in (('train', TINY_CONFIG, '--work-dir', 'work'), ('test', TINY_CONFIG, trained, '--work-dir', 't')):
        assert_user_error(tool_here(*command, *root), 'have no annotation', 'annotations/validation')
    process = tool_here('check_dataset', TINY_CONFIG, *root)
    assert process.returncode == 1 and 'has no annotation: expected' in process.stdout


def replaced(path: Path) -> Path:
    path.unlink()
    return path
