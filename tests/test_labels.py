import numpy as np
import pytest
from mmseg.utils import ade_classes, ade_palette

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.labels import check_num_classes, check_same_classes, classes_of_checkpoint, read_classes


def test_ade20k_is_mmsegs():
    classes = read_classes('ade20k')
    assert list(classes.names) == [name.strip() for name in ade_classes()]
    assert np.array_equal(classes.palette, ade_palette())
    assert classes.reduce_zero_label


def test_a_file_of_names_and_colours(tmp_path):
    lines = 'background #000000\n\ntraffic light, #FF8000\npotted plant\nbin\n'
    (tmp_path / 'c.txt').write_text(lines, 'utf-8-sig')  # as some editors write it
    classes = read_classes(tmp_path / 'c.txt')
    assert classes.names == ('background', 'traffic light', 'potted plant', 'bin')
    assert classes.palette[:2] == ((0, 0, 0), (255, 128, 0))


def test_colours_that_are_not_given_differ(tmp_path):
    (tmp_path / 'c.txt').write_text('\n'.join(f'class {i}' for i in range(60)))
    palette = np.array(read_classes(tmp_path / 'c.txt').palette)
    assert len(np.unique(palette, axis=0)) == 60 and palette.min() >= 0 and palette.max() <= 255
    assert min(abs(a - b).sum() for a, b in zip(palette, palette[1:], strict=False)) > 100


@pytest.mark.parametrize(
    ('content', 'message'),
    [(None, 'cannot read'), (b'\n', 'holds no classes'), (b'a\nb\na', "'a' twice"), (b'\xff\xfe', 'cannot read'),
     (b'road #zzzzzz', 'neither NAME nor NAME #RRGGBB'), (b'#ff0000', 'neither NAME nor')],
)  # fmt: skip
def test_files_that_do_not_do(tmp_path, content, message):
    path = tmp_path / 'c.txt'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_classes(path)


@pytest.mark.parametrize(
    'checkpoint',
    [{}, {'meta': {}}, {'meta': None}, {'meta': {'dataset_meta': None}}, {'meta': {'CLASSES': None, 'PALETTE': None}},
     {'meta': {'CLASSES': ['a']}}, *(
        {'meta': {'dataset_meta': meta}}
        for meta in (dict(classes=['a']), dict(classes=['a'], palette=[]), dict(classes=['a'], palette=['x']),
                     dict(classes=5, palette=5), dict(classes=['a'], palette=[[0, 0, 256]]),
                     dict(classes=['a'], palette=[[0, 0, 0]], codes=[70000]),
                     dict(classes=['a'], palette=[[0, 0, float('inf')]]))
    )],
)  # fmt: skip
def test_a_checkpoint_without_classes_is_not_guessed(checkpoint):
    with pytest.raises(UserError, match=r"x\.pth does not say what its classes are: pass classes='ade20k'"):
        classes_of_checkpoint(checkpoint, 'x.pth')


def test_of_a_checkpoint():
    meta = dict(classes=['a ', 'b'], palette=np.array([[1, 2, 3], [4, 5, 6]]), reduce_zero_label=False)
    classes = classes_of_checkpoint({'meta': {'dataset_meta': meta}}, 'x.pth')
    assert (classes.names, classes.palette) == (('a', 'b'), ((1, 2, 3), (4, 5, 6)))
    assert not classes.reduce_zero_label


def test_of_a_checkpoint_of_mmseg_0():
    old = {'meta': dict(mmseg_version='0.30.0', CLASSES=('a', 'b'), PALETTE=np.array([[1, 2, 3], [4, 5, 6]]))}
    new = {'meta': dict(dataset_meta=dict(classes=('a', 'b'), palette=[[1, 2, 3], [4, 5, 6]]))}
    assert classes_of_checkpoint(old, 'x.pth') == classes_of_checkpoint(new, 'x.pth')
    both = {'meta': new['meta'] | dict(CLASSES=('c',), PALETTE=[[0, 0, 0]])}
    assert classes_of_checkpoint(both, 'x.pth').names == ('a', 'b')
    with pytest.raises(UserError, match="'a' is 'b' here, and all are in another order"):
        check_same_classes(old, 'x.pth', ('b', 'a'))


def test_another_number_than_the_models():
    with pytest.raises(UserError, match='c.txt names 2 classes, but the model has 150'):
        check_num_classes('ab', 150, 'c.txt')
