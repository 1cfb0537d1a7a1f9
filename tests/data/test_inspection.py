import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset, PascalVOCDataset
from PIL import Image
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.config import override, read_config
from mmseg_inceptionnext.data import read_pairs
from mmseg_inceptionnext.data.inspection import Coding, coding_warnings, inspect_data, inspection_text
from mmseg_inceptionnext.data.read_pairs import read_pair

NAMES = [f'ADE_train_{i:08d}' for i in range(1, 5)]


@pytest.fixture
def root(mini_root, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(mini_root, tmp_path / 'data')


@pytest.fixture
def cfg(root):
    cfg = read_config(TINY_CONFIG)
    override(cfg, root)
    return cfg


def image(root: Path, name: str = NAMES[1], split: str = 'training') -> Path:
    return root / 'images' / split / f'{name}.jpg'


def annotation(root: Path, name: str = NAMES[1], split: str = 'training') -> Path:
    return root / 'annotations' / split / f'{name}.png'


def relabel(root: Path, change) -> None:
    """Change the values of every annotation."""
    for path in root.glob('annotations/*/*.png'):
        Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)


def wrong(found) -> dict[str, str]:
    return {Path(entry['file']).name: entry['reason'] for split in found.splits.values() for entry in split.wrong}


def use_own_classes(cfg, number: int, **options) -> None:
    """A data set of your own instead of ADE20K."""
    metainfo = dict(classes=[f'class {i}' for i in range(number)])
    for split in ('train', 'val', 'test'):
        old = cfg[f'{split}_dataloader'].dataset
        cfg[f'{split}_dataloader'].dataset = dict(
            type='BaseSegDataset', data_root=old.data_root, data_prefix=old.data_prefix, pipeline=old.pipeline,
            metainfo=metainfo, **options,
        )  # fmt: skip
    cfg.model.decode_head.num_classes = number


def test_a_sound_data_set_is_counted_exactly(root, cfg):
    found = inspect_data(cfg)
    assert found.ok and not found.warnings and not found.problems and set(found.splits) == {'train', 'val'}
    labels = np.stack([np.array(Image.open(path)) for path in sorted(annotation(root).parent.iterdir())])
    pixels = np.bincount(labels.ravel(), minlength=151)
    split = found.splits['train']
    assert [count['pixels'] for count in split.classes.values()] == pixels[1:151].tolist()
    files = [sum((one == label).any() for one in labels) for label in range(1, 151)]
    assert [count['files'] for count in split.classes.values()] == files
    assert split.ignored_pixels == pixels[0] and split.pixels == labels.size
    assert split.images == split.annotations == split.checked == 4
    assert split.sizes == dict(min=(96, 96), median=(96, 96), max=(96, 96))
    assert 'train: 4 images, 96×96' in inspection_text(found)


def test_real_ade20k_is_sound(ade20k_sample):
    """Training and validation are the same two pairs there, which is the one thing to warn of."""
    cfg = read_config('upernet/inceptionnext_t')
    override(cfg, ade20k_sample)
    found = inspect_data(cfg)
    assert found.ok and len(found.duplicates) == 2
    assert len(found.warnings) == 1 and 'held out' in found.warnings[0]


def test_several_processes_find_the_same(root, cfg):
    image(root).write_bytes(b'')
    annotation(root, NAMES[2]).unlink()
    assert inspect_data(cfg, workers=2) == inspect_data(cfg, workers=1)


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _bomb(content: bytes) -> bytes:
    """The header of a JPEG, of 65000×65000 pixels."""
    at = content.index(b'\xff\xc0') + 5
    return content[:at] + b'\xfd\xe8\xfd\xe8' + content[at + 4 :]


@pytest.mark.parametrize('of', [image, annotation])
@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (_half, 'truncated'),
        (lambda content: content[:-20], 'truncated|broken'),
        (lambda content: b'', '^is empty$'),
        (lambda content: b'<html>Not found</html>', 'not an image'),
    ],
    ids=['half', 'tail', 'empty', 'text'],
)
def test_a_damaged_file_is_named(root, cfg, of, damage, reason):
    path = of(root)
    path.write_bytes(damage(path.read_bytes()))
    found = inspect_data(cfg)
    assert not found.ok and list(wrong(found)) == [path.name] and re.search(reason, wrong(found)[path.name].lower())


def test_a_flipped_bit_of_a_png_is_found(root, cfg):
    """It may decode all the same, to other labels."""
    content = bytearray(annotation(root).read_bytes())
    content[len(content) // 2] ^= 1
    annotation(root).write_bytes(content)
    assert list(wrong(inspect_data(cfg))) == [annotation(root).name]


def test_a_decompression_bomb_is_named(root, cfg):
    image(root).write_bytes(_bomb(image(root).read_bytes()))
    assert 'decompression bomb' in wrong(inspect_data(cfg))[image(root).name]


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may read everything')
def test_a_file_without_permission_is_named(root, cfg):
    image(root).chmod(0)
    assert 'Permission denied' in wrong(inspect_data(cfg))[image(root).name]


def test_a_pipe_does_not_hang(root):
    os.mkfifo(root / 'pipe.jpg')
    assert read_pair(str(root / 'pipe.jpg'), None).wrong == [
        (str(root / 'pipe.jpg'), 'a directory, a pipe or a device, not a file')
    ]


def test_damage_raises_nothing(root):
    rng = np.random.default_rng(0)
    for path in (image(root), annotation(root)):
        content = bytearray(path.read_bytes())
        for _ in range(100):
            damaged = content.copy()
            for at in rng.integers(0, len(content), 5):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged[: rng.integers(1, len(content) + 1)])
            read_pair(str(image(root)), str(annotation(root)))


def _jpegs() -> Iterator[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (19, 27, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((108, 76))
    for mode, options in (('RGB', {}), ('RGB', dict(progressive=True)), ('L', {}), ('CMYK', {}),
                          ('RGB', dict(restart_marker_blocks=3, subsampling=0))):  # fmt: skip
        file = BytesIO()
        picture.convert(mode).save(file, 'JPEG', **options)
        yield file.getvalue()


def test_the_fast_decoding_finds_every_truncation_that_full_decoding_finds(tmp_path):
    path = tmp_path / 'a.jpg'
    for content in _jpegs():
        for end in range(1, len(content) + 1, 7):
            path.write_bytes(content[:end])
            try:
                with Image.open(path) as full:
                    full.load()
                sound = True
            except (OSError, SyntaxError):
                sound = False
            assert bool(read_pair(str(path), None).wrong) != sound, end


def test_pairs_match_both_ways(root, cfg):
    annotation(root).unlink()
    image(root, NAMES[2]).unlink()
    found = inspect_data(cfg)
    assert 'has no annotation: expected' in wrong(found)[image(root).name]
    assert found.splits['train'].orphans == [str(annotation(root, NAMES[2]))]
    assert any('1 annotations have no image' in line for line in found.warnings)
    assert found.splits['train'].images == 3 and found.splits['train'].annotations == 2


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (lambda labels: labels[:-8], r'is 96×88, but .*ADE_train_00000002\.jpg is 96×96'),
        (lambda labels: np.where(labels == labels.max(), 151, labels), 'has label 151, outside 1 … 150'),
        (lambda labels: np.stack([labels] * 3, axis=-1), 'has 3 channels'),
        (lambda labels: np.stack([labels] * 4, axis=-1), 'has 4 channels'),
        (lambda labels: labels.astype(np.uint16) + 256, r'has label \d+: an annotation has 8 bits'),
    ],
    ids=['size', 'label', 'RGB', 'RGBA', '16 bits'],
)
def test_an_unusable_annotation_is_named(root, cfg, damage, reason):
    labels = damage(np.array(Image.open(annotation(root))))
    Image.fromarray(labels if labels.dtype == np.uint16 else labels.astype(np.uint8)).save(annotation(root))
    found = wrong(inspect_data(cfg))
    assert list(found) == [annotation(root).name] and re.match(reason, found[annotation(root).name])


def test_palettes_are_read_as_indices_but_by_opencv(root, cfg):
    before = inspect_data(cfg)
    stored = Image.open(annotation(root))
    stored.putpalette(np.random.default_rng(0).integers(0, 255, 768).astype(np.uint8).tobytes())
    stored.save(annotation(root))
    assert Image.open(annotation(root)).mode == 'P' and inspect_data(cfg) == before
    cfg.train_dataloader.dataset.pipeline[2].imdecode_backend = 'cv2'
    assert "imdecode_backend='cv2' reads as colours" in wrong(inspect_data(cfg))[annotation(root).name]


def test_images_that_are_odd_but_fine(root, cfg):
    """An animation, CMYK, a turned photograph and 16 bits, whatever the ending says: OpenCV reads them, too."""
    pictures = [Image.open(image(root, name)).convert('RGB') for name in NAMES]
    pictures[0].save(image(root, NAMES[0]), 'GIF', save_all=True, append_images=pictures[1:])
    pictures[1].convert('CMYK').save(image(root, NAMES[1]))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[2].crop((0, 0, 96, 64)).save(image(root, NAMES[2]), exif=exif)
    Image.fromarray(np.array(Image.open(annotation(root, NAMES[2])))[:, :64]).save(annotation(root, NAMES[2]))
    Image.fromarray(np.array(pictures[3].convert('L')).astype(np.uint16) * 257).save(image(root, NAMES[3]), 'PNG')
    found = inspect_data(cfg)
    assert found.ok and found.splits['train'].sizes['min'] == (64, 96)


def test_an_annotation_is_not_turned(root, cfg):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image(root)).crop((0, 0, 96, 64)).save(image(root), exif=exif)
    Image.fromarray(np.array(Image.open(annotation(root)))[:64]).save(annotation(root))
    assert 'is 96×64, but' in wrong(inspect_data(cfg))[annotation(root).name]


def turn(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_images_of_which_sizes_do_not_tell(root, cfg, orientation):
    turn(image(root), orientation)
    turn(image(root, NAMES[2]), orientation)
    found = inspect_data(cfg)
    lines = [line for line in found.warnings if 'EXIF orientation' in line]
    assert found.ok and len(lines) == (orientation > 1)
    for line in lines:
        assert line.startswith(
            'train: 2 images have an EXIF orientation, by which they are mirrored or turned when they'
        )
        assert f'such as {image(root)}, {image(root, NAMES[2])}; their masks are taken as they are stored' in line


def test_a_turned_image_whose_size_tells_and_one_without_a_mask(root, cfg):
    """The mask of the first is of the size of the image as it is read."""
    Image.open(image(root)).crop((0, 0, 96, 64)).save(image(root))
    turn(image(root), 6)
    Image.fromarray(np.array(Image.open(annotation(root)))[:, :64]).save(annotation(root))
    turn(image(root, NAMES[2]), 3)
    annotation(root, NAMES[2]).unlink()
    found = inspect_data(cfg)
    assert list(wrong(found)) == [image(root, NAMES[2]).name] and not found.warnings


def as_palette(root: Path, name: str, colours: np.ndarray, indices=None) -> None:
    """Store an annotation with a palette, at other indices if they are given for each value."""
    labels = np.array(Image.open(annotation(root, name)))
    stored = Image.fromarray(labels if indices is None else np.asarray(indices, np.uint8)[labels])
    stored.putpalette(np.asarray(colours, np.uint8).tobytes())
    stored.save(annotation(root, name))


ADE20K_COLOURS = np.array([(0, 0, 0), *ADE20KDataset.METAINFO['palette'], *[(1, 1, 1)] * 105], np.uint8)


def compacted(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the colours of an annotation's classes without gaps, and the index of each value among them."""
    values = np.union1d([0], np.array(Image.open(annotation(root, name))))
    indices = np.zeros(256, int)
    indices[values] = np.arange(len(values))
    return ADE20K_COLOURS[values], indices


def test_palettes_whose_indices_differ_from_file_to_file(root, cfg):
    for name in NAMES:
        as_palette(root, name, *compacted(root, name))
    lines = [line for line in inspect_data(cfg).warnings if 'palettes' in line]
    assert len(lines) == 1 and re.match(
        r'train: index (\d+) of the palettes is the colour \[.*\] in .*00001\.png, but \[.*\] in .*\.png \(\d masks '
        r'differ so\): if the colours stand for the classes, name them in a data file \(`labels: \[\[r, g, b\]\]`\)',
        lines[0],
    )


def test_one_palette_whose_indices_are_not_those_of_the_classes(root, cfg):
    """The colours are the config's, at other places."""
    order = np.arange(256)
    order[1:151] = order[1:151][::-1]
    for name in NAMES:
        as_palette(root, name, ADE20K_COLOURS[order])
    lines = [line for line in inspect_data(cfg).warnings if 'palette' in line]
    assert len(lines) == 1
    value, colour, there, read = re.match(
        r'train: index (\d+) is the colour (\[.*\]) in the palette of .*, which is that of class (\d+), but is read as '
        r'class (\d+): if the colours',
        lines[0],
    ).groups()
    assert int(read) == int(value) - 1 and int(there) == 150 - int(value)
    assert json.loads(colour) == ADE20KDataset.METAINFO['palette'][int(there)]


@pytest.mark.parametrize(
    'colours',
    [
        ADE20K_COLOURS,
        PascalVOCDataset.METAINFO['palette'],
        np.random.default_rng(0).integers(0, 255, (256, 3)),
        np.repeat(np.arange(256)[:, None], 3, axis=1),
    ],
    ids=['its own', 'VOC', 'random', 'grey'],
)
def test_palettes_that_are_the_same_everywhere_are_fine(root, cfg, colours):
    for name in NAMES:
        as_palette(root, name, colours)
    assert not inspect_data(cfg).warnings


def test_an_image_that_vanishes_when_resized(root, cfg):
    Image.new('RGB', (2, 20000)).save(image(root))
    Image.new('L', (2, 20000), 1).save(annotation(root))
    found = wrong(inspect_data(cfg))
    assert (
        list(found) == [image(root).name] and 'is 2×20000, which the pipeline resizes to 0×' in found[image(root).name]
    )


@pytest.mark.parametrize('reduce_zero_label', [True, False])
def test_masks_of_0_and_255(root, cfg, reduce_zero_label):
    use_own_classes(cfg, 2, reduce_zero_label=reduce_zero_label)
    relabel(root, lambda labels: np.where(labels > 20, 255, 0))
    first = int(reduce_zero_label)
    lines = [line for line in inspect_data(cfg).warnings if 'no label but 0 and 255' in line]
    assert len(lines) == 1 and f'write {first} and {first + 1} instead' in lines[0]


@pytest.mark.parametrize(
    ('reduce_zero_label', 'change', 'part'),
    [
        (True, lambda labels: labels % 3 * (labels % 2), '0 is on'),
        (True, lambda labels: np.arange(labels.size).reshape(labels.shape) % 3, 'labels are 0 … 2, and 3 is nowhere'),
        (False, lambda labels: labels % 3 + 1, 'set reduce_zero_label=True'),
        (True, lambda labels: labels % 3 + 1, None),
        (False, lambda labels: labels % 3, None),
    ],
)
def test_signs_of_another_coding(root, cfg, reduce_zero_label, change, part):
    use_own_classes(cfg, 3, reduce_zero_label=reduce_zero_label)
    relabel(root, change)
    lines = [line for line in inspect_data(cfg).warnings if 'the same file' not in line]
    assert [part in line for line in lines] == ([True] if part else []), lines


def test_ade20ks_own_shares_give_no_warning():
    """8 % unlabelled and all of 1 … 150."""
    coding = Coding(True, 150)
    coding.add(np.array([12, *[1] * 150, *[0] * 105]))
    assert not list(coding_warnings(coding))


def test_images_without_a_labelled_pixel(root, cfg):
    Image.new('L', (96, 96), 0).save(annotation(root))
    found = inspect_data(cfg)
    assert found.ok and found.splits['train'].without_labels == [str(image(root))]
    assert any('1 images have no labelled pixel' in line for line in found.warnings)


def test_duplicates(root, cfg):
    for target in (image(root, NAMES[0]), image(root, 'ADE_val_00000001', 'validation')):
        shutil.copy(image(root, NAMES[2]), target)
    found = inspect_data(cfg)
    assert found.duplicates == [
        (str(image(root, NAMES[0])), str(image(root, 'ADE_val_00000001', 'validation')))
    ]  # fmt: skip
    assert found.splits['train'].duplicates == 1 and found.ok
    assert any('held out' in line for line in found.warnings)


@pytest.mark.parametrize('by_name', [True, False])
def test_a_partial_ade20k(root, cfg, by_name):
    if by_name:
        override(cfg, root.rename(root.with_name('ADEChallengeData2016')))
    else:
        (root / 'objectInfo150.txt').touch()
    found = inspect_data(cfg)
    assert not found.ok and not wrong(found) and len(found.problems) == 2
    assert 'this looks like a partial download: 4 of 20 210 training images' in found.problems[0]
    assert '2 of 2 000 validation images' in found.problems[1]


def test_another_number_of_classes_does_not_hide_wrong_files(root, cfg):
    cfg.model.auxiliary_head = dict(cfg.model.decode_head, num_classes=21)
    image(root).write_bytes(b'')
    found = inspect_data(cfg)
    assert found.problems == ['model.auxiliary_head.num_classes is 21, but the data set has 150 classes']
    assert list(wrong(found)) == [image(root).name]


def test_inside_wrappers_and_the_test_split(root, cfg):
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=dataset)]
    )
    cfg.test_dataloader.dataset.data_prefix = dict(img_path='images/training', seg_map_path='nowhere')
    image(root).write_bytes(b'')
    found = inspect_data(cfg)
    assert [len(split.wrong) for split in found.splits.values()] == [1, 0, 1]
    assert found.splits['test'].annotations == 0 and 'test: 4 images' in inspection_text(found)


def test_training_without_any_annotation(root, cfg):
    del cfg.train_dataloader.dataset.data_prefix['seg_map_path']
    found = inspect_data(cfg)
    assert found.problems == ['train: no image has an annotation: correct data_prefix.seg_map_path'] and not found.ok


def test_chosen_classes_are_counted_as_mmseg_maps_them(root, cfg):
    """`metainfo` may name some of ADE20K's classes: the others are ignored."""
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=['sky', 'wall'])
    cfg.model.decode_head.num_classes = 2
    found = inspect_data(cfg)
    labels = np.stack([np.array(Image.open(path)) for path in annotation(root).parent.iterdir()])
    pixels = {'sky': int((labels == 3).sum()), 'wall': int((labels == 1).sum())}
    split = found.splits['train']
    assert {name: count['pixels'] for name, count in split.classes.items()} == pixels
    assert split.ignored_pixels == labels.size - sum(pixels.values()) and found.ok


def test_a_sample_compares_all_names(root, cfg):
    annotation(root, NAMES[1]).unlink()
    for name in NAMES[1:3]:
        image(root, name).write_bytes(b'')
    found = inspect_data(cfg, sample=2)
    assert found.splits['train'].checked == 2 and found.splits['train'].images == 4
    assert 'no annotation' in wrong(found)[f'{NAMES[1]}.jpg'] and len(wrong(found)) == 1  # first and last are read
    assert 'a sample of 2 checked' in inspection_text(found)


def test_a_killed_process_is_one_line_that_names_the_files(root, cfg, monkeypatch):
    monkeypatch.setattr(read_pairs, 'read_pair', lambda image, annotation, *_: os._exit(9))
    with pytest.raises(UserError) as caught:
        inspect_data(cfg, workers=2)
    assert str(image(root)) in str(caught.value) and '\n' not in str(caught.value)


def test_the_tool_lists_what_is_wrong(tool_here, root, tmp_path):
    image(root).write_bytes(b'')
    annotation(root, NAMES[2]).unlink()
    options = ['--json', 'new/found.json', '--cfg-options', 'model.decode_head.num_classes=21']
    process = tool_here('check_dataset', TINY_CONFIG, '--data-root', root, *options)
    assert process.returncode == 1
    assert process.stdout.splitlines() == [
        f'{image(root, NAMES[2])}: has no annotation: expected {annotation(root, NAMES[2])}',
        f'{image(root)}: is empty',
        'model.decode_head.num_classes is 21, but the data set has 150 classes',
    ]
    assert process.stderr == 'error: 2 wrong files and 1 other problems\n'
    found = json.loads((tmp_path / 'new' / 'found.json').read_text())
    assert set(found) == {'ok', 'splits', 'duplicates', 'problems', 'warnings'} and found['ok'] is False
    keys = {'images', 'checked', 'annotations', 'pixels', 'ignored_pixels', 'classes', 'without_labels', 'wrong'}
    assert set(found['splits']['train']) == keys | {'orphans', 'sizes', 'duplicates'}
    assert found['splits']['train']['wrong'][1] == dict(file=str(image(root)), reason='is empty')


def test_the_tool_on_a_sound_data_set(tool_here, root, cfg, tmp_path):
    process = tool_here('check_dataset', TINY_CONFIG, '--data-root', root, '--json', 'found.json')
    found = inspect_data(cfg)
    assert process.returncode == 0 and process.stderr == '' and process.stdout == inspection_text(found) + '\n'
    assert json.loads((tmp_path / 'found.json').read_text()) == json.loads(json.dumps(dataclasses.asdict(found)))
    assert {path.name for path in tmp_path.iterdir()} == {'data', 'found.json'}  # no work dir


def test_mistakes_of_the_tool(tool_here, root):
    data = ('--data-root', root)
    assert_user_error(tool_here('check_dataset', 'nowhere.py'), 'no config at')
    assert_user_error(tool_here('check_dataset', TINY_CONFIG, '--data-root', 'no'), 'no data set at')
    assert_user_error(tool_here('check_dataset', TINY_CONFIG, *data, '--workers', 0), 'not a positive whole number')
    names = ('--cfg-options', 'train_dataloader.dataset.ann_file=train.txt')
    assert_user_error(tool_here('check_dataset', TINY_CONFIG, *data, *names), 'no list of images at')
    coding = ('--cfg-options', 'train_dataloader.dataset.pipeline.2.reduce_zero_label=False')
    assert_user_error(tool_here('check_dataset', TINY_CONFIG, *data, *coding), 'LoadAnnotations does not fit')
    shutil.rmtree(root / 'annotations' / 'validation')
    assert_user_error(tool_here('check_dataset', TINY_CONFIG, *data), 'no folder', 'annotations/validation')
