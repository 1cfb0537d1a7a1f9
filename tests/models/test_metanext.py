"""MetaNeXt: parity with other people's ConvNeXt and MetaNeXt, the ablations of Table 8, and what all archs can do."""

import re

import pytest
import timm
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from support import TINY_CONFIG, TINY_UPERNET, assert_user_error, relative_error, segmentor_with_statistics
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mmseg_inceptionnext import TOKEN_MIXERS, InceptionNeXt, MetaNeXt, UserError, optimize_for_inference
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.export.exportable import ExportableSegmentor
from mmseg_inceptionnext.models.archs import METANEXT_ARCHS, resolve_metanext_arch
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.token_mixers import DWConv2d, InceptionDWConv2d

WIDTHS = (16, 32, 48, 64)


def narrow(name: str) -> dict:
    """The arch of a name with few blocks and channels, which computes in milliseconds; norm and mixer are the same."""
    arch = dict(METANEXT_ARCHS[name])
    if isinstance(arch['depths'], int):
        body = dict(depths=5, channels=64, mlp_ratios=2)
    else:
        body = dict(depths=(1, 2, 1, 1), channels=WIDTHS, mlp_ratios=(2, 2, 2, 2))
    norm_cfg = dict(type='BN') if arch['norm_cfg']['type'] == 'SyncBN' else arch['norm_cfg']
    return {**arch, **body, 'norm_cfg': norm_cfg}


def config_of(name: str) -> Config:
    """A Semantic FPN around the narrow arch; an isotropic one gets its pyramid as ViTs do."""
    cfg = Config.fromfile(TINY_CONFIG)
    arch = narrow(name)
    cfg.model.backbone = dict(type='MetaNeXt', arch=arch, layer_scale_init_value=0.5)
    if isinstance(arch['depths'], int):
        cfg.model.neck = dict(type='Feature2Pyramid', embed_dim=64, norm_cfg=dict(type='BN'))
        cfg.model.decode_head.in_channels = [64] * 4
    return cfg


def released_names(state_dict: dict[str, Tensor], partial: bool) -> dict[str, Tensor]:
    """timm's ConvNeXt under the parameter names of the released files."""
    names = (
        (r'^stem\.', 'downsample_layers.0.'),
        (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
        (r'\.blocks\.', '.'),
        (r'\.conv_dw\.', '.dwconv.conv.' if partial else '.dwconv.'),
        (r'\.mlp\.fc(\d)\.', r'.pwconv\1.'),
        (r'^head\.norm\.', 'norm.'),
        (r'^head\.fc\.', 'head.'),
    )
    renamed = {}
    for key, value in state_dict.items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    return renamed


@pytest.fixture(scope='module')
def convnext() -> nn.Module:
    """timm's ConvNeXt-T with 5×5 kernels. γ is drawn: at 1e-6 no block would matter."""
    torch.manual_seed(0)
    model = timm.create_model('convnext_tiny', kernel_sizes=5).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('gamma'):
                parameter.normal_(0.3, 0.1)
    return model


@pytest.mark.parametrize('origin', ['released', 'timm'])
def test_a_convnext_loads_and_computes_what_timms_computes(origin, convnext, tmp_path):
    state_dict = convnext.state_dict()
    torch.save(state_dict if origin == 'timm' else released_names(state_dict, partial=False), tmp_path / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    ours = MetaNeXt('convnext_tiny_k5', out_norm=False, init_cfg=init_cfg)
    ours.init_weights()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = convnext.forward_intermediates(x, intermediates_only=True)
        for feature, theirs in zip(ours.eval()(x), expected, strict=True):
            assert relative_error(feature, theirs) < 1e-5


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('convnext_tiny_k3', r'this is a ConvNeXt.*dwconv.weight is \(96, 1, 5, 5\), here \(96, 1, 3, 3\)'),
        ('convnext_tiny_k3_par1_2', r'this is a ConvNeXt.*here \(48, 1, 3, 3\)'),
        ('inceptionnext_tiny', r'this is a ConvNeXt.*keys are missing'),
    ],
)
def test_a_convnext_is_loaded_whole_or_not_at_all(arch, message, convnext, tmp_path):
    torch.save(released_names(convnext.state_dict(), partial=False), tmp_path / 'w.pth')
    ours = MetaNeXt(arch, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(UserError, match=message):
        ours.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_a_convnext_of_partial_convolutions_loads(convnext, tmp_path):
    """Its convolution has a name more in the released files, and the last channels go through it."""
    whole = MetaNeXt('convnext_tiny_k3_par1_4')
    theirs = {
        re.sub(r'token_mixer\.dwconv', 'conv_dw', key): value.flatten(1)
        if '.mlp.fc' in key and value.ndim == 4
        else value
        for key, value in whole.state_dict().items()
        if not re.match(r'norm\d', key)
    }
    torch.save(released_names(theirs, partial=True), tmp_path / 'w.pth')
    ours = MetaNeXt('convnext_tiny_k3_par1_4', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')))
    ours.init_weights()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize('norm', ['BN', 'LN'])
@pytest.mark.parametrize('mixer', [dict(band_kernel_size=7), dict(square_kernel_size=5, branch_ratio=1 / 4)], ids=str)
def test_ablations_compute_what_timms_metanext_computes(mixer, norm):
    from functools import partial

    from timm.models.inception_next import InceptionDWConv2d as Theirs
    from timm.models.inception_next import MetaNeXt as TheirMetaNeXt

    norm_layer = dict(BN=nn.BatchNorm2d, LN=LayerNorm2d)[norm]
    theirs = TheirMetaNeXt(
        depths=(1, 1, 2, 1),
        dims=WIDTHS,
        token_mixers=partial(Theirs, **mixer),
        norm_layer=norm_layer,
        ls_init_value=0.5,
    ).eval()
    arch = dict(depths=(1, 1, 2, 1), channels=WIDTHS, mlp_ratios=(4, 4, 4, 3))
    ours = MetaNeXt(arch, token_mixer=dict(type='InceptionDWConv2d', **mixer), norm_cfg=dict(type=norm), out_norm=False)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith('head.')}, strict=True)
    x = torch.randn(1, 3, 65, 99)
    with torch.no_grad():
        for feature, expected in zip(
            ours.eval()(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True
        ):
            assert relative_error(feature, expected) < 1e-5


@pytest.mark.parametrize('branch', ['hw', 'w', 'h'])
def test_a_branch_that_is_left_out_passes_its_channels(branch):
    whole = InceptionDWConv2d(32)
    mixer = InceptionDWConv2d(32, branches=tuple({'hw', 'w', 'h'} - {branch}))
    assert not any(f'dwconv_{branch}.' in key for key in mixer.state_dict())
    mixer.load_state_dict({key: value for key, value in whole.state_dict().items() if f'dwconv_{branch}.' not in key})
    x = torch.randn(2, 32, 9, 7)
    start = 20 + 4 * ['hw', 'w', 'h'].index(branch)
    expected = whole(x)
    expected[:, start : start + 4] = x[:, start : start + 4]
    assert torch.equal(mixer(x), expected)


def test_bands_in_sequence_follow_each_other_on_the_same_channels():
    whole, mixer = InceptionDWConv2d(32), InceptionDWConv2d(32, sequential=True)
    mixer.load_state_dict(whole.state_dict())
    x = torch.randn(2, 32, 9, 7)
    expected = whole(x)
    expected[:, 24:28] = whole.dwconv_h(whole.dwconv_w(x[:, 24:28]))
    expected[:, 28:] = x[:, 28:]
    assert torch.equal(mixer(x), expected)


def test_a_share_of_the_channels_is_convolved():
    mixer, x = DWConv2d(16, 3, ratio=3 / 8), torch.randn(1, 16, 5, 5)
    assert torch.equal(mixer(x)[:, :10], x[:, :10]) and torch.equal(mixer(x)[:, 10:], mixer.dwconv(x[:, 10:]))


def test_attention_is_timms_on_the_positions():
    backbone = MetaNeXt(dict(depths=1, channels=64, mlp_ratios=2, patch_size=16), token_mixer=dict(type='Attention'))
    mixer, x = backbone.stages[0].blocks[0].token_mixer, torch.randn(2, 64, 3, 5)
    reference = timm.models.vision_transformer.Attention(64, num_heads=1, qkv_bias=True)
    reference.load_state_dict(mixer.state_dict())
    expected = reference(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, 64, 3, 5)
    torch.testing.assert_close(mixer(x), expected)


def test_inceptionnext_is_a_case_of_it():
    one, other = InceptionNeXt('atto', norm_cfg=dict(type='BN')), MetaNeXt('atto', norm_cfg=dict(type='BN'))
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(one.eval()(x), other.eval()(x), strict=True))


@pytest.mark.parametrize('name', METANEXT_ARCHS)
def test_maps_have_the_channels_and_strides_that_are_announced(name):
    backbone = MODELS.build(dict(type='MetaNeXt', arch=narrow(name))).eval()
    with torch.no_grad():
        outs = backbone(torch.zeros(1, 3, 64, 96))
    assert [out.shape[1] for out in outs] == list(backbone.out_channels) and len(outs) == 4
    assert [tuple(out.shape[2:]) for out in outs] == [(64 // s, 96 // s) for s in backbone.strides]


@pytest.mark.parametrize('name', METANEXT_ARCHS)
def test_every_arch_trains_and_checkpointing_changes_nothing(name):
    arch, x, outs = narrow(name), torch.randn(2, 3, 64, 64, dtype=torch.double), []
    backbones = [MetaNeXt(arch, layer_scale_init_value=0.5, with_cp=with_cp).double() for with_cp in (False, True)]
    backbones[1].load_state_dict(backbones[0].state_dict())
    for backbone in backbones:
        outs.append(backbone(x))
        sum(out.pow(3).sum() for out in outs[-1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    for (key, a), b in zip(backbones[0].named_parameters(), backbones[1].parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad), key
    assert all(torch.equal(a, b) for a, b in zip(backbones[0].buffers(), backbones[1].buffers(), strict=True))


@pytest.mark.parametrize('name', METANEXT_ARCHS)
def test_frozen_stages_keep_weights_and_mode(name):
    backbone = MetaNeXt(narrow(name), frozen_stages=2).train()
    frozen = [backbone.stem, *backbone.stages[:2]]
    inside = {p for module in frozen for p in module.parameters()}
    assert {p for p in backbone.parameters() if not p.requires_grad} == inside
    assert not any(m.training for module in frozen for m in module.modules()) and backbone.stages[2].training


# One of each kind; the others differ from them by a size.
KINDS = (
    'inceptionnext_tiny', 'convnext_tiny', 'convnext_tiny_k3_par1_4', 'metanext_attn_small', 'inceptionnext_iso_small',
    'inceptionnext_tiny_no_w', 'inceptionnext_tiny_sequential', 'inceptionnext_tiny_ln',
)  # fmt: skip


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in METANEXT_ARCHS]
)
def test_every_arch_is_exported_and_optimised(name, tmp_path):
    """The logits stay the same: optimised in float32, and through torch.export with the norms folded."""
    torch.manual_seed(0)
    path = tmp_path / 'config.py'
    config_of(name).dump(path)
    model = segmentor_with_statistics(path)
    inputs = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(inputs, mode='tensor')
        assert relative_error(optimize_for_inference(model)(inputs, mode='tensor'), expected) < 1e-5
        images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
        inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))), False)['inputs']
        expected = model.encode_decode(inputs, [dict(img_shape=(64, 96))])
        exportable = ExportableSegmentor(model, labels=False)
        assert relative_error(exportable(images), expected) < 1e-5
        program = torch.export.export(exportable, (images,)).module()
        assert relative_error(program(images), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_every_kind_is_written_as_an_onnx_file_of_any_size(name, tmp_path):
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'model.pth'
    config_of(name).dump(config)
    meta = dict(classes=[f'class {i}' for i in range(150)], palette=[(i, i, i) for i in range(150)])
    torch.save(
        dict(meta=dict(dataset_meta=meta), state_dict=segmentor_with_statistics(config).state_dict()), checkpoint
    )
    assert export(config, checkpoint, tmp_path / 'model.onnx', (64, 96), dynamic=True, verify=1).error < 1e-4


def test_an_ablation_takes_one_line():
    cfg = Config.fromfile(TINY_UPERNET)
    cfg.merge_from_dict({'model.backbone.token_mixer.band_kernel_size': 7})
    block = build_segmentor(cfg).backbone.stages[0].blocks[0]
    assert block.token_mixer.dwconv_w.kernel_size == (1, 7) and block.token_mixer.dwconv_hw.kernel_size == (3, 3)
    assert block.token_mixer.dwconv_w.weight.shape[0] == 4  # the arch's branch_ratio


def test_an_arch_of_metanext_says_so_where_inceptionnext_is_built():
    with pytest.raises(UserError, match="arch='convnext_tiny_k3' is MetaNeXt's: set type='MetaNeXt'"):
        InceptionNeXt('convnext_tiny_k3')


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (['token_mixer.band_kernel_size=8'], ['band_kernel_size=8 must be odd']),
        (['token_mixer.kernel=8'], ['token_mixer.kernel is no argument of InceptionDWConv2d']),
        (['type=MetaNeXt', 'arch=convnext_tiny'], ['do not fit MetaNeXt, whose out_channels are [96, 192, 384, 768]']),
    ],
    ids=' '.join,
)
def test_a_wrong_ablation_is_a_line(options, parts, tool_here, mini_root, tmp_path):
    options = [f'model.backbone.{option}' for option in options]
    arguments = ['--data-root', mini_root, '--work-dir', tmp_path / 'work', '--weights', 'none']
    process = tool_here('train', 'mini/fpn_inceptionnext_a', *arguments, '--cfg-options', *options)
    assert_user_error(process, *parts)


def test_another_mixer_takes_its_own_defaults():
    arch = resolve_metanext_arch('inceptionnext_tiny')
    assert arch.mixer_with(dict(type='DWConv2d')) == dict(type='DWConv2d')
    assert arch.mixer_with(dict(type='InceptionDWConv2d', branch_ratio=0.25))['band_kernel_size'] == 11
    assert InceptionNeXt('atto', token_mixer=dict(type='DWConv2d')).stages[0].blocks[0].token_mixer.dwconv.groups == 40


def test_the_names_of_inceptionnext_are_taken_too():
    for name in ('a', 'atto', 'inceptionnext_atto'):
        assert resolve_metanext_arch(name).channels == (40, 80, 160, 320)


def test_a_mixer_of_ones_own():
    @TOKEN_MIXERS.register_module()
    class Pooling(nn.Module):
        def __init__(self, channels, size=3):
            super().__init__()
            self.pool = nn.AvgPool2d(size, 1, size // 2)

        def forward(self, x):
            return self.pool(x) - x

    try:
        backbone = MetaNeXt('atto', token_mixer=dict(type='Pooling', size=5))
        assert backbone.stages[3].blocks[0].token_mixer.pool.kernel_size == 5
    finally:
        del TOKEN_MIXERS.module_dict['Pooling']


ISO = dict(depths=4, channels=64, mlp_ratios=4, patch_size=16)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='convnext_tiny_k9'), "unknown arch 'convnext_tiny_k9': did you mean 'convnext_tiny_k"),
        (dict(arch='vgg'), "unknown arch 'vgg': choose from 'inceptionnext_atto'"),
        (dict(arch=dict(depths=(1,))), "lacks ['channels', 'mlp_ratios']"),
        (dict(arch={**ISO, 'width': 3}), "unknown keys ['width']"),
        (dict(arch={**ISO, 'channels': (64, 64)}), 'one entry a stage, or be three numbers'),
        (dict(arch={**ISO, 'depths': 0}), 'depths=0'),
        (dict(arch={**ISO, 'depths': 1.5}), 'depths=1.5'),
        (dict(arch={**ISO, 'patch_size': 0}), 'patch_size=0'),
        (dict(token_mixer=dict(band_kernel=7)), 'token_mixer.band_kernel is no argument of InceptionDWConv2d, which'),
        (dict(token_mixer=dict(type='DWConv2d', band_kernel_size=7)), 'band_kernel_size is no argument of DWConv2d'),
        (dict(token_mixer=dict(type='Pooling')), "token_mixer.type='Pooling' is none of InceptionDWConv2d, DWConv2d"),
        (dict(token_mixer=dict(band_kernel_size=8)), 'band_kernel_size=8 must be odd'),
        (dict(token_mixer=dict(square_kernel_size=0)), 'square_kernel_size=0 must be odd'),
        (dict(token_mixer=dict(branch_ratio=0.5)), 'branch_ratio=0.5 of 40 channels'),
        (dict(token_mixer=dict(branch_ratio='1/4')), 'branch_ratio=1/4'),
        (dict(token_mixer=dict(branches=['hw', 'v'])), "branches=('hw', 'v') must be some of 'hw', 'w' and 'h'"),
        (dict(token_mixer=dict(branches='hw', sequential=True)), "branches=('hw',) must have 'w' and 'h'"),
        (dict(token_mixer=dict(type='DWConv2d', kernel_size=4)), 'kernel_size=4 must be odd'),
        (dict(token_mixer=dict(type='DWConv2d', ratio=1.5)), 'ratio=1.5 of 40 channels'),
        (dict(token_mixer=dict(type='Attention')), 'head_dim=64 must divide the 40 channels'),
        (dict(arch='convnext_iso_small', out_indices=(18,)), 'must name stages from 0 to 17'),
        (dict(norm_cfg=dict(type='NoNorm')), "norm_cfg={'type': 'NoNorm'} is no norm of 40 channels"),
        (dict(norm_cfg=dict(type='GN')), "norm_cfg={'type': 'GN'} is no norm of 40 channels"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        MetaNeXt(**{'arch': 'atto', **kwargs})
