import filecmp
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset
from PIL import Image

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.data.mini_ade20k import LABEL_OF, make_mini_ade20k, paint_scene


def files(root: Path) -> list[Path]:
    return sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file())


def test_layout_and_coding_are_those_of_ade20k(mini_root):
    assert files(mini_root) == sorted(
        Path(kind, split, f'ADE_{short}_{i:08d}{suffix}')
        for kind, suffix in (('images', '.jpg'), ('annotations', '.png'))
        for split, short, number in (('training', 'train', 4), ('validation', 'val', 2))
        for i in range(1, number + 1)
    )
    assert LABEL_OF['wall'] == 1 and LABEL_OF['sky'] == 3 and LABEL_OF['flag'] == 150
    for path in mini_root.glob('annotations/*/*.png'):
        labels = Image.open(path)
        assert labels.mode == 'L' and labels.size == (96, 96) and np.asarray(labels).max() <= 150
    for path in mini_root.glob('images/*/*.jpg'):
        assert Image.open(path).mode == 'RGB' and Image.open(path).size == (96, 96)


def test_mmseg_reads_it(mini_root):
    dataset = ADE20KDataset(
        data_root=str(mini_root),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
    )
    assert len(dataset) == 4
    assert dataset[0]['gt_seg_map'].shape == dataset[0]['img'].shape[:2]


def test_depends_on_the_seed_and_on_nothing_else(tmp_path):
    make_mini_ade20k(tmp_path / 'a', train=2, val=1, size=64, seed=3)
    make_mini_ade20k(tmp_path / 'b', train=3, val=2, size=64, seed=3)
    make_mini_ade20k(tmp_path / 'c', train=2, val=1, size=64, seed=4)
    for path in files(tmp_path / 'a'):
        assert filecmp.cmp(tmp_path / 'a' / path, tmp_path / 'b' / path, shallow=False), path
        assert not filecmp.cmp(tmp_path / 'a' / path, tmp_path / 'c' / path, shallow=False), path
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_scenes_are_varied_and_partly_unlabelled():
    labels = [paint_scene(np.random.default_rng(i), 96)[1] for i in range(40)]
    counts = np.bincount(np.concatenate([np.unique(label) for label in labels]), minlength=151)
    assert counts[0] > 10  # unlabelled pixels in many images
    assert (counts[1:] > 0).sum() >= 40  # classes
    assert min(len(np.unique(label)) for label in labels) >= 4
    assert np.mean([label == 0 for label in labels]) < 0.05


def test_colour_alone_does_not_tell_the_class():
    """A class lookup by quantised colour, fitted on other images, stays far from a perfect score."""
    scenes = [paint_scene(np.random.default_rng((7, i)), 96) for i in range(60)]
    votes = np.zeros((8**3, 151))
    accuracy = []
    for i, (image, labels) in enumerate(scenes):
        colour = (image // 32).astype(int) @ (64, 8, 1)
        if i < 45:
            np.add.at(votes, (colour.ravel(), labels.ravel()), 1)
        else:
            accuracy.append((votes.argmax(1)[colour] == labels).mean())
    assert np.mean(accuracy) < 0.6


@pytest.mark.parametrize('kwargs', [dict(train=0), dict(val=0), dict(size=32), dict(seed=-1)], ids=str)
def test_numbers_out_of_range(tmp_path, kwargs):
    with pytest.raises(UserError, match='at least'):
        make_mini_ade20k(tmp_path / 'x', **kwargs)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / 'mine.txt').write_text('')
    with pytest.raises(UserError, match='not empty'):
        make_mini_ade20k(tmp_path, train=1, val=1, size=64)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        make_mini_ade20k(tmp_path / 'file' / 'x', train=1, val=1, size=64)
