"""What is exported computes what the segmentor computes, at any size; pooling and label maps are torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import TINY_CONFIG, TINY_UPERNET, relative_error, segmentor_with_statistics

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.export.exportable import (
    Conv3x3,
    ExportableSegmentor,
    WinogradConv3x3,
    average_pool,
    labels_in_blocks,
)
from mmseg_inceptionnext.inference.runtimes import RUNTIMES


@pytest.mark.parametrize('scale', [1, 2, 3, 5, 6, 8])
def test_average_pooling_is_torchs_for_all_sizes(scale):
    for height in range(1, 41):
        x = torch.randn(2, 3, height, 41 - height, dtype=torch.double)
        expected = F.adaptive_avg_pool2d(x, scale)
        torch.testing.assert_close(average_pool(x, scale), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
def test_labels_in_blocks_are_the_argmax_of_up_sampled_logits(align_corners, channels_last):
    for height in range(1, 12):
        for size in ((height, 13), (2 * height - 1, 17), (67, 8 * height)):
            logits = torch.randn(2, 5, height, 7, dtype=torch.double)
            expected = F.interpolate(logits, size, mode='bilinear', align_corners=align_corners).argmax(1)
            assert torch.equal(labels_in_blocks(logits, size, align_corners, channels_last)[0], expected)


@pytest.mark.parametrize('size', [(1, 1), (4, 6), (7, 130), (129, 5), (256, 131)], ids=str)
def test_winograds_algorithm_is_the_convolution(size):
    weight, bias, x = torch.randn(3, 2, 3, 3), torch.randn(3), torch.randn(2, 2, *size)
    expected = Conv3x3(weight.double(), bias.double())(x.double()).float()
    assert relative_error(WinogradConv3x3(weight, bias)(x), expected) < 1e-5


@pytest.mark.parametrize('size', [(64, 96), (33, 131), (97, 64)], ids=str)
@pytest.mark.parametrize(
    ('path', 'options'),
    [
        (TINY_CONFIG, {}),
        (TINY_UPERNET, {}),
        (TINY_UPERNET, {'decode_head.type': 'UPerHead', 'decode_head.pool_scales': (1, 5)}),
        (TINY_UPERNET, {'decode_head.align_corners': True, 'auxiliary_head.align_corners': True}),
        (TINY_CONFIG, {'decode_head.align_corners': True}),
        (TINY_UPERNET, {'decode_head.conv_cfg': dict(type='ConvAWS')}),
        (TINY_UPERNET, {'decode_head.act_cfg': dict(type='GELU')}),
        (TINY_UPERNET, {'decode_head.conv_cfg': dict(type='Conv2d', padding_mode='replicate')}),
        (TINY_CONFIG, {'data_preprocessor.bgr_to_rgb': False}),
        (TINY_CONFIG, {'data_preprocessor.mean': None, 'data_preprocessor.std': None}),
    ],
    ids=[
        'fpn',
        'upernet',
        'plain',
        'upernet aligned',
        'fpn aligned',
        'convolutions of another kind',
        'GELU',
        'another padding',
        'bgr',
        'not normalised',
    ],
)
def test_the_logits_of_mmseg(path, options, size):
    model = segmentor_with_statistics(path, **options)
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))), False)['inputs']
        expected = model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])] * 2)
        logits = ExportableSegmentor(model, labels=False)(images)
        assert relative_error(logits, expected) < 1e-5
        assert torch.equal(ExportableSegmentor(model, labels=True)(images.float()).long(), logits.argmax(1))
        for runtime, precision in itertools.product(RUNTIMES, ('fp32', 'bf16')):
            form = dict(runtime=runtime, precision=precision, fixed_size=True)
            assert relative_error(ExportableSegmentor(model, labels=False, **form)(images), expected) < 1e-5
            labels = ExportableSegmentor(model, labels=True, **form)(images)
            assert labels.dtype == torch.uint8 and (labels != logits.argmax(1)).double().mean() < 1e-3


@pytest.mark.parametrize(
    ('path', 'options', 'message'),
    [
        (TINY_CONFIG, {'test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}, 'whole images'),
        (TINY_CONFIG, {'data_preprocessor.test_cfg': dict(size_divisor=32)}, 'pads images'),
    ],
    ids=['sliding window', 'padding'],
)
def test_what_cannot_be_exported_is_refused(path, options, message):
    with pytest.raises(UserError, match=message):
        ExportableSegmentor(segmentor_with_statistics(path, **options), labels=False)
