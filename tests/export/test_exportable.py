"""What is exported computes what the segmentor computes, at any size; pooling and up-sampling are torch's."""

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
    up_sample,
)


@pytest.mark.parametrize('scale', [1, 2, 3, 5, 6, 8])
def test_average_pooling_is_torchs_for_all_sizes(scale):
    for height in range(1, 41):
        x = torch.randn(2, 3, height, 41 - height, dtype=torch.double)
        expected = F.adaptive_avg_pool2d(x, scale)
        pooled = average_pool(x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize('align_corners', [False, True])
def test_up_sampling_is_torchs_for_all_sizes(align_corners):
    for height in range(1, 12):
        for size in ((height, 13), (2 * height - 1, 17), (23, 8 * height)):
            x = torch.randn(1, 2, height, 7, dtype=torch.double)
            expected = F.interpolate(x, size, mode='bilinear', align_corners=align_corners)
            ours = up_sample(x.permute(0, 2, 3, 1), size, align_corners).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (4, 6), (7, 130), (129, 5), (256, 131)], ids=str)
def test_winograds_algorithm_is_the_convolution(size):
    weight, bias, x = torch.randn(3, 2, 3, 3), torch.randn(3), torch.randn(2, *size, 2)
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
        assert torch.equal(ExportableSegmentor(model, labels=True)(images.float()), logits.argmax(1))
        assert relative_error(ExportableSegmentor(model, labels=False, winograd=True)(images), expected) < 1e-5


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
