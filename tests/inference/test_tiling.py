"""Which images are predicted in tiles, by what, and that their labels are mmseg's."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.structures import SegDataSample
from PIL import Image
from support import TINY_CONFIG, TINY_UPERNET, needs_onnx_exporter, peak_bytes, save_segmentor

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.inference import tiling
from mmseg_inceptionnext.inference.segmentor import load_trained
from mmseg_inceptionnext.inference.tiles import Grid
from mmseg_inceptionnext.inference.tiling import bytes_per_pixel


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return save_segmentor(tmp_path_factory.mktemp('model'), classes=5)


@pytest.fixture(scope='module')
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (130, 170, 3), np.uint8)


def slide_logits(files, image, tile, overlap) -> torch.Tensor:
    """mmseg's, of an RGB image."""
    _, model, _ = load_trained(*files)
    stride = (tile - overlap, tile - overlap)
    model.test_cfg = Config(dict(mode='slide', crop_size=(tile, tile), stride=stride))
    bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
    data = model.data_preprocessor(dict(inputs=[bgr], data_samples=[SegDataSample()]), False)
    with torch.no_grad():
        return model.slide_inference(data['inputs'], [dict(ori_shape=image.shape[:2])])[0]


def assert_labels_of(logits, labels, tolerance=1e-4) -> None:
    """Assert that every label is that of the largest logit, but for ties."""
    missed = logits.amax(0) - logits.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
    assert missed.max() <= tolerance * logits.abs().max()
    assert len(np.unique(labels)) > 2


@pytest.mark.parametrize('fast', [False, True], ids=['plain', 'fast'])
@pytest.mark.parametrize('base', [TINY_CONFIG, TINY_UPERNET], ids=['fpn', 'upernet'])
def test_labels_are_those_of_mmsegs_slide_inference(tmp_path, image, base, fast):
    files = save_segmentor(tmp_path, classes=5, base=base)
    tiled = Segmentor(*files, device='cpu', fast=fast, tile=64, overlap=24)
    for batch_size in (1, 4):
        assert_labels_of(slide_logits(files, image, 64, 24), tiled(image, batch_size).labels)


def test_tiles_are_not_resized_as_images_are_and_that_is_said(trained, image, monkeypatch):
    said = []
    monkeypatch.setattr(tiling, 'say', said.append)
    tiled = Segmentor(TINY_CONFIG, trained, 'cpu', tile=64, overlap=24)
    assert_labels_of(slide_logits((TINY_CONFIG, trained), image, 64, 24), tiled(image).labels)
    assert len(said) == 1 and 'images are not resized' in said[0]


def test_a_threshold(tmp_path, image):
    config, checkpoint = save_segmentor(tmp_path, classes=2)
    head = dict(
        num_classes=2, out_channels=1, threshold=0.3, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)
    )
    config.write_text(config.read_text().replace("{'num_classes': 2}", repr(head)))
    content = torch.load(checkpoint, weights_only=True)
    for key in ('decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'):
        content['state_dict'][key] = content['state_dict'][key][:1]
    torch.save(content, checkpoint)
    probability = slide_logits((config, checkpoint), image, 64, 24).sigmoid()[0].numpy()
    labels = Segmentor(config, checkpoint, 'cpu', tile=64, overlap=24)(image).labels
    far = abs(probability - 0.3) > 1e-4
    assert np.array_equal(labels[far], (probability > 0.3)[far]) and 0 < labels.mean() < 1


@needs_onnx_exporter
def test_an_onnx_file_in_tiles_of_its_size(files, image, tmp_path):
    export(*files, tmp_path / 'logits.onnx', (64, 64), verify=1)
    labels = Segmentor(tmp_path / 'logits.onnx', tile=64, overlap=24)(image).labels
    assert_labels_of(slide_logits(files, image, 64, 24), labels, 1e-3)
    export(*files, tmp_path / 'labels.onnx', (64, 64), labels=True, verify=1)
    with pytest.raises(
        UserError, match='tile=64: .*labels.onnx can be run in tiles of a given side, and if it returns'
    ):
        Segmentor(tmp_path / 'labels.onnx', tile=64)
    with pytest.raises(UserError, match="tile='auto': .*logits.onnx can be run in tiles of a given side"):
        Segmentor(tmp_path / 'logits.onnx', tile='auto')
    with pytest.raises(UserError, match='takes images of 64×64, not of 96×96'):
        Segmentor(tmp_path / 'logits.onnx', tile=96)(image)
    with pytest.raises(UserError, match='takes images of 64×64, not of 64×40, as the tiles of 80×40 pixels are'):
        Segmentor(tmp_path / 'logits.onnx', tile=64)(np.zeros((40, 80, 3), np.uint8))


def test_auto_leaves_what_fits_as_it_is_and_says_what_it_chose(trained, image, monkeypatch):
    said = []
    monkeypatch.setattr(tiling, 'say', said.append)
    auto, whole = Segmentor(TINY_CONFIG, trained, 'cpu', tile='auto'), Segmentor(TINY_CONFIG, trained, 'cpu')
    for _ in range(2):
        assert np.array_equal(auto(image).labels, whole(image).labels)
    assert said == ["tile='auto': 170×130 pixels fit into memory: predicted as a whole"]
    monkeypatch.setattr(tiling, 'available_memory', lambda device: 2**20)
    tiled = Segmentor(TINY_CONFIG, trained, 'cpu', tile=256)
    said.clear()
    assert np.array_equal(auto(image).labels, tiled(image).labels)
    assert len(said) == 1 and said[0].startswith("tile='auto': 170×130 pixels in tiles of 256, not resized: as a whole")


def test_the_estimate_of_memory_is_within_a_factor_of_what_torch_takes(files):
    _, model, _ = load_trained(*files)
    inputs = torch.zeros(1, 3, 256, 256)
    with torch.no_grad():
        taken = peak_bytes(lambda: model(inputs, mode='tensor')) / 256**2
    assert taken / 3 < bytes_per_pixel(model, inputs) < 4 * taken


@pytest.mark.parametrize('base', [TINY_CONFIG, TINY_UPERNET], ids=['fpn', 'upernet'])
def test_falling_weights_leave_no_seams(tmp_path, base):
    """Labels change across the lines where windows begin and end as often as in the image as a whole."""
    files = save_segmentor(tmp_path, classes=5, base=base)
    noise = np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8)
    image, grid = np.asarray(Image.fromarray(noise).resize((416, 320))), Grid((320, 416), (128, 128), (96, 96))

    def changes(**options) -> float:
        labels, shares = Segmentor(*files, device='cpu', **options)(image).labels, []
        for axis in (0, 1):
            starts, lines = grid.starts(axis), np.moveaxis(labels, axis, 0)
            seams = {*starts[1:], *(start + grid.crop[axis] for start in starts[:-1])}
            shares += [np.mean(lines[i] != lines[i - 1]) for i in seams]
        return np.mean(shares)

    whole, average = changes(), changes(tile=128, overlap=32)
    assert changes(tile=128, overlap=32, blend=True) < 1.1 * whole < average / 2


def test_copies_predict_in_tiles(files, image):
    tiled = Segmentor(*files, device='cpu', tile=64, overlap=8, blend=True)
    copied = pickle.loads(pickle.dumps(tiled))
    assert np.array_equal(copied(image).labels, tiled(image).labels)
    plain = Segmentor(*files, device='cpu', tile=64, overlap=8)
    assert 0 < np.mean(plain(image).labels != tiled(image).labels) < 0.2


def test_what_tiles_cannot_do(files, tmp_path):
    config, checkpoint = files
    for options, message in (
        (dict(tile=64, overlap=64), 'overlap=64 must be from 0 to 63, less than the tile of 64'),
        (dict(tile=64, overlap=-1), 'overlap=-1 must be'),
        (dict(tile='auto', overlap=256), 'overlap=256 must be from 0 to 255'),
        (dict(tile=31), "tile=31 must be 'auto' or a side of 32"),
        (dict(tile='all'), "tile='all' must be 'auto'"),
        (dict(overlap=8), 'overlap=8 is for tiles'),
        (dict(blend=True), 'blend=True is for tiles'),
    ):
        with pytest.raises(UserError, match=message):
            Segmentor(config, checkpoint, 'cpu', **options)
    text = config.read_text()
    other = tmp_path / 'config.py'
    other.write_text(
        text.replace("{'type': 'PackSegInputs'}", "{'type': 'RandomFlip', 'prob': 0.5}, {'type': 'PackSegInputs'}")
    )
    with pytest.raises(UserError, match='tile=64 leaves out RandomFlip of the test pipeline'):
        Segmentor(other, checkpoint, 'cpu', tile=64)
    other.write_text(text.replace('model = {', "model = {'data_preprocessor': {'test_cfg': {'size_divisor': 32}}, "))
    with pytest.raises(UserError, match='a data_preprocessor.test_cfg pads images'):
        Segmentor(other, checkpoint, 'cpu', tile=64)
    with pytest.raises(UserError, match='500×31 pixels are too thin: no side may be shorter than 32'):
        Segmentor(config, checkpoint, 'cpu', tile=64)(np.zeros((31, 500, 3), np.uint8))


def test_logits_that_are_not_finite_are_no_labels(files, image, tmp_path):
    content = torch.load(files[1], weights_only=True)
    content['state_dict']['decode_head.conv_seg.bias'][:] = torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    with pytest.raises(UserError, match='logits that are not finite'):
        Segmentor(files[0], tmp_path / 'nan.pth', 'cpu', tile=64)(image)
