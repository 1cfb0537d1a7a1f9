import copy
import importlib
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
        (dict(out_indices=(-5,)), 'out_indices=(-5,)'),
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


def outputs_and_gradients(backbone: InceptionNeXt, run, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    outs = run(x)
    sum((i + 1) * out.pow(2).mean() for i, out in enumerate(outs)).backward()
    statistics = [buffer.double() for buffer in backbone.buffers()]
    return [*outs, x.grad, *(p.grad for p in backbone.parameters() if p.grad is not None), *statistics]


@pytest.mark.parametrize('with_cp', [False, True])
def test_compiled_in_training_it_computes_the_same_and_counts_a_batch_once(with_cp):
    x = torch.randn(2, 3, 64, 64)
    eager = small(with_cp=with_cp)
    compiled = copy.deepcopy(eager)
    expected = outputs_and_gradients(eager, eager, x)
    results = outputs_and_gradients(compiled, torch.compile(compiled, backend='aot_eager'), x)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    assert compiled.stages[0].blocks[0].norm.num_batches_tracked == 1


def test_traced_and_exported_it_computes_the_same():
    backbone, x = small(with_cp=True).eval(), torch.randn(2, 3, 64, 96)
    expected = backbone(x)
    torch.testing.assert_close(torch.jit.trace(backbone, torch.randn(2, 3, 64, 96))(x), expected)
    torch.testing.assert_close(torch.export.export(backbone, (x,)).module()(x), expected)
    stage = backbone.stages[1]  # mmengine's BaseModule, around the stages, cannot be scripted
    torch.testing.assert_close(torch.jit.script(stage)(backbone.stages[0](backbone.stem(x))), stage(
        backbone.stages[0](backbone.stem(x))
    ))  # fmt: skip


def test_it_is_built_on_the_meta_device():
    with torch.device('meta'):
        backbone = small(drop_path_rate=0.3)
    assert {p.device.type for p in backbone.parameters()} == {'meta'}
    blocks = [block for stage in backbone.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, 'drop_prob', 0) for block in blocks]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)


def test_negative_out_indices_and_checkpointing_as_in_timm():
    backbone = small(out_indices=(1, -1)).eval()
    assert (backbone.out_indices, backbone.out_channels, backbone.strides) == ((1, 3), (24, 40), (8, 32))
    for wrong in ((-5,), (-1, 0), (3, -1), (4,)):
        with pytest.raises(UserError, match='out_indices='):
            small(out_indices=wrong)
    backbone.set_grad_checkpointing()
    assert all(stage.with_cp for stage in backbone.stages)
    backbone.set_grad_checkpointing(False)
    assert not any(stage.with_cp for stage in backbone.stages)


def test_layer_depths_ascend_with_the_network():
    backbone = small()
    depths = [backbone.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in backbone.named_parameters()]
    assert [depth for depth, _ in depths] == sorted(depth for depth, _ in depths)
    assert {depth for depth, _ in depths} == set(range(1 + 6 + 1)) and {number for _, number in depths} == {8}
    assert backbone.get_layer_depth('decode_head.conv_seg.weight', 'backbone.') == (7, 8)
    assert backbone.get_layer_depth('backbone.stages.2.downsample.1.weight', 'backbone.') == (4, 8)


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_other_libraries_build_it_by_either_name(scope):
    pytest.importorskip(f'{scope}.models')  # mmdet's needs the compiled operators of mmcv
    registry = importlib.import_module(f'{scope}.registry').MODELS
    for name in ('InceptionNeXt', 'mmseg.InceptionNeXt'):
        with registry.switch_scope_and_registry(scope) as found:
            assert type(found.build(dict(type=name, arch=SMALL, norm_cfg=dict(type='BN')))) is InceptionNeXt


def test_a_retinanet_of_mmdet_has_a_gradient_for_every_parameter():
    """Of out-norms whose map nobody takes there would be none, which DDP complains of."""
    pytest.importorskip('mmdet.models')
    from mmdet.registry import MODELS as MMDET
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    head = dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1, 2],
                              strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss'),
    )  # fmt: skip
    cfg = dict(
        type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=dict(type='mmseg.InceptionNeXt', arch=SMALL, norm_cfg=dict(type='BN'), out_indices=(1, 2, 3)),
        neck=dict(type='FPN', in_channels=[24, 32, 40], out_channels=16, num_outs=5, add_extra_convs='on_input'),
        bbox_head=head,
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                       sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
    )  # fmt: skip
    with MMDET.switch_scope_and_registry('mmdet') as registry:
        model = registry.build(cfg)
        sample = DetDataSample(metainfo=dict(img_shape=(96, 96), batch_input_shape=(96, 96), pad_shape=(96, 96)))
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 60, 60]]), labels=torch.tensor([1]))
        losses = model.loss(torch.randn(1, 3, 96, 96), [sample])
    sum(sum(value) if isinstance(value, list) else value for value in losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_image_classifier_of_mmpretrain_has_a_gradient_for_every_parameter():
    pytest.importorskip('mmpretrain.models')
    from mmpretrain.registry import MODELS as MMPRETRAIN
    from mmpretrain.structures import DataSample

    cfg = dict(
        type='ImageClassifier',
        backbone=dict(type='mmseg.InceptionNeXt', arch=SMALL, norm_cfg=dict(type='BN'), out_indices=(-1,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=40),
    )
    with MMPRETRAIN.switch_scope_and_registry('mmpretrain') as registry:
        model = registry.build(cfg)
    loss = model.loss(torch.randn(2, 3, 64, 64), [DataSample().set_gt_label(i) for i in range(2)])['loss']
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
