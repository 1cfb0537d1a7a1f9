"""Calibration and boundary IoU against scikit-learn, scipy and torch; a temperature is fitted, kept and used."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from scipy.ndimage import distance_transform_cdt
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.evaluation.boundary import BoundaryIoUMetric, near_contours
from mmseg_inceptionnext.evaluation.calibration import TemperatureMetric, calibration, fit_temperature, histogram
from mmseg_inceptionnext.files import file_digest
from mmseg_inceptionnext.inference.temperature import read_temperature, temperature_file, write_temperature


@pytest.fixture
def pixels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.beta(3, 1, 20_000).astype(np.float32)
    confidence[:3] = 1, 1 / 15, 0
    return confidence, rng.random(20_000) < confidence**2


def test_the_calibration_error_is_that_of_scikit_learns_curve(pixels):
    confidence, is_right = pixels
    found = calibration(histogram(confidence, is_right))
    accuracy, mean = calibration_curve(is_right, confidence, n_bins=15, strategy='uniform')
    index = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence)
    weights = np.bincount(index, minlength=15) / len(confidence)
    assert found['ECE'] == pytest.approx(100 * (weights[weights > 0] * abs(accuracy - mean)).sum(), abs=0.01)
    rows = [row for row in found['reliability'] if row['pixels']]
    np.testing.assert_allclose([row['accuracy'] for row in rows], 100 * accuracy, atol=0.02)
    np.testing.assert_allclose([row['confidence'] for row in rows], 100 * mean, atol=0.02)
    assert sum(row['pixels'] for row in rows) == 20_000


def test_images_add_up_and_no_pixel_is_no_error(pixels):
    confidence, is_right = pixels
    parts = [histogram(confidence[part], is_right[part]) for part in (slice(5000), slice(5000, None))]
    assert calibration(sum(parts)) == calibration(histogram(confidence, is_right))
    empty = calibration(histogram(confidence[:0], is_right[:0]))
    assert empty['ECE'] is None and json.dumps(empty)


def test_accuracy_against_coverage(pixels):
    confidence, is_right = pixels
    for row in calibration(histogram(confidence, is_right))['coverage']:
        left = confidence > row['min_confidence']
        assert row['coverage'] == pytest.approx(100 * left.mean(), abs=0.02)
        assert row['accuracy'] == pytest.approx(100 * is_right[left].mean(), abs=0.2)


def test_the_temperature_of_logits_that_were_made_too_large():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 6, generator=generator)
    truth = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    fitted = fit_temperature(2.5 * logits, truth)
    assert fitted['temperature'] == pytest.approx(2.5, rel=0.03)
    grid = np.arange(2.2, 2.8, 0.01)
    losses = [log_loss(truth, (2.5 * logits / t).softmax(1).double().numpy(), labels=range(6)) for t in grid]
    assert fitted['temperature'] == pytest.approx(grid[np.argmin(losses)], abs=0.011)
    assert fitted['nll_after'] == pytest.approx(min(losses), abs=1e-4)
    assert fitted['nll_before'] == pytest.approx(
        log_loss(truth, (2.5 * logits).softmax(1).double(), labels=range(6)), abs=1e-4
    )
    for hopeless in (logits.argmin(1), logits.argmax(1)):
        with pytest.raises(UserError, match='no temperature from 0.05 to 20.0 fits: the best is at the border'):
            fit_temperature(logits, hopeless)


def blobs(seed: int, size=(150, 200), classes: int = 5) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, classes, (size[0] // 25 + 1, size[1] // 25 + 1))
    return np.kron(coarse, np.ones((25, 25), int))[: size[0], : size[1]]


def reference_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """By scipy: pixels of a mask whose chessboard distance to what is outside, or beyond the image, is not larger."""
    return mask & (distance_transform_cdt(np.pad(mask, 1), metric='chessboard')[1:-1, 1:-1] <= distance)


@pytest.mark.parametrize('classes', [5, 300])
def test_boundary_iou_is_that_of_scipys_distance_transform(classes):
    metric = BoundaryIoUMetric()
    metric.dataset_meta = dict(classes=[str(i) for i in range(classes)])
    both, either = np.zeros(classes), np.zeros(classes)
    for seed, size in enumerate([(150, 200), (90, 64), (12, 300)]):
        truth = blobs(seed, size, classes)
        prediction = np.roll(truth, (2, -3), (0, 1))
        prediction[5:9, 5:60] = 1
        truth[-8:, 10:40], truth[3:5, 3:5] = 255 if classes < 255 else 65535, 255 if classes < 255 else 65535
        metric.ignore_index = truth.max()
        sample = {key: dict(data=torch.from_numpy(labels)[None]) for key, labels in
                  (('gt_sem_seg', truth), ('pred_sem_seg', prediction))}  # fmt: skip
        metric.process({}, [sample])
        prediction = np.where(truth == metric.ignore_index, metric.ignore_index, prediction)
        distance = max(round(0.02 * math.hypot(*size)), 1)
        for i in range(classes):
            t, p = (reference_boundary(labels == i, distance) for labels in (truth, prediction))
            both[i] += (t & p).sum()
            either[i] += (t | p).sum()
    metric.evaluate(3)
    with np.errstate(invalid='ignore'):
        np.testing.assert_allclose(metric.ious, 100 * both / either)
    assert np.nanmean(metric.ious) < 95


def test_what_is_near_a_contour():
    labels = np.zeros((9, 9), np.uint8)
    labels[:, 6:] = 3
    assert near_contours(labels, 1).sum(0).tolist() == [9, 2, 2, 2, 2, 9, 9, 2, 9]


@pytest.fixture
def own(tiny_cfg, trained, tmp_path, mini_root) -> tuple[Config, Path]:
    """A segmentor that knows how frequent the classes are, and is twice as sure of it as it should be."""
    masks = [np.asarray(Image.open(path)) for path in (mini_root / 'annotations' / 'validation').iterdir()]
    pixels = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=151)[1:]
    content = torch.load(trained, weights_only=False)
    content['state_dict']['decode_head.conv_seg.weight'] *= 0.1
    content['state_dict']['decode_head.conv_seg.bias'] = (
        2 * torch.from_numpy((pixels + 0.1) / pixels.sum()).float().log()
    )
    torch.save(content, tmp_path / 'a.pth')
    return tiny_cfg, tmp_path / 'a.pth'


def test_a_fitted_temperature_is_kept_and_used_afterwards(own, tmp_path, mini_root):
    cfg, checkpoint = own
    image = next((mini_root / 'images' / 'validation').iterdir())
    before = evaluate(copy.deepcopy(cfg), checkpoint, details=True)
    sure = Segmentor(TINY_CONFIG, checkpoint, device='cpu', precision='fp32')(image)
    assert before['calibration']['temperature'] == 1
    after = evaluate(copy.deepcopy(cfg), checkpoint, details=True, temperature='fit')
    content = json.loads(temperature_file(checkpoint).read_text())
    assert temperature_file(checkpoint).name == 'a.pth.temperature.json'
    temperature = content['temperature']
    assert temperature == after['calibration']['temperature'] == pytest.approx(2, rel=0.2)
    assert after['ECE'] < before['ECE'] and content['nll_after'] < content['nll_before']
    assert {key: after[key] for key in ('mIoU', 'per_class')} == {key: before[key] for key in ('mIoU', 'per_class')}
    assert evaluate(copy.deepcopy(cfg), checkpoint, details=True) == after
    segmentor = Segmentor(TINY_CONFIG, checkpoint, device='cpu', precision='fp32')
    assert segmentor.temperature == temperature == segmentor.identity()['temperature']
    assert np.array_equal(segmentor(image).labels, sure.labels)
    assert segmentor(image).confidence.mean() < sure.confidence.mean()


def test_the_error_of_a_test_is_that_of_the_confidence_of_results(tiny_cfg, trained, mini_root):
    checkpoint = trained
    figures = evaluate(copy.deepcopy(tiny_cfg), checkpoint, details=True)
    segmentor = Segmentor(TINY_CONFIG, checkpoint, device='cpu', precision='fp32')
    counts = 0
    for path in (mini_root / 'images' / 'validation').iterdir():
        result = segmentor(path)
        truth = np.asarray(Image.open(mini_root / 'annotations' / 'validation' / f'{path.stem}.png')).astype(int) - 1
        counts = counts + histogram(result.confidence[truth >= 0], (truth == result.labels)[truth >= 0])
    assert figures['ECE'] == pytest.approx(calibration(counts)['ECE'], abs=0.01)
    assert figures['mBoundaryIoU'] is not None
    tta = evaluate(tiny_cfg, checkpoint, details=True, tta=True)
    assert tta['ECE'] != figures['ECE'] and tta['calibration']['temperature'] == 1


def test_a_temperature_of_another_checkpoint_is_refused(own, tmp_path, tool_here, mini_root):
    cfg, checkpoint = own
    write_temperature(checkpoint, dict(temperature=1.5))
    assert read_temperature(checkpoint) == 1.5
    content = torch.load(checkpoint, weights_only=False)
    content['meta']['iter'] = 7
    torch.save(content, checkpoint)
    said = 'a.pth.temperature.json was fitted for another checkpoint'
    image = next((mini_root / 'images' / 'validation').iterdir())
    process = tool_here('predict', TINY_CONFIG, checkpoint, image, '--out', 'out')
    assert_user_error(process, said, 'fit it again by `test --temperature fit`, or remove')
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, '--data-root', mini_root, '--json', 'a.json'), said)
    for text in ('', '[]', '{"temperature": 0, "checkpoint": ""}', '{"temperature": "x"}', '{"temperature": NaN}'):
        temperature_file(checkpoint).write_text(text)
        with pytest.raises(UserError, match='holds no temperature'):
            read_temperature(checkpoint)
    process = tool_here(
        'test', TINY_CONFIG, checkpoint, '--data-root', mini_root, '--temperature', 'fit', '--json', 'a.json'
    )
    assert process.returncode == 0, process.stderr
    assert 'ECE' in process.stdout and 'mBoundaryIoU' in process.stdout and '{' not in process.stdout
    assert json.loads((tmp_path / 'a.json').read_text())['calibration']['temperature'] == read_temperature(checkpoint)
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, '--temperature', '2'), '--temperature')


def test_it_is_that_of_the_weights_that_were_read(own, monkeypatch):
    """A training that goes on replaces the file meanwhile."""
    cfg, checkpoint = own
    digest, spread = file_digest(checkpoint), TemperatureMetric.spread_over

    def replaced(self, number):
        checkpoint.write_bytes(b'')
        return spread(self, number)

    monkeypatch.setattr(TemperatureMetric, 'spread_over', replaced)
    with pytest.raises(UserError, match='was fitted for another checkpoint'):
        evaluate(cfg, checkpoint, temperature='fit')
    assert json.loads(temperature_file(checkpoint).read_text())['checkpoint'] == digest


def test_a_folder_that_cannot_be_written_is_said_before_the_fit(own, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != own[1].parent and access(path, mode))
    with pytest.raises(UserError, match="temperature='fit' is kept beside the checkpoint, but .* cannot be written"):
        evaluate(*own, temperature='fit')


def test_a_validation_set_without_masks(own):
    cfg, checkpoint = own
    cfg.val_dataloader.dataset.data_prefix.seg_map_path = 'nowhere'
    with pytest.raises(UserError, match="temperature='fit' needs the masks of the validation set"):
        evaluate(cfg, checkpoint, temperature='fit')
    assert not temperature_file(checkpoint).exists()
