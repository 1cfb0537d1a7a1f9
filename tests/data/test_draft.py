"""Drafts of data files: the layouts that are known, and what the check says and proposes."""

import numpy as np
import pytest
import yaml
from PIL import Image
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.data.data_file import read_data_file
from mmseg_inceptionnext.data.draft import draft_data_file


def save(path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)


LAYOUTS = {
    'images and masks': ('images/train/{}.png', 'masks/train/{}.png'),
    'ADE20K': ('images/training/{}.png', 'annotations/training/{}.png'),
    'camvid': ('train/{}.png', 'trainannot/{}.png'),
    'train/images': ('train/images/{}.png', 'train/masks/{}.png'),
    'VOC': ('JPEGImages/{}.png', 'SegmentationClass/{}.png'),
    'Cityscapes': ('leftImg8bit/train/aachen/{}_leftImg8bit.png', 'gtFine/train/aachen/{}_gtFine_labelIds.png'),
    'one folder': ('{}.png', '{}_mask.png'),
    'no splits': ('images/{}.png', 'masks/{}.png'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_draft_finds_every_image_and_every_id(tmp_path, tool_here, name):
    for number in range(3):
        for template, values in zip(LAYOUTS[name], (np.full((40, 50, 3), 99), np.arange(40)[:, None] // 14 + np.zeros(
            (1, 50), int)), strict=True):  # fmt: skip
            save(tmp_path / 'd' / template.format(number), values)
    data = read_data_file(yaml.safe_load(draft_data_file(tmp_path / 'd')))
    assert [cls.codes for cls in data.classes] == [(0,), (1,), (2,)]

    process = tool_here('check_dataset', tmp_path / 'd', '--write', 'draft.yaml')
    assert process.returncode == 0, process.stderr
    process = tool_here('check_dataset', TINY_CONFIG, '--data', 'draft.yaml', '--workers', '1')
    assert process.returncode == 0, process.stdout + process.stderr
    assert ': 3 images' in process.stdout or '2 images' in process.stdout


def test_vocs_lists_say_which_images_have_masks(tmp_path, tool_here):
    for number in range(9):
        save(tmp_path / f'd/JPEGImages/{number}.jpg', np.full((40, 50, 3), 99))
        if number < 6:
            save(tmp_path / f'd/SegmentationClass/{number}.png', np.arange(40)[:, None] // 20 + np.zeros((1, 50), int))
    (tmp_path / 'd/ImageSets/Segmentation').mkdir(parents=True)
    for split, names in (('train', '0\n1\n2\n3\n'), ('val', '4\n5\n'), ('trainval', '0\n1\n2\n3\n4\n5\n')):
        (tmp_path / f'd/ImageSets/Segmentation/{split}.txt').write_text(names)
    assert tool_here('check_dataset', tmp_path / 'd', '--write', 'draft.yaml').returncode == 0
    process = tool_here('check_dataset', TINY_CONFIG, '--data', 'draft.yaml', '--workers', '1')
    assert process.returncode == 0, process.stdout + process.stderr
    assert 'train: 4 images' in process.stdout and 'val: 2 images' in process.stdout


def test_colours(tmp_path):
    save(tmp_path / 'images/0.png', np.zeros((4, 4, 3)))
    save(tmp_path / 'masks/0.png', [[[0, 0, 0], [255, 0, 0]]] * 4)
    data = read_data_file(yaml.safe_load(draft_data_file(tmp_path)))
    assert [cls.codes for cls in data.classes] == [((0, 0, 0),), ((255, 0, 0),)]


def test_folders_that_cannot_be_drafted(tmp_path):
    with pytest.raises(UserError, match='none of the layouts'):
        draft_data_file(tmp_path)
    with pytest.raises(UserError, match='no folder'):
        draft_data_file(tmp_path / 'nowhere')


def test_the_check_says_both_readings_shows_them_and_proposes_a_file(tmp_path, tool_here):
    for split in ('train', 'val'):
        for number in range(12):
            save(tmp_path / f'd/{split}/{number}.png', np.full((40, 60, 3), 99))
            save(tmp_path / f'd/{split}annot/{number}.png', np.arange(60)[None] // 20 + np.zeros((40, 1), int))
    (tmp_path / 'd.yaml').write_text(
        'path: d\ntrain: {images: train, masks: trainannot}\nval: {images: val, masks: valannot}\nclasses: [a, b]\n'
    )
    arguments = ('check_dataset', TINY_CONFIG, '--data', 'd.yaml', '--workers', '1')
    (tmp_path / 'other').mkdir()
    process = tool_here(*arguments, '--report', 'report', '--write', 'other/better.yaml')
    assert process.returncode == 1
    (line,) = [line for line in process.stdout.splitlines() if line.startswith('train: id')]
    assert 'id 2 is on 33.33% of the pixels, in 12 of 12 masks' in line
    assert 'ignore it (`ignore_classes: [2]`)?' in line and 'is id 0, on 33.33%, the unlabelled one' in line
    pictures = sorted(path.name for path in (tmp_path / 'report').iterdir())
    assert pictures == ['id_0_0.png', 'id_0_1.png', 'id_2_0.png', 'id_2_1.png']
    marked = np.asarray(Image.open(tmp_path / 'report' / 'id_2_0.png'))
    assert marked.shape == (40, 120, 3) and (marked[:, 100:, 1] < 50).all() and (marked[:, :100] == 99).all()
    assert tool_here('check_dataset', TINY_CONFIG, '--data', 'other/better.yaml', '--workers', '1').returncode == 0


@pytest.mark.parametrize('damaged', [False, True])
def test_examples_that_are_no_photographs_end_no_check(tmp_path, tool_here, damaged):
    for number in range(3):
        save(tmp_path / f'd/images/{number}.png', np.full((40, 60, 4), 99))
        save(tmp_path / f'd/masks/{number}.png', np.arange(60)[None] // 20 + np.zeros((40, 1), int))
    if damaged:
        (tmp_path / 'd/images/0.png').write_bytes((tmp_path / 'd/images/0.png').read_bytes()[:60])
    (tmp_path / 'd.yaml').write_text('path: d\ntrain: {images: images, masks: masks}\nclasses: [a, b]\nchannels: 4\n')
    process = tool_here('check_dataset', TINY_CONFIG, '--data', 'd.yaml', '--workers', '1', '--report', 'r')
    assert process.returncode == 1
    assert 'id 2 is on' in process.stdout and ('images/0.png' in process.stdout) == damaged
    assert len(list((tmp_path / 'r').iterdir()))


def test_a_fault_of_many_files_is_one_line(tmp_path, tool_here):
    for number in range(9):
        save(tmp_path / f'd/images/{number}.png', np.full((40, 60, 3), 99))
        save(tmp_path / f'd/masks/{number}.png', np.zeros((40, 61)))
    (tmp_path / 'd.yaml').write_text('path: d\ntrain: {images: images, masks: masks}\nclasses: [a, b]\n')
    process = tool_here('check_dataset', TINY_CONFIG, '--data', 'd.yaml', '--workers', '1')
    assert process.returncode == 1
    lines = [line for line in process.stdout.splitlines() if '61×40' in line]
    assert len(lines) <= 2 and 'files, such as' in lines[0]


def test_misspelt_names_and_the_list(tool_here):
    assert_user_error(tool_here('train', 'fpn/inceptionxt_t'), 'did you mean fpn/inceptionnext_t?')
    process = tool_here('train', '--list')
    assert process.returncode == 0
    lines = process.stdout.splitlines()
    assert any('upernet/inceptionnext_t ' in line and line.split()[-2] == '47.9' for line in lines)
