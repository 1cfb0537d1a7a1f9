"""A UperNet of mmseg, transformers or segmentation_models_pytorch computes the same after late_upsample()."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.models.segmentors import EncoderDecoder
from support import ROOT, TINY_UPERNET, relative_error, segmentor_with_statistics
from torch import Tensor, nn

from mmseg_inceptionnext import LateUpsampleUPerHead, UserError, late_upsample
from mmseg_inceptionnext.models import late_upsample as module
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d

MAP_CHANNELS = [8, 12, 16, 20]
STRIDED = ((24, 32), (12, 16), (6, 8), (3, 4))
ODD = ((37, 53), (18, 26), (9, 13), (4, 6))
WILD = ((23, 31), (17, 5), (7, 31), (1, 2))


def mmseg_model(channels: int = 16, **head) -> nn.Module:
    options = dict(type='UPerHead', channels=channels, dropout_ratio=0) | head
    return segmentor_with_statistics(TINY_UPERNET, **{f'decode_head.{key}': value for key, value in options.items()})


def transformers_model(channels: int = 16) -> nn.Module:
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    stages = [f'stage{i}' for i in range(1, 5)]
    backbone = transformers.ConvNextConfig(hidden_sizes=MAP_CHANNELS, depths=[1, 1, 1, 1], out_features=stages)
    cfg = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=channels, num_labels=5, auxiliary_in_channels=16, auxiliary_channels=8
    )
    return transformers.UperNetForSemanticSegmentation(cfg)


def smp_model(channels: int = 16, **kwargs) -> nn.Module:
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation_models_pytorch is not installed')
    return smp.UPerNet('tu-test_resnet', encoder_weights=None, decoder_channels=channels, classes=5, **kwargs)


MODELS = {'mmseg': mmseg_model, 'transformers': transformers_model, 'smp': smp_model}
HEADS = {'mmseg': 'decode_head', 'transformers': 'decode_head', 'smp': 'decoder'}


@pytest.fixture(params=MODELS)
def library(request) -> str:
    return request.param


def pair(library: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A model with statistics that are not the initial ones, and a treated copy; in float64."""
    plain = MODELS[library](**kwargs).double()
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    late = copy.deepcopy(plain)
    assert late_upsample(late)
    return plain, late


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, 'logits', out)


def run_in_training(function, model: nn.Module, x) -> list[Tensor]:
    """Result, gradients and statistics."""
    out = function(model.train(), x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(out.sin().sum(), parameters, allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None), *model.buffers()]


def test_whole_models_compute_the_same(library):
    plain, late = pair(library)
    x = torch.randn(2, 3, *{'smp': (64, 96)}.get(library, (75, 93))).double()  # smp refuses odd sizes
    with torch.no_grad():
        expected, ours = (logits(model.eval(), x) for model in (plain, late))
    assert (ours - expected).abs().max() < 1e-9 and ours.stride() == expected.stride()
    for ours, expected in zip(*(run_in_training(logits, model, x) for model in (late, plain)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('sizes', [STRIDED, ODD, WILD], ids=str)
def test_heads_compute_the_same_for_maps_of_any_size(library, sizes):
    models = pair(library)
    plain, late = (getattr(model, HEADS[library]) for model in models)
    channels = models[0].encoder.out_channels[2:] if library == 'smp' else plain.in_channels
    maps = [torch.randn(2, c, *size).double() for c, size in zip(channels, sizes, strict=True)]
    if library == 'smp':
        maps = [maps[0], maps[0], *maps]  # of which its decoder takes the last four
    for ours, expected in zip(
        *(run_in_training(nn.Module.__call__, head, maps) for head in (late, plain)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('align_corners', [False, True])
def test_mmsegs_options(align_corners):
    plain, late = pair('mmseg', align_corners=align_corners, pool_scales=(1, 3), norm_cfg=None)
    x = torch.randn(1, 3, 65, 97).double()
    with torch.no_grad():
        assert (logits(late.eval(), x) - logits(plain.eval(), x)).abs().max() < 1e-9


@pytest.mark.parametrize(
    'options',
    [dict(encoder_depth=3, upsampling=2), dict(decoder_use_norm=False)],
    ids=str,
)
def test_smps_options(options):
    plain, late = pair('smp', **options)
    x = torch.randn(2, 3, 64, 96).double()
    for ours, expected in zip(*(run_in_training(logits, model, x) for model in (late, plain)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_float32_wide_enough_for_winograds_algorithm(library):
    plain, late = pair(library, channels=256)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = logits(plain.eval(), x.double())
        assert relative_error(logits(late.float().eval(), x), expected) < 1e-5


def test_an_optimizer_made_before_goes_on(library):
    """Parameters are the same objects; the state dict has the same keys, in the same order, and values."""
    late, plain = pair(library)[0], None
    plain, x = copy.deepcopy(late), torch.randn(2, 3, 64, 64).double()
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, late)}
    parameters, state = list(late.parameters()), copy.deepcopy(late.state_dict())
    late_upsample(late)
    assert all(a is b for a, b in zip(late.parameters(), parameters, strict=True))
    assert list(late.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in late.state_dict().items())
    for model, optimizer in optimizers.items():
        for _ in range(2):
            optimizer.zero_grad()
            logits(model.train(), x).sin().mean().backward()
            optimizer.step()
    for key, value in late.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-9, atol=1e-9)


def test_it_names_what_it_replaced_and_does_nothing_twice(library):
    plain = MODELS[library]()
    late = copy.deepcopy(plain)
    names = late_upsample(late)
    assert len(names) == 5
    for name, layer in late.named_modules():
        assert (type(layer) is type(plain.get_submodule(name))) == (name not in [*names, HEADS[library]]), name
    assert sum(isinstance(late.get_submodule(name), LateUpsampleConv2d) for name in names) == 2
    structure = repr(late)
    assert late_upsample(late) == [] and repr(late) == structure
    assert not any(type(layer).__name__.startswith('Late') for layer in plain.modules())


def test_copies_and_files(library):
    plain, late = pair(library)
    copies = [copy.deepcopy(late)]
    if library != 'transformers':  # whose own models cannot be pickled, only their state dicts
        file = io.BytesIO()
        torch.save(late, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    x = torch.randn(1, 3, 64, 96).double()
    with torch.no_grad():
        expected = logits(late.eval(), x)
        for model in copies:
            assert torch.equal(logits(model.eval(), x), expected)
    plain.load_state_dict(late.state_dict())
    late.load_state_dict(plain.state_dict())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_no_more_than_before(library, dtype):
    deviations = [0.0, 0.0]
    for seed in range(4):
        torch.manual_seed(seed)
        plain, late = pair(library, channels=32)
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = logits(plain.eval(), x.double())
            for i, model in enumerate((plain, late)):
                with torch.autocast('cpu', dtype):
                    deviations[i] += (logits(model.float().eval(), x) - expected).pow(2).mean().sqrt().item()
    assert deviations[1] <= 1.1 * deviations[0]


def test_masks_can_be_viewed_as_before(library):
    """The losses of segmentation_models_pytorch take views of masks, which not every layout allows."""
    for model in pair(library):
        assert logits(model.eval(), torch.randn(2, 3, 64, 96).double()).is_contiguous()


def test_channels_last(library):
    plain, late = (model.to(memory_format=torch.channels_last).eval() for model in pair(library))
    x = torch.randn(2, 3, 64, 96).double().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert (logits(late, x) - logits(plain, x)).abs().max() < 1e-9


def test_a_bare_head_and_one_deep_inside():
    head = UPerHead(in_channels=MAP_CHANNELS, in_index=[0, 1, 2, 3], channels=16, num_classes=5)
    names = ['bottleneck.conv', 'fpn_bottleneck.conv', *(f'fpn_convs.{i}.conv' for i in range(3))]
    inside = nn.ModuleDict(dict(a=nn.ModuleList([copy.deepcopy(head)]), b=LateUpsampleUPerHead(**arguments_of(head))))
    assert late_upsample(head) == names and type(head) is LateUpsampleUPerHead
    assert late_upsample(inside) == [f'a.0.{name}' for name in names]


def arguments_of(head: UPerHead) -> dict:
    return dict(in_channels=head.in_channels, in_index=head.in_index, channels=head.channels, num_classes=5)


def test_auxiliary_uper_heads_too():
    model = mmseg_model()
    del model.auxiliary_head
    model.auxiliary_head = nn.ModuleList([copy.deepcopy(model.decode_head)])
    assert {name.split('.')[0] for name in late_upsample(model)} == {'decode_head', 'auxiliary_head'}


def test_hooks_and_old_style_norms_of_weights_stay(library):
    """They belong to modules, which stay the same ones."""
    plain = MODELS[library]().double().eval()
    name = dict(smp='decoder.fusion_block').get(library, 'decode_head.fpn_bottleneck')
    conv = plain.get_submodule(name)[0] if library == 'smp' else plain.get_submodule(name).conv
    nn.utils.spectral_norm(conv)
    plain.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)
    late = copy.deepcopy(plain)
    late_upsample(late)
    x = torch.randn(1, 3, 64, 96).double()
    with torch.no_grad():
        assert (logits(late, x) - logits(plain, x)).abs().max() < 1e-9


def replace_forward(layer: nn.Module) -> None:
    layer.forward = layer.forward


class DerivedHead(UPerHead):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def derive(model: nn.Module) -> None:
    model.decode_head.__class__ = DerivedHead


def other_padding(model: nn.Module) -> None:
    model.decode_head.fpn_bottleneck.conv.padding_mode = 'reflect'


def other_kernel(model: nn.Module) -> None:
    model.decode_head.bottleneck.conv = nn.Conv2d(model.decode_head.bottleneck.conv.in_channels, 16, 1)


def other_layers(model: nn.Module) -> None:
    model.decode_head.fpn_bottleneck = nn.Sequential(nn.Dropout(0.1), model.decode_head.fpn_bottleneck)


def parametrize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.decode_head.fpn_bottleneck.conv)


def hook_on_pooling(model: nn.Module) -> None:
    model.decode_head.psp_modules.register_forward_hook(lambda module, inputs, out: [2 * x for x in out])


@pytest.mark.parametrize('change, message', [
    (derive, 'decode_head is a DerivedHead, but late_upsample knows UPerHead itself'),
    (other_padding, "its fpn_bottleneck.conv is Conv2d(64, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
                    "bias=False, padding_mode=reflect): only plain 3×3 convolutions"),
    (other_kernel, 'its bottleneck.conv is Conv2d(128, 16, kernel_size=(1, 1), stride=(1, 1)): only plain 3×3'),
    (other_layers, 'its layers have been replaced: call late_upsample before'),
    (parametrize, 'its fpn_bottleneck.conv is ParametrizedConv2d: only plain 3×3'),
    (hook_on_pooling, 'its pooling has hooks: call late_upsample before'),
    (lambda model: replace_forward(model.decode_head), 'its forward method has been replaced'),
    (lambda model: replace_forward(model.decode_head.psp_modules), 'its forward method has been replaced'),
])  # fmt: skip
def test_refusals(change, message):
    """Nothing is replaced then, in other heads neither."""
    model = mmseg_model()
    model.auxiliary_head = copy.deepcopy(model.decode_head)
    change(model)
    structure = repr(model)
    with pytest.raises(UserError) as error:
        late_upsample(model)
    assert message in str(error.value) and '\n' not in str(error.value)
    assert repr(model) == structure


def test_convolutions_of_other_kinds_are_refused_in_both_heads():
    for kind in ('UPerHead', 'LateUpsampleUPerHead'):
        model = segmentor_with_statistics(
            TINY_UPERNET, **{'decode_head.type': kind, 'decode_head.conv_cfg': dict(type='ConvAWS')}
        )
        with pytest.raises(UserError, match='its bottleneck.conv is ConvAWS2d'):
            late_upsample(model)


@pytest.mark.parametrize('model', [
    nn.Conv2d(3, 3, 3), FCNHead(in_channels=8, channels=8, num_classes=2),
    torch.jit.trace(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 4, 4)),
], ids=lambda model: type(model).__name__)  # fmt: skip
def test_a_model_without_a_upernet(model):
    with pytest.raises(UserError, match=f'model={type(model).__name__} has no UperNet that late_upsample knows'):
        late_upsample(model)
    with pytest.raises(UserError, match='model is a str'):
        late_upsample('decode_head')


@pytest.mark.parametrize('library', ['transformers', 'smp'])
@pytest.mark.parametrize('other', ['forward', 'constructor'])
def test_another_version_of_a_library(library, other, monkeypatch):
    """One that computes something else, or is built in another way, is not touched."""
    model = MODELS[library]()
    kind = type(getattr(model, HEADS[library]))
    if other == 'forward':
        forward = kind.forward
        monkeypatch.setattr(kind, 'forward', lambda self, maps: forward(self, [x.flip(2) for x in maps]))
    else:
        monkeypatch.setattr(kind, '__init__', lambda self, channels: None)
    module._computes_the_same.cache_clear()
    with pytest.raises(UserError, match='computes it in another way than late_upsample knows'):
        late_upsample(model)
    module._computes_the_same.cache_clear()
    assert type(getattr(model, HEADS[library])) is kind


def test_it_needs_neither_transformers_nor_smp():
    program = (
        'import sys; sys.modules.update(transformers=None, segmentation_models_pytorch=None); '
        'import mmseg_inceptionnext; from mmseg.models.decode_heads import UPerHead; '
        'head = UPerHead(in_channels=[4] * 4, in_index=[0, 1, 2, 3], channels=4, num_classes=2); '
        'print(len(mmseg_inceptionnext.late_upsample(head)))'
    )
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0 and process.stdout == '5\n', process.stderr


def test_the_random_state_stays(library):
    model = MODELS[library]()
    module._computes_the_same.cache_clear()
    state = torch.random.get_rng_state()
    late_upsample(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_segmentor_predicts_as_before():
    plain = mmseg_model()
    late = copy.deepcopy(plain)
    late_upsample(late)
    assert type(late) is EncoderDecoder
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, ours = (model(x, mode='predict')[0] for model in (plain, late))
    assert torch.equal(ours.pred_sem_seg.data, expected.pred_sem_seg.data)
