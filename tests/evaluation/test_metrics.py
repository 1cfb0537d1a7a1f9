"""The figures, checked against scikit-learn's confusion matrix: ours for reports and mmseg's that the tools print."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from mmseg_inceptionnext import ConfusionMetric, PerClassIoUMetric
from mmseg_inceptionnext.evaluation.metrics import EvaluatedImage, confused_pairs, ious, total_confusion

NUM_CLASSES = 12
ABSENT, ONLY_PREDICTED, ONLY_TRUE = 11, 10, 9


@pytest.fixture(params=range(3))
def label_maps(request) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction of images of several sizes, with unlabelled pixels; one is unlabelled altogether."""
    rng = np.random.default_rng(request.param)
    maps = []
    for height, width in ((30, 40), (17, 5), (8, 8)):
        truth = rng.integers(0, 10, (height, width))
        prediction = np.where(rng.random((height, width)) < 0.6, truth, rng.integers(0, 9, (height, width)))
        prediction[prediction == ONLY_TRUE] = 3
        prediction[0, :2] = ONLY_PREDICTED
        truth[0, 0], truth[0, 1] = 4, ONLY_TRUE
        truth[rng.random((height, width)) < 0.2] = 255
        maps.append((truth, prediction))
    maps[-1][0][:] = 255
    return maps


def reference(maps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confusion, IoU and accuracy of each class, of scikit-learn's matrix over the labelled pixels."""
    truth, prediction = (np.concatenate([pair[i].ravel() for pair in maps]) for i in (0, 1))
    labelled = truth != 255
    confusion = confusion_matrix(truth[labelled], prediction[labelled], labels=range(NUM_CLASSES))
    hit = confusion.diagonal()
    with np.errstate(invalid='ignore'):
        return confusion, 100 * hit / (confusion.sum(0) + confusion.sum(1) - hit), 100 * hit / confusion.sum(1)


def evaluated(metric, maps):
    metric.dataset_meta = dict(classes=[f'c{i}' for i in range(NUM_CLASSES)])
    for i, (truth, prediction) in enumerate(maps):
        sample = {key: dict(data=torch.from_numpy(labels)[None]) for key, labels in
                  (('gt_sem_seg', truth), ('pred_sem_seg', prediction))}  # fmt: skip
        metric.process({}, [dict(sample, img_path=f'{i}.jpg')])
    metric.evaluate(len(maps))
    return metric


def test_the_printed_figures(label_maps):
    confusion, iou, acc = reference(label_maps)
    figures = evaluated(PerClassIoUMetric(iou_metrics=['mIoU']), label_maps).figures
    assert figures['mIoU'] == pytest.approx(np.nanmean(iou), abs=0.0051)
    assert figures['mAcc'] == pytest.approx(np.nanmean(acc), abs=0.0051)
    assert figures['aAcc'] == pytest.approx(100 * confusion.trace() / confusion.sum(), abs=0.0051)
    for i in range(NUM_CLASSES):
        for key, expected in (('IoU', iou[i]), ('Acc', acc[i])):
            figure = figures['per_class'][f'c{i}'][key]
            assert figure is None if np.isnan(expected) else figure == pytest.approx(expected, abs=0.0051)
    per_class = figures['per_class']
    assert per_class[f'c{ABSENT}'] == {'IoU': None, 'Acc': None}
    assert per_class[f'c{ONLY_PREDICTED}'] == {'IoU': 0, 'Acc': None}
    assert per_class[f'c{ONLY_TRUE}'] == {'IoU': 0, 'Acc': 0}


def test_the_confusion_of_reports(label_maps):
    confusion, iou, _ = reference(label_maps)
    images = evaluated(ConfusionMetric(), label_maps).images
    assert np.array_equal(total_confusion(images, NUM_CLASSES), confusion)
    np.testing.assert_allclose(ious(confusion), iou)
    for image, (truth, prediction) in zip(images, label_maps, strict=True):
        for png, labels in ((image.truth_png, truth), (image.prediction_png, prediction)):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), labels)


def test_the_figures_of_one_image(label_maps):
    for image, pair in zip(evaluated(ConfusionMetric(), label_maps).images, label_maps, strict=True):
        if (pair[0] == 255).all():
            assert np.isnan(image.miou) and np.isnan(image.aacc)
        else:
            confusion, iou, _ = reference([pair])
            assert image.miou == pytest.approx(np.nanmean(iou))
            assert image.aacc == pytest.approx(100 * confusion.trace() / confusion.sum())


def test_pairs_of_a_case_counted_by_hand():
    pairs = confused_pairs(np.array([[0, 0, 2, 255]], np.uint8), np.array([[0, 1, 2, 1]], np.uint8))
    assert pairs.tolist() == [[0, 0, 1], [0, 1, 1], [2, 2, 1]]
    image = EvaluatedImage('x.jpg', b'', b'', pairs)
    assert image.miou == pytest.approx(100 * (1 / 2 + 0 + 1) / 3) and image.aacc == pytest.approx(200 / 3)
