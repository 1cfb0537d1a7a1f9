"""The Python API: the predictions of tools/test.py, from whatever holds an image."""

import copy
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, TINY_CONFIG

from mmseg_inceptionnext import Segmentation, Segmentor, UserError, trusting_checkpoints
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import find_config, load_config, read_config
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.labels import Classes


@pytest.fixture(scope='module')
def segmentor(trained):
    return Segmentor(TINY_CONFIG, trained, device='cpu', precision='fp32')


@pytest.fixture(scope='module')
def paths(mini_root):
    return sorted((mini_root / 'images' / 'validation').iterdir())


def test_predicts_what_evaluation_predicts(segmentor, trained, paths, mini_root, tmp_path):
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', mini_root)
    evaluate(cfg, trained, out=tmp_path / 'out')
    for path in paths:
        expected = np.asarray(Image.open(tmp_path / 'out' / f'{path.stem}.png'))
        assert np.array_equal(np.asarray(segmentor(path).label_image()), expected)


def test_every_kind_of_source_and_a_batch_give_the_same(segmentor, paths):
    path = paths[0]
    result = segmentor(str(path))
    assert isinstance(result, Segmentation)
    assert result.labels.shape == result.image.shape[:2] == (96, 96) and result.labels.dtype == np.int16
    with Image.open(path) as image:
        sources = [path, image, np.asarray(image), np.asarray(image)[:48]]
        results = segmentor(sources, batch_size=3)
    assert len(results) == 4
    for other in results[:3]:
        assert (other.labels != result.labels).mean() < 0.001  # of a batch, other kernels may be chosen
        assert np.array_equal(other.image, result.image)
    assert results[3].labels.shape == (48, 96)
    assert segmentor([]) == []


def test_slow_and_fast_agree(trained, segmentor, paths):
    slow = Segmentor(read_config(TINY_CONFIG), trained, device='cpu', fast=False, precision='fp32')
    assert np.array_equal(slow(paths[0]).labels, segmentor(paths[0]).labels)


def test_classes_come_from_the_checkpoint(segmentor):
    assert len(segmentor.classes.names) == 150 and segmentor.classes.names[:3] == ('wall', 'building', 'sky')
    assert segmentor.classes.palette[0] == (120, 120, 120)


def test_classes_are_asked_for_never_guessed(trained, paths, tmp_path):
    weights = read_checkpoint(trained)['state_dict']
    torch.save({'state_dict': weights}, tmp_path / 'bare.pth')
    with pytest.raises(UserError, match='bare.pth does not say what its classes are'):
        Segmentor(TINY_CONFIG, tmp_path / 'bare.pth')
    assert Segmentor(TINY_CONFIG, tmp_path / 'bare.pth', classes='ade20k')(paths[0]).class_names[0] == 'wall'
    (tmp_path / 'two.txt').write_text('a\nb\n')
    with pytest.raises(UserError, match='two.txt names 2 classes, but the model has 150'):
        Segmentor(TINY_CONFIG, tmp_path / 'bare.pth', classes=tmp_path / 'two.txt')


def test_classes_of_a_checkpoint_of_mmseg_0(trained, segmentor, paths, tmp_path):
    content = read_checkpoint(trained)
    said = content['meta'].pop('dataset_meta')
    content['meta'] |= dict(CLASSES=said['classes'], PALETTE=said['palette'])
    torch.save(content, tmp_path / 'old.pth')
    old = Segmentor(TINY_CONFIG, tmp_path / 'old.pth', device='cpu', precision='fp32')
    assert old.classes == segmentor.classes
    assert np.array_equal(old(paths[0]).labels, segmentor(paths[0]).labels)


@pytest.mark.parametrize('fast', [False, True], ids=['plain', 'fast'])
def test_copies_predict_the_same(trained, paths, tmp_path, monkeypatch, fast):
    """Also where the relative paths that it was made from would lead elsewhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained, 'model.pth')
    (tmp_path / 'names.txt').write_text('\n'.join(f'class {i}' for i in range(150)))
    (tmp_path / 'config.py').write_text(f'_base_ = {str(TINY_CONFIG)!r}\n')
    segmentor = Segmentor('config.py', 'model.pth', 'cpu', 'names.txt', fast, 'fp32')
    expected = segmentor(paths[0])
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    for other in (pickle.loads(pickle.dumps(segmentor)), copy.deepcopy(segmentor)):
        assert other.classes == segmentor.classes and other.device == segmentor.device
        assert np.array_equal(other(paths[0]).labels, expected.labels)
    from_a_config = Segmentor(read_config(TINY_CONFIG), trained, 'cpu', fast=fast, precision='fp32')
    assert np.array_equal(pickle.loads(pickle.dumps(from_a_config))(paths[0]).labels, expected.labels)
    by_name = Segmentor.__new__(Segmentor)
    monkeypatch.setattr(Segmentor, '_open_trained', lambda self, *_: setattr(self, '_model', None))
    by_name.__init__('mini/fpn_inceptionnext_a', 'model.pth')
    assert by_name.__reduce__()[1][0].samefile(ROOT / 'configs' / 'mini' / 'fpn_inceptionnext_a.py')


def test_a_worker_process_predicts_the_same(segmentor, paths):
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        (result,) = pool.map(segmentor, paths[:1])
    assert np.array_equal(result.labels, segmentor(paths[0]).labels)


class Code:
    ran = False

    def __reduce__(self):
        return run_code, ()


def run_code() -> str:
    Code.ran = True
    return 'code'


def test_a_copy_obeys_the_rules_of_the_process_that_makes_it(trained, tmp_path):
    torch.save(read_checkpoint(trained) | dict(code=Code()), tmp_path / 'code.pth')
    with trusting_checkpoints():
        content = pickle.dumps(Segmentor(TINY_CONFIG, tmp_path / 'code.pth', device='cpu'))
        assert Code.ran
        Code.ran = False
        pickle.loads(content)
        assert Code.ran
    Code.ran = False
    with pytest.raises(UserError, match='code.pth is refused: it wants to run'):
        pickle.loads(content)
    assert not Code.ran


def test_mistakes(trained, segmentor, tmp_path):
    with pytest.raises(UserError, match="device='nonsense' cannot be used here"):
        Segmentor(TINY_CONFIG, trained, device='nonsense')
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda:7' cannot be used here"):
            Segmentor(TINY_CONFIG, trained, device='cuda:7')
    with pytest.raises(UserError, match='nowhere.jpg: no such file'):
        segmentor(tmp_path / 'nowhere.jpg')
    with pytest.raises(UserError, match='does not fit the config'):
        Segmentor('mini/fpn_inceptionnext_a', trained)
    with pytest.raises(UserError, match="device='meta' cannot be used here"):
        Segmentor(TINY_CONFIG, trained, device='meta')
    with pytest.raises(TypeError):
        segmentor(7)
    with pytest.raises(ValueError, match='batch_size=0'):
        segmentor([], batch_size=0)
    with pytest.raises(ValueError, match='opacity=2'):
        result([[0]]).overlay(opacity=2)


@pytest.mark.parametrize('shape', [(1, 3000), (3000, 1), (3, 500)])
def test_images_too_thin_for_the_network(segmentor, shape):
    with pytest.raises(UserError, match=f'{shape[1]}×{shape[0]} pixels are too thin'):
        segmentor(np.zeros((*shape, 3), np.uint8))


@pytest.mark.parametrize('shape', [(1, 1), (30, 117), (117, 30)])
def test_small_images(segmentor, shape):
    assert segmentor(np.zeros((*shape, 3), np.uint8)).labels.shape == shape


def test_a_file_of_classes_leaves_the_coding_as_the_checkpoint_says(trained, paths, tmp_path):
    content = read_checkpoint(trained)
    content['meta']['dataset_meta']['reduce_zero_label'] = False
    torch.save(content, tmp_path / 'plain.pth')
    coded = [
        np.asarray(
            Segmentor(TINY_CONFIG, tmp_path / 'plain.pth', classes=classes, precision='fp32')(paths[0]).label_image()
        )
        for classes in (None, 'ade20k')
    ]
    assert np.array_equal(*coded)


def result(labels, reduce_zero_label=True) -> Segmentation:
    codes = (1, 2, 3) if reduce_zero_label else (0, 1, 2)
    classes = Classes(('sky', 'sea', 'sand'), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), codes)
    labels = np.array(labels, np.int16)
    return Segmentation(np.full((*labels.shape, 3), 100, np.uint8), labels, classes)


def test_areas():
    segmentation = result([[0, 2, 2, 2]])
    assert segmentation.area('sand') == 0.75 and segmentation.area('sea') == 0
    assert segmentation.areas() == {'sand': 0.75, 'sky': 0.25}
    with pytest.raises(KeyError, match="no class 'moon'"):
        segmentation.area('moon')


def test_it_is_printed_in_a_line():
    assert repr(result([[0, 2, 2, 2]])) == 'Segmentation(4×1: sand 75.0%, sky 25.0%)'
    many = Classes(tuple('abcde'), ((0, 0, 0),) * 5)
    text = repr(Segmentation(np.zeros((1, 5, 3), np.uint8), np.arange(5, dtype=np.int16)[None], many))
    assert text == 'Segmentation(5×1: a 20.0%, b 20.0%, c 20.0%, 2 more)'


def test_overlay_and_its_legend():
    segmentation = result([[0] * 60 + [2] * 140] * 100)
    plain, named = segmentation.overlay(opacity=1.0), segmentation.overlay(legend=True)
    assert plain.size == (200, 100) and plain.getpixel((0, 0)) == (255, 0, 0)
    assert segmentation.overlay(opacity=0.0).getpixel((0, 0)) == (100, 100, 100)
    assert named.width == 200 and named.height > 100
    colours = {named.getpixel((x, y)) for x in range(200) for y in range(100, named.height)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours and (0, 255, 0) not in colours


@pytest.mark.parametrize('shape', [(1, 1), (3, 500), (500, 3)])
def test_a_legend_on_odd_shapes(shape):
    picture = result(np.zeros(shape)).overlay(legend=True)
    assert picture.width >= shape[1] and picture.height > shape[0]


@pytest.mark.parametrize(('reduced', 'expected'), [(True, [1, 3]), (False, [0, 2])])
def test_label_image_is_coded_as_annotations_are(reduced, expected):
    assert np.asarray(result([[0, 2]], reduced).label_image()).tolist() == [expected]


def test_configs_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = ROOT / 'configs' / 'upernet' / 'inceptionnext_t.py'
    for name in ('upernet/inceptionnext_t', 'upernet/inceptionnext_t.py'):
        assert find_config(name).samefile(expected)
    assert find_config('upernet_inceptionnext_a').parent.name == 'mini'
    with pytest.raises(
        UserError, match='several configs: say which of fpn/inceptionnext_t, imagenet/inceptionnext_t, upernet'
    ):
        find_config('inceptionnext_t')
    for name in ('upernet/inceptionnext_x', '/nowhere/upernet/inceptionnext_t', '_base_/default_runtime', '.'):
        with pytest.raises(UserError, match='no config at'):
            find_config(name)
    shutil.copy(TINY_CONFIG, tmp_path / 'upernet_inceptionnext_a')
    assert find_config('upernet_inceptionnext_a').samefile(tmp_path / 'upernet_inceptionnext_a')
