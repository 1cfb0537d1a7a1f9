"""How sure a label is, against the softmax of all logits of mmseg's own model at full size; and what predict writes."""

import math
import pickle

import cv2
import numpy as np
import pytest
import rasterio
import torch
from mmengine.config import Config
from PIL import Image
from rasterio import Affine
from support import TINY_UPERNET, assert_user_error, needs_onnx_exporter, peak_bytes, save_segmentor

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.drawing import draw_overlay
from mmseg_inceptionnext.export.export import export
from mmseg_inceptionnext.inference.confidence import ClassLogits
from mmseg_inceptionnext.inference.geotiff import segment_raster
from mmseg_inceptionnext.inference.predict import predict
from mmseg_inceptionnext.inference.segmentor import load_trained
from mmseg_inceptionnext.inference.sources import Output, find_sources

FP32 = dict(device='cpu', precision='fp32')
RESIZED = dict(test_dataloader=dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(200, 96), keep_ratio=True), dict(type='PackSegInputs'),
])))  # fmt: skip


def picture(height=90, width=120) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def probabilities_of_mmseg(files, image) -> torch.Tensor:
    """(C, H, W): the softmax of the stack that mmseg's EncoderDecoder returns."""
    cfg, model, _ = load_trained(*files)
    plain = Segmentor(*files, fast=False, **FP32)
    with torch.no_grad():
        (sample,) = model.test_step({k: [v] for k, v in plain.prepare(image).items() if k != 'image'})
    logits = sample.seg_logits.data
    return logits.double().softmax(0) if len(logits) > 1 else torch.cat([1 - logits, logits]).double()  # a sigmoid


def assert_agrees(result, expected: torch.Tensor, tolerance=1e-4) -> None:
    labels = torch.from_numpy(result.labels.astype(np.int64))
    assert result.confidence.dtype == result.entropy.dtype == np.float32
    np.testing.assert_allclose(result.confidence, expected.gather(0, labels[None])[0], atol=tolerance)
    entropy = -(expected * expected.clamp(min=1e-30).log()).sum(0)
    np.testing.assert_allclose(result.entropy, entropy, atol=10 * tolerance)
    k = min(3, len(expected))
    top, values = result.top(k)
    best, _ = expected.topk(k, dim=0)
    assert top.shape == values.shape == (k, *labels.shape) and (top.dtype, values.dtype) == (np.int16, np.float32)
    np.testing.assert_allclose(values, best, atol=tolerance)
    np.testing.assert_allclose(expected.gather(0, torch.from_numpy(top.astype(np.int64))), best, atol=tolerance)
    assert len(expected) > 2 or np.all(np.sort(top, axis=0) == np.arange(2)[:, None, None])


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return save_segmentor(tmp_path_factory.mktemp('fpn'), classes=7)


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('changes', [
    {}, RESIZED,
    dict(model=dict(decode_head=dict(num_classes=5), test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(40, 40)))),
    dict(model=dict(decode_head=dict(num_classes=2, out_channels=1, threshold=0.3))),
], ids=['whole', 'resized', 'slide', 'threshold'])  # fmt: skip
def test_it_is_the_softmax_of_all_logits_at_the_size_of_the_image(tmp_path, changes, fast):
    files = save_segmentor(tmp_path, classes=2 if 'out_channels' in str(changes) else 5)
    config = Config.fromfile(files[0])
    config.merge_from_dict(changes)
    config.dump(files[0])
    if 'out_channels' in str(changes):
        content = torch.load(files[1])
        head = {k: v[:1] for k, v in content['state_dict'].items() if 'conv_seg' in k}
        content['state_dict'] |= head
        torch.save(content, files[1])
    image = picture()
    result = Segmentor(*files, fast=fast, **FP32)(image)
    assert_agrees(result, probabilities_of_mmseg(files, image))
    assert result.confidence.min() > 0 and result.confidence.max() <= 1


@pytest.mark.parametrize('blend', [False, True])
def test_in_tiles_it_is_that_of_mmsegs_windows(tmp_path, blend):
    files = save_segmentor(tmp_path, classes=5)
    image = picture()
    tiled = Segmentor(*files, tile=64, overlap=24, blend=blend, **FP32)
    result = tiled(image)
    (at_once,) = tiled.predict([tiled.prepare(image)], confidence=True, keep_logits=False)
    np.testing.assert_allclose(at_once.confidence, result.confidence, atol=1e-6)
    assert np.array_equal(at_once.labels, result.labels)
    if not blend:
        config = Config.fromfile(files[0])
        config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(40, 40))
        config.dump(files[0])
        assert_agrees(result, probabilities_of_mmseg(files, image))
    else:
        assert np.array_equal(result.top(1)[0][0], result.labels)
        np.testing.assert_allclose(result.top(5)[1].sum(0), 1, atol=1e-5)


@needs_onnx_exporter
def test_of_a_file_that_returns_logits_and_of_one_that_returns_labels(files, tmp_path):
    image = picture(96, 128)
    export(*files, tmp_path / 'logits.onnx', shape=(96, 128))
    result = Segmentor(tmp_path / 'logits.onnx')(image)
    assert_agrees(result, probabilities_of_mmseg(files, image), 1e-3)
    export(*files, tmp_path / 'labels.onnx', shape=(96, 128), labels=True)
    with pytest.raises(UserError, match='labels.onnx returns labels without logits: export it'):
        Segmentor(tmp_path / 'labels.onnx')(image).confidence  # noqa: B018


def test_large_logits_and_ties():
    logits = torch.tensor([[1e4, 0, -3e4, 5], [1e4, -1e4, -3e4, 5], [-1e4, 0, -3e4, 5.0]])[..., None]
    found = ClassLogits(3, logits.__getitem__)
    confidence, entropy = found.confidence_and_entropy(logits.argmax(0))
    expected = logits.double().softmax(0)
    np.testing.assert_allclose(confidence, expected.amax(0), rtol=1e-6)
    np.testing.assert_allclose(entropy[:, 0], [math.log(2), math.log(2), math.log(3), math.log(3)], rtol=1e-6)
    labels, values = found.top(2)
    assert labels[:, :, 0].tolist() == [[0, 0, 0, 0], [1, 2, 1, 1]]  # of equal ones, the first
    np.testing.assert_allclose(values, expected.topk(2, dim=0).values, rtol=1e-6)


def test_a_temperature_divides_the_logits(files):
    segmentor, image = Segmentor(*files, **FP32), picture()
    before = segmentor(image)
    segmentor.temperature = 2.5
    after = segmentor(image)
    _, model, _ = load_trained(*files)
    assert np.array_equal(before.labels, after.labels)
    logits = probabilities_of_mmseg(files, image).log() / 2.5
    assert_agrees(after, logits.softmax(0))
    assert after.confidence.mean() < before.confidence.mean()


def test_memory_does_not_grow_with_the_number_of_classes():
    size = 64, 64

    def peak(classes: int) -> int:
        found = ClassLogits(classes, lambda index: torch.full(size, float(index)))
        return peak_bytes(lambda: (found.confidence_and_entropy(torch.zeros(size)), found.top(3)))

    assert peak(300) <= peak(10) < 40 * 4 * size[0] * size[1]


def test_results_that_do_not_know(files):
    segmentor = Segmentor(*files, **FP32)
    result = segmentor(picture())
    confidence = segmentor(picture()).confidence
    asked = segmentor(picture())
    asked.entropy  # noqa: B018
    assert np.array_equal(pickle.loads(pickle.dumps(asked)).confidence, confidence)
    with pytest.raises(UserError, match='does not know how sure its labels are: it was copied or pickled before'):
        pickle.loads(pickle.dumps(result)).top(2)
    with pytest.raises(UserError, match='how sure its labels are: keep_logits=False'):
        segmentor(picture(), keep_logits=False).confidence  # noqa: B018
    for k in (0, 8):
        with pytest.raises(UserError, match=rf'top\({k}\): the model has 7 classes'):
            result.top(k)


def test_what_predict_writes(files, tmp_path):
    for name in ('in/a.png', 'in/confidence/b.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / name)
    segmentor, result = Segmentor(*files, **FP32), Segmentor(*files, **FP32)(picture())
    limit = float(np.median(result.confidence))
    out = tmp_path / 'out'
    output = Output(out, labels=True, confidence=True, min_confidence=limit)
    assert predict(segmentor, find_sources([str(tmp_path / 'in')], out), output) == {}
    assert (out / 'confidence' / 'confidence-2' / 'b.png').exists()
    written = np.asarray(Image.open(out / 'confidence' / 'a.png'))
    assert written.dtype == np.uint8 and np.array_equal(written, np.rint(255 * result.confidence))
    is_unsure = result.confidence < limit
    assert 0.3 < is_unsure.mean() < 0.6
    labels = np.asarray(Image.open(out / 'labels' / 'a.png'))
    assert np.array_equal(labels, np.where(is_unsure, 255, result.labels + 1))
    overlay, plain = (
        np.asarray(Image.open(out / 'a.png')),
        draw_overlay(picture(), result.labels, result.classes.palette, 0.5),
    )
    hatched = (overlay != plain).any(2)
    assert not hatched[~is_unsure].any() and 0.3 < hatched[is_unsure].mean() < 0.5
    assert sum(result.areas(limit).values()) == pytest.approx(1)
    assert result.areas(limit) == pytest.approx(
        {
            result.class_names[i]: n / (~is_unsure).sum()
            for i, n in enumerate(np.bincount(result.labels[~is_unsure]))
            if n
        }
    )


def test_videos(files, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / 'film.mp4'), cv2.VideoWriter.fourcc(*'mp4v'), 10, (120, 90))
    for _ in range(3):
        writer.write(picture())
    writer.release()
    out = tmp_path / 'out'
    output = Output(out, labels=True, confidence=True, min_confidence=0.99)
    assert predict(Segmentor(*files, **FP32), find_sources([str(tmp_path / 'film.mp4')], out), output, 2) == {}
    for folder in ('video_confidence', 'video_labels'):
        assert [path.name for path in sorted((out / folder / 'film').iterdir())] == [f'{i:06d}.png' for i in (1, 2, 3)]
    assert np.asarray(Image.open(out / 'video_labels/film/000002.png')).max() == 255


@pytest.mark.parametrize(
    'codes', [(), ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))], ids=['ids', 'rgb']
)
@pytest.mark.parametrize('tile', [64, None])
def test_a_band_of_the_geotiff(tmp_path, tile, codes):
    files = save_segmentor(tmp_path, classes=5, codes=codes)
    image, options = picture(), dict(crs='EPSG:32633', transform=Affine(0.2, 0, 5e5, 0, -0.2, 54e5))
    with rasterio.open(
        tmp_path / 'a.tif', 'w', driver='GTiff', width=120, height=90, count=3, dtype='uint8', **options
    ) as f:
        f.write(image.transpose(2, 0, 1))
    segmentor = Segmentor(*files, tile=tile, **FP32)
    result = segmentor(image)
    limit = float(np.quantile(result.confidence, 0.3))
    areas = segment_raster(segmentor, tmp_path / 'a.tif', tmp_path / 'b.tif', confidence=True, min_confidence=limit)
    with rasterio.open(tmp_path / 'b.tif') as file:
        bands, masks = file.read(), file.read_masks()
        assert file.count == (4 if codes else 2) and file.descriptions[-1] == 'confidence'
        assert rasterio.enums.ColorInterp.alpha not in file.colorinterp and file.crs == options['crs']
    is_sure = result.confidence >= limit
    assert np.array_equal(masks[-1] > 0, is_sure)
    assert np.abs(bands[-1][is_sure] - np.rint(255 * result.confidence[is_sure])).max() <= 1
    expected = result.classes.encode(result.labels)
    expected = expected.transpose(2, 0, 1) if codes else expected[None]
    assert np.array_equal(bands[:-1][:, is_sure], expected[:, is_sure])
    assert areas == pytest.approx(result.areas(limit))
    assert sorted(p.name for p in tmp_path.glob('*.tif*')) == ['a.tif', 'b.tif']


def test_mistakes(files, tmp_path, tool_here):
    Image.fromarray(picture()).save(tmp_path / 'a.png')
    command = ('predict', *files, 'a.png', '--out', 'out')
    assert_user_error(tool_here(*command, '--min-confidence', 1.5), '1.5 is not from 0 to 1')
    for codes, classes in (((1, 255, 3), 3), (((0, 0, 0), (255, 255, 255), (1, 1, 1)), 3)):
        full = save_segmentor(tmp_path / 'full', classes=classes, codes=codes)
        process = tool_here('predict', *full, 'a.png', '--out', 'out', '--labels', '--min-confidence', 0.5)
        assert_user_error(process, "the code of 'class 1'", 'leave --min-confidence P out')
    assert not (tmp_path / 'out' / 'a.png').exists()
    assert tool_here(*command, '--confidence', '--min-confidence', 0.5).returncode == 0
    assert (tmp_path / 'out/confidence/a.png').exists()


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_an_upernet(tmp_path, precision):
    files = save_segmentor(tmp_path, classes=9, base=TINY_UPERNET)
    result = Segmentor(*files, device='cpu', precision=precision)(picture())
    assert_agrees(result, probabilities_of_mmseg(files, picture()), 1e-4 if precision == 'fp32' else 0.1)
