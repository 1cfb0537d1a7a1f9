import re

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_inceptionnext import InceptionNeXt, UserError
from mmseg_inceptionnext.models.archs import ARCHS

SMALL = dict(
    depths=(1, 2, 2, 1),
    channels=(16, 24, 32, 40),
    mlp_ratios=(4, 4, 4, 3),
    band_kernel_size=7,
    square_kernel_size=3,
    branch_ratio=0.125,
)


def small(**kwargs) -> InceptionNeXt:
    return InceptionNeXt(SMALL, **{'norm_cfg': dict(type='BN'), 'layer_scale_init_value': 0.5, **kwargs})


@pytest.mark.parametrize('arch', [*ARCHS, SMALL], ids=str)
def test_out_channels_and_strides_are_the_real_ones(arch):
    backbone = MODELS.build(dict(type='InceptionNeXt', arch=arch)).eval()
    with torch.no_grad():
        outs = backbone(torch.zeros(1, 3, 64, 96))
    assert isinstance(outs, tuple)
    assert [out.shape[1] for out in outs] == list(backbone.out_channels)
    assert [tuple(out.shape[2:]) for out in outs] == [(64 // s, 96 // s) for s in backbone.strides]


def test_short_names_mean_the_same():
    for name in ARCHS:
        assert InceptionNeXt(name).out_channels == InceptionNeXt(name[0]).out_channels


def test_out_indices_select_stages_and_build_no_later_ones():
    everything, some = small(), small(out_indices=(0, 2))
    some.load_state_dict({k: v for k, v in everything.state_dict().items() if k in some.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    all_outs, outs = everything.eval()(x), some.eval()(x)
    assert len(some.stages) == 3 and some.out_channels == (16, 32) and some.strides == (4, 16)
    assert torch.equal(outs[0], all_outs[0]) and torch.equal(outs[1], all_outs[2])


def test_every_output_has_its_own_norm():
    backbone = small().train()
    for out in backbone(torch.randn(2, 3, 64, 64)):
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var((0, 2, 3), unbiased=False), torch.ones(out.shape[1]), atol=2e-2, rtol=0)
    bare = small(out_norm=False)
    assert not [key for key in bare.state_dict() if re.match(r'norm\d', key)]


def test_stochastic_depth_rises_linearly_over_all_blocks():
    backbone = small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_every_parameter_gets_a_gradient():
    backbone = small()
    sum(out.pow(3).sum() for out in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics():
    plain, saving = small(drop_path_rate=0.3).double(), small(drop_path_rate=0.3, with_cp=True).double()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    outs = []
    for backbone in (plain, saving):
        torch.manual_seed(3)
        outs.append(backbone(x))
        sum(out.pow(3).sum() for out in outs[-1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))


def test_checkpointing_recomputes():
    backbone, calls = small(with_cp=True), []
    backbone.stages[2].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    sum(out.sum() for out in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert len(calls) == 2


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 4])
def test_frozen_stages_keep_weights_and_statistics(frozen_stages):
    backbone = small(frozen_stages=frozen_stages).train()
    frozen = [] if frozen_stages < 0 else [backbone.stem, *backbone.stages[:frozen_stages]]
    inside = {p for module in frozen for p in module.parameters()}
    assert {p for p in backbone.parameters() if not p.requires_grad} == inside
    before = {key: value.clone() for key, value in backbone.state_dict().items() if 'running' in key}
    backbone(torch.randn(2, 3, 64, 64))
    changed = {key for key, value in backbone.state_dict().items() if key in before and not before[key].equal(value)}
    prefixes = ('stem.', *(f'stages.{i}.' for i in range(frozen_stages))) if frozen_stages >= 0 else ()
    assert changed == {key for key in before if not key.startswith(prefixes or ('nothing',))}


def test_norm_eval_keeps_all_statistics():
    backbone = small(norm_eval=True).train()
    assert not any(m.training for m in backbone.modules() if isinstance(m, _BatchNorm))
    assert all(p.requires_grad for p in backbone.parameters())


def test_default_norm_is_sync_bn_and_norm_cfg_reaches_every_norm():
    default = [m for m in InceptionNeXt(SMALL).modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, nn.SyncBatchNorm) for m in default)
    norms = [m for m in small(norm_cfg=dict(type='BN', eps=0.1)).modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 1 + 3 + 6 + 4 and {m.eps for m in norms} == {0.1}


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), "unknown arch 'huge': choose from 'atto', 'tiny', 'small', 'base'"),
        (dict(arch={'depths': (1,)}), 'lacks'),
        (dict(arch={**SMALL, 'width': 3}), "unknown keys ['width']"),
        (dict(arch={**SMALL, 'channels': (16, 24)}), 'one entry a stage'),
        (dict(arch={**SMALL, 'band_kernel_size': 8}), 'band_kernel_size=8 must be odd'),
        (dict(arch={**SMALL, 'branch_ratio': 0.5}), 'branch_ratio=0.5'),
        (dict(out_indices=(0, 4)), 'out_indices=(0, 4) must name stages from 0 to 3'),
        (dict(out_indices=(-1,)), 'out_indices=(-1,)'),
        (dict(out_indices=()), 'out_indices=()'),
        (dict(out_indices=(2, 1)), 'must ascend'),
        (dict(drop_path_rate=1.0), 'drop_path_rate=1.0'),
        (dict(layer_scale_init_value=0), 'layer_scale_init_value=0'),
        (dict(frozen_stages=5), 'frozen_stages=5'),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        InceptionNeXt(**kwargs)
