"""The loss of up-sampled logits: mmseg's values and gradients, in all that a config may ask of it."""

import copy

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models import FCNHead
from mmseg.structures import SegDataSample
from support import TINY_CONFIG, TINY_UPERNET

from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.models import up_sampled_cross_entropy as module
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.up_sampled_cross_entropy import up_sampled_cross_entropy, use_up_sampled_cross_entropy

CLASSES = 5
CE = dict(type='CrossEntropyLoss')


def make_head(**kwargs) -> FCNHead:
    torch.manual_seed(0)
    settings = dict(num_convs=0, concat_input=False, num_classes=CLASSES, align_corners=False, loss_decode=CE)
    return FCNHead(in_channels=3, channels=3, **{**settings, **kwargs})


def samples(labels: torch.Tensor) -> list[SegDataSample]:
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


def losses_and_gradient(head: FCNHead, logits: torch.Tensor, labels: torch.Tensor) -> tuple[dict, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    losses = head.loss_by_feat(logits, samples(labels))
    (3 * sum(value for name, value in losses.items() if 'loss' in name)).backward()
    return {name: value.detach() for name, value in losses.items()}, logits.grad


def compare(head: FCNHead, logits: torch.Tensor, labels: torch.Tensor, **tolerance) -> None:
    expected, expected_gradient = losses_and_gradient(head, logits, labels)
    ours = use_up_sampled_cross_entropy(copy.deepcopy(head))
    losses, gradient = losses_and_gradient(ours, logits, labels)
    assert losses.keys() == expected.keys() and gradient.dtype == expected_gradient.dtype
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, **tolerance, check_dtype=False)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def labels_of(*shape: int, ignored: int = 255) -> torch.Tensor:
    labels = torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(1))
    labels[:, : shape[1] // 4, shape[2] // 3 :] = ignored
    return labels


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(align_corners=True),
        dict(loss_decode=dict(CE, loss_weight=0.4, loss_name='loss_other')),
        dict(loss_decode=dict(CE, avg_non_ignore=True)),
        dict(loss_decode=dict(CE, class_weight=[0.5, 1, 2, 0, 3], loss_weight=2)),
        dict(ignore_index=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ('small', 'large'), [((6, 9), (24, 36)), ((7, 5), (53, 41)), ((9, 8), (9, 8)), ((1, 1), (8, 8))]
)
def test_values_and_gradients_are_those_of_mmseg(settings, small, large, monkeypatch):
    monkeypatch.setattr(module, '_BLOCK_BYTES', 3 * CLASSES * large[1] * 8)  # blocks of three rows
    logits = torch.randn(2, CLASSES, *small, dtype=torch.float64)
    compare(make_head(**settings), logits, labels_of(2, *large, ignored=settings.get('ignore_index', 255)))


def test_pixels_that_are_all_ignored_give_zero_and_no_nan():
    for settings in ({}, dict(class_weight=[1.0] * CLASSES), dict(avg_non_ignore=True)):
        head = make_head(loss_decode=dict(CE, **settings))
        compare(head, torch.randn(2, CLASSES, 4, 4), torch.full((2, 16, 16), 255))


def test_half_precision_logits_lose_no_more_than_mmseg_s_rounding():
    logits = torch.randn(2, CLASSES, 8, 8).bfloat16()
    compare(make_head(), logits, labels_of(2, 32, 32), rtol=2e-2, atol=2e-4)
    with torch.autocast('cpu', torch.bfloat16):
        compare(make_head(), logits, labels_of(2, 32, 32), rtol=2e-2, atol=2e-4)


def test_large_logits_and_nan_behave_as_in_mmseg():
    compare(make_head(), 1e4 * torch.randn(1, CLASSES, 4, 4), labels_of(1, 16, 16))
    logits = torch.randn(1, CLASSES, 4, 4)
    logits[0, 0, 0, 0] = float('nan')
    losses, _ = losses_and_gradient(use_up_sampled_cross_entropy(make_head()), logits, labels_of(1, 16, 16))
    assert losses['loss_ce'].isnan()  # which stops a run


def test_the_gradient_is_that_of_finite_differences():
    logits = torch.randn(1, CLASSES, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (1, 9, 10))
    weights = torch.rand(1, 9, 10, dtype=torch.float64)
    counted = torch.ones_like(labels, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: up_sampled_cross_entropy(x, labels, weights, False, counted)[0], logits)


@pytest.mark.parametrize(
    'settings',
    [
        dict(loss_decode=dict(type='DiceLoss')),
        dict(loss_decode=[CE, dict(type='DiceLoss')]),
        dict(loss_decode=dict(CE, use_sigmoid=True)),
        dict(loss_decode=dict(CE, reduction='sum')),
        dict(sampler=dict(type='OHEMPixelSampler')),
    ],
    ids=str,
)
def test_other_losses_stay_as_they_are(settings):
    head = use_up_sampled_cross_entropy(make_head(**settings))
    assert 'loss_by_feat' not in vars(head)


@pytest.mark.parametrize('config', [TINY_CONFIG, TINY_UPERNET])
def test_heads_of_a_whole_model_and_of_its_copy(config):
    model = use_up_sampled_cross_entropy(build_segmentor(read_config(config)))
    assert 'loss_by_feat' in vars(model.decode_head)
    copied = copy.deepcopy(model)  # as the moving average of --ema is
    assert copied.decode_head.loss_by_feat.__self__ is copied.decode_head


def test_without_gradients_and_in_a_trace_of_functions_mmseg_s_own_form_runs():
    head, labels = use_up_sampled_cross_entropy(make_head()), samples(labels_of(1, 16, 16))
    logits = torch.randn(1, CLASSES, 4, 4)
    plain = make_head().loss_by_feat(logits, labels)['loss_ce']
    assert torch.equal(head.loss_by_feat(logits, labels)['loss_ce'], plain)
    gradient = torch.func.grad(lambda x: head.loss_by_feat(x, labels)['loss_ce'])(logits)
    assert gradient.isfinite().all()
