"""An optimised segmentor predicts what the original predicts."""

import copy

import pytest
import torch
from mmseg.models.segmentors import EncoderDecoder
from support import ROOT, TINY_CONFIG, TINY_UPERNET, relative_error, segmentor_with_statistics
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_inceptionnext import LabelMapSegmentor, LateUpsampleUPerHead, optimize_for_inference
from mmseg_inceptionnext.inference import optimize
from mmseg_inceptionnext.inference.packed import (
    PackedConv2d,
    PackedLateUpsampleConv2d,
    PackedLinear,
    PackedMlp,
    PackedWinogradConv2d,
)

CONFIGS = ['upernet/inceptionnext_a', 'upernet/inceptionnext_t', 'fpn/inceptionnext_a', 'fpn/inceptionnext_t',
           'mini/upernet_inceptionnext_a', 'baselines/upernet/convnext_t', 'baselines/upernet/swin_t',
           'baselines/fpn/resnet_50']  # fmt: skip
needs_packing = pytest.mark.skipif(not optimize.packing_works(), reason='this torch has no packed operators')


@pytest.fixture(params=[True, False], ids=['packed', 'folded'])
def packing(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(optimize, 'packing_works', lambda dtype: False)
    elif not optimize.packing_works():
        pytest.skip('this torch has no packed operators')
    return request.param


@pytest.mark.parametrize('config', CONFIGS)
def test_the_same_features_and_logits(config, packing):
    model = segmentor_with_statistics(ROOT / 'configs' / f'{config}.py')
    fast = optimize_for_inference(model)
    inputs = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        for feature, expected in zip(fast.extract_feat(inputs), model.extract_feat(inputs), strict=True):
            assert relative_error(feature, expected) < 1e-5
        logits, expected = fast(inputs, mode='tensor'), model(inputs, mode='tensor')
        assert relative_error(logits, expected) < 1e-5
        assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize('size', [(65, 131), (97, 64), (33, 40)], ids=str)
def test_any_size(size, packing):
    model = segmentor_with_statistics(TINY_CONFIG)
    inputs = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = model(inputs, mode='predict')[0].pred_sem_seg.data
        assert torch.equal(optimize_for_inference(model)(inputs, mode='predict')[0].pred_sem_seg.data, expected)


@pytest.mark.parametrize(
    'changes', [{'conv_cfg': dict(type='ConvAWS')}, {'conv_cfg': dict(type='ConvWS')}, {'act_cfg': dict(type='GELU')}],
    ids=['ConvAWS', 'ConvWS', 'GELU'],
)  # fmt: skip
def test_layers_of_another_kind(changes, packing):
    """Convolutions that standardise their weights take no norm in: the scale would be undone."""
    changes = {f'decode_head.{key}': value for key, value in changes.items()}
    model = segmentor_with_statistics(TINY_UPERNET, **changes)
    inputs = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(inputs, mode='tensor')
        assert relative_error(optimize_for_inference(model)(inputs, mode='tensor'), expected) < 1e-5


def test_the_plain_head_is_as_good_as_ours(packing):
    """What --cfg-options model.decode_head.type=UPerHead gives."""
    path = ROOT / 'configs/mini/upernet_inceptionnext_a.py'
    plain = segmentor_with_statistics(path, **{'decode_head.type': 'UPerHead'})
    late = segmentor_with_statistics(path)
    late.load_state_dict(plain.state_dict(), strict=True)
    inputs = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected = plain(inputs, mode='tensor')
        for model in (late, optimize_for_inference(late), optimize_for_inference(plain)):
            assert relative_error(model(inputs, mode='tensor'), expected) < 1e-5


def test_the_model_that_is_given_stays_as_it_is():
    model = segmentor_with_statistics(ROOT / 'configs/mini/upernet_inceptionnext_a.py').train()
    before = copy.deepcopy(model.state_dict())
    structure = repr(model)
    fast = optimize_for_inference(model)
    assert repr(model) == structure and model.training and type(model) is EncoderDecoder
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not fast.training and not fast.with_auxiliary_head and type(fast) is LabelMapSegmentor


def test_nothing_is_left_to_fold(packing):
    """But for the norms of the feature maps, which a padded convolution follows."""
    fast = optimize_for_inference(segmentor_with_statistics(TINY_CONFIG))
    norms = [name for name, module in fast.named_modules() if isinstance(module, _BatchNorm)]
    assert norms == [f'backbone.norm{i}' for i in range(4)]
    assert any(isinstance(module, PackedMlp) for module in fast.modules()) == packing


@needs_packing
def test_packed_where_it_pays():
    fast = optimize_for_inference(segmentor_with_statistics(ROOT / 'configs/upernet/inceptionnext_a.py'))
    assert sum(isinstance(module, PackedWinogradConv2d) for module in fast.decode_head.modules()) == 5
    plain_pointwise = [name for name, module in fast.named_modules()
                       if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]  # fmt: skip
    assert plain_pointwise == []


@needs_packing
@pytest.mark.parametrize('config, linears', [('swin_t', 51), ('convnext_t', 36)])
def test_mmsegs_own_head_and_other_backbones_are_packed_as_well(config, linears):
    fast = optimize_for_inference(segmentor_with_statistics(ROOT / f'configs/baselines/upernet/{config}.py'))
    assert sum(isinstance(module, PackedLinear) for module in fast.backbone.modules()) == linears
    assert not any(isinstance(module, nn.Linear) for module in fast.modules())
    assert isinstance(fast.decode_head, LateUpsampleUPerHead)
    assert sum(isinstance(module, PackedLateUpsampleConv2d) for module in fast.decode_head.modules()) == 2


@needs_packing
def test_under_autocast_it_is_only_folded():
    model = segmentor_with_statistics(TINY_CONFIG)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        fast = optimize_for_inference(model)
        assert not any(isinstance(module, PackedMlp) for module in fast.modules())
        assert fast(torch.randn(1, 3, 64, 64), mode='tensor').isfinite().all()


@pytest.mark.skipif(not optimize.packing_works(torch.bfloat16), reason='no packed operators in bfloat16 here')
def test_bfloat16_is_packed_and_needs_no_winograd():
    model = segmentor_with_statistics(TINY_UPERNET)
    fast = optimize_for_inference(model, precision='bf16')
    packed = [module for module in fast.modules() if isinstance(module, (PackedMlp, PackedConv2d))]
    assert len(packed) == 4 + 5 and {module.dtype for module in packed} == {torch.bfloat16}
    assert {module.weight.dtype for module in fast.backbone.modules() if isinstance(module, nn.Conv2d)} == {
        torch.bfloat16
    }
    assert next(model.parameters()).dtype == torch.float32


@needs_packing
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_an_optimised_model_can_be_copied_and_optimised_again(precision):
    fast = optimize_for_inference(segmentor_with_statistics(TINY_CONFIG), precision=precision)
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = fast(inputs, mode='tensor')
        for again in (copy.deepcopy(fast), optimize_for_inference(fast, precision=precision)):
            assert torch.equal(again(inputs, mode='tensor'), expected)


def test_the_faster_layout_is_timed_elsewhere(monkeypatch):
    """On a device that is no CPU, which here only says that it is none."""
    monkeypatch.setattr(optimize, '_device', lambda model: 'cuda')
    model = segmentor_with_statistics(TINY_CONFIG)
    fast, as_it_was = optimize_for_inference(model, (64, 64)), optimize_for_inference(model)
    assert not as_it_was.backbone._forward_pre_hooks
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(fast(inputs, mode='tensor'), model(inputs, mode='tensor')) < 1e-5
