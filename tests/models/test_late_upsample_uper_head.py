"""The head computes what mmseg's UPerHead computes, from the same state dict."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from support import relative_error
from torch import nn
from torch.autograd import forward_ad

from mmseg_inceptionnext import LateUpsampleUPerHead
from mmseg_inceptionnext.models import late_upsample_uper_head
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d, take_taps

IN_CHANNELS = (8, 12, 16, 20)
STRIDED = tuple((48 // stride, 64 // stride) for stride in (1, 2, 4, 8))
ODD = ((37, 53), (18, 26), (9, 13), (4, 6))
WILD = ((23, 31), (17, 5), (7, 31), (1, 2))
DILATED = ((16, 20), (8, 10), (8, 10), (8, 10))
UP_SIDE_DOWN = ((8, 10), (16, 20), (5, 5), (8, 10))


def pair(channels: int = 16, **kwargs) -> tuple[UPerHead, LateUpsampleUPerHead]:
    """mmseg's head and ours with equal weights and statistics that are not the initial ones."""
    arguments = dict(
        in_channels=list(IN_CHANNELS), in_index=[0, 1, 2, 3], channels=channels, num_classes=5, norm_cfg=dict(type='BN')
    )
    plain, late = (cls(**arguments | kwargs) for cls in (UPerHead, LateUpsampleUPerHead))
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    nn.init.normal_(plain.conv_seg.weight)
    late.load_state_dict(plain.state_dict(), strict=True)
    return plain, late


def features(sizes, n: int = 2, dtype=torch.double) -> list[torch.Tensor]:
    return [torch.randn(n, c, *size, dtype=dtype) for c, size in zip(IN_CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', [STRIDED, ODD, WILD, DILATED, UP_SIDE_DOWN], ids=str)
def test_equal_in_eval_mode(sizes, align_corners):
    plain, late = pair(align_corners=align_corners)
    x = features(sizes)
    with torch.no_grad():
        expected, logits = (head.double().eval()(x) for head in (plain, late))
    assert (logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', [STRIDED, WILD], ids=str)
def test_equal_gradients_and_statistics_in_train_mode(sizes, align_corners):
    plain, late = pair(align_corners=align_corners, dropout_ratio=0.0)
    results = []
    x = [f.requires_grad_() for f in features(sizes)]
    for head in (plain.double().train(), late.double().train()):
        logits = head(x)
        gradients = torch.autograd.grad(logits.sin().sum(), [*x, *head.parameters()])
        results.append((logits, *gradients, *head.buffers()))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'variant', [dict(pool_scales=(1,)), dict(pool_scales=(3, 5, 8, 2, 9)), dict(norm_cfg=None), dict(act_cfg=None)],
    ids=str,
)  # fmt: skip
def test_variants(variant):
    plain, late = pair(**variant)
    x = features(ODD)
    with torch.no_grad():
        assert (late.double().eval()(x) - plain.double().eval()(x)).abs().max() < 1e-10


@pytest.mark.parametrize('conv_cfg', [dict(type='ConvAWS'), dict(type='Conv2d', padding_mode='reflect')], ids=str)
def test_another_kind_of_convolution_is_left_alone(conv_cfg):
    plain, late = pair(conv_cfg=conv_cfg)
    assert not late.late and type(late.fpn_bottleneck.conv) is type(plain.fpn_bottleneck.conv)
    x = features(ODD, dtype=torch.float)
    with torch.no_grad():
        assert relative_error(late.eval()(x), plain.eval()(x)) < 1e-5


def test_float32_with_the_paper_s_channels():
    """Wide enough for Winograd's algorithm; gradients against float64."""
    plain, late = pair(channels=256)
    x = features(STRIDED, n=1, dtype=torch.float)
    reference = copy.deepcopy(plain).double().eval()
    expected = reference([f.double() for f in x])
    logits = late.eval()(x)
    assert relative_error(logits, expected) < 1e-5
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    weights = torch.randn_like(expected)
    wanted, ours = (
        torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(head.parameters()))
        for out, head in ((expected, reference), (logits, late))
    )
    largest = max(gradient.abs().max() for gradient in wanted)
    assert max((a - b).abs().max() for a, b in zip(ours, wanted, strict=True)) < 1e-5 * largest


@pytest.fixture(params=[True, False], ids=['bfloat16 products', 'float32 products'])
def products_of_bfloat16(request, monkeypatch):
    monkeypatch.setattr(late_upsample_uper_head, 'multiplies_bfloat16', lambda device: request.param)
    if request.param and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip('this processor would emulate them')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_the_plain_head_s(dtype, products_of_bfloat16):
    deviations = {'plain': [], 'late': []}
    for seed in range(8):
        torch.manual_seed(seed)
        heads = dict(zip(('plain', 'late'), pair(channels=32), strict=True))
        x = features(STRIDED, n=1, dtype=torch.float)
        with torch.no_grad():
            expected = heads['plain'].eval()(x)
            for name, head in heads.items():
                with torch.autocast('cpu', dtype):
                    deviations[name].append((head.eval()(x).float() - expected).pow(2).mean().sqrt().item())
    assert sum(deviations['late']) <= 1.05 * sum(deviations['plain'])


def test_half_precision_gradients_are_no_worse_than_the_plain_head_s(products_of_bfloat16):
    """Of all parameters and features, as --amp computes them, in a training step against float32."""
    deviations = {'plain': [], 'late': []}
    for seed in range(6):
        torch.manual_seed(seed)
        heads = dict(zip(('plain', 'late'), pair(channels=32, dropout_ratio=0.0), strict=True))
        x = [f.requires_grad_() for f in features(STRIDED, n=2, dtype=torch.float)]
        target = torch.randint(5, (2, *STRIDED[0]))

        def gradients(head, enabled: bool, x=x, target=target) -> list[torch.Tensor]:
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(head.train()(x).float(), target)
            return torch.autograd.grad(loss, [*x, *head.parameters()])

        expected = gradients(heads['plain'], enabled=False)
        for name, head in heads.items():
            ours = gradients(head, enabled=True)
            deviations[name] += [rms(a - b) / rms(b) for a, b in zip(ours, expected, strict=True) if rms(b) > 1e-6]
    assert 0 < sum(deviations['late']) <= 1.05 * sum(deviations['plain'])


def layer(dtype: torch.dtype, n: int = 2) -> tuple[LateUpsampleConv2d, list[torch.Tensor]]:
    """One layer, and maps of which two are up-sampled by whole numbers and one is not; values that dtype holds."""
    conv = LateUpsampleConv2d([16, 16, 16, 16], 32).requires_grad_(False).to(dtype)
    sizes = ((48, 70), (24, 35), (11, 17), (6, 9))
    return conv, [torch.randn(n, 16, *size).to(dtype) for size in sizes]


def plain_layer(conv: LateUpsampleConv2d, maps: list[torch.Tensor]) -> torch.Tensor:
    up_sampled = [F.interpolate(x, maps[0].shape[2:], mode='bilinear') for x in maps]
    return F.conv2d(torch.cat(up_sampled, 1), conv.weight, conv.bias, padding=1)


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def test_bfloat16_rounds_as_little_as_the_plain_convolution(products_of_bfloat16):
    """Of a layer and all of its gradients, against float64. The plain one rounds what it up-samples, and its sum."""
    conv, maps = layer(torch.bfloat16)
    weights = torch.randn(2, 32, 48, 70).bfloat16()

    def results(function, dtype) -> list[torch.Tensor]:
        own, x = copy.deepcopy(conv).to(dtype).requires_grad_(), [x.to(dtype).requires_grad_() for x in maps]
        out = function(own, x)
        return [out.detach(), *torch.autograd.grad(out, [*x, *own.parameters()], weights.to(dtype))]

    expected, plain = results(plain_layer, torch.double), results(plain_layer, torch.bfloat16)
    ours = results(lambda own, x: own(x), torch.bfloat16)
    for ours_i, plain_i, expected_i in zip(ours, plain, expected, strict=True):
        assert ours_i.dtype == torch.bfloat16
        assert rms(ours_i - expected_i) < max(1.3 * rms(plain_i - expected_i), 0.004 * rms(expected_i))


@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16], ids=str)
def test_blocks_and_parts_of_any_size_give_the_same(monkeypatch, dtype):
    """Also where a block ends inside of a part of the taps, and a part inside of a block."""
    conv, maps = layer(dtype)
    tolerance = 1e-12 if dtype == torch.double else 0.02
    maps = [x.requires_grad_() for x in maps]
    expected = plain_layer(conv, maps)
    wanted = [expected, *torch.autograd.grad(expected.sum(), maps)]
    for part in (1, 20_000, 10**9):
        for block in ((5, 3), (16, 32), (100, 100)):
            monkeypatch.setattr(late_upsample_uper_head, '_BYTES_OF_TAPS', part)
            monkeypatch.setattr(late_upsample_uper_head, '_CPU_BLOCK', block)
            monkeypatch.setattr(late_upsample_uper_head, '_CPU_BFLOAT16_BLOCK', block)
            out = conv(maps)
            for result, right in zip([out, *torch.autograd.grad(out.sum(), maps)], wanted, strict=True):
                assert relative_error(result, right) < tolerance


def test_parts_are_differentiated_twice(monkeypatch):
    monkeypatch.setattr(late_upsample_uper_head, '_BYTES_OF_TAPS', 100_000)
    conv, maps = layer(torch.double, n=1)
    results = []
    for function in (conv, lambda maps: plain_layer(conv, maps)):
        x = [x.clone().requires_grad_() for x in maps]
        grads = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), x))
    assert len(take_taps(maps[1], lambda x: x, 32)) > 1
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-10


def test_compiles_and_exports():
    """torch.compile with the backend that needs no C++ compiler; torch.export, and back."""
    _, late = pair()
    late.float().eval()
    x = features(STRIDED, n=1, dtype=torch.float)
    with torch.no_grad():
        expected = late(x)
        compiled = torch.compile(late, backend='aot_eager', fullgraph=True)(x)
        exported = torch.export.export(late, (x,)).module()(x)
    assert relative_error(compiled, expected) < 1e-5 and relative_error(exported, expected) < 1e-5


@pytest.mark.parametrize('late_is_first', [False, True])
def test_checkpoints_go_both_ways(late_is_first):
    source, target = pair()[:: 1 if late_is_first is False else -1]
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)


def test_one_layer_on_its_own_against_the_definition():
    """Up-sample, concatenate, convolve: with zeros around the up-sampled map."""
    conv = LateUpsampleConv2d([3, 4, 5], 6).double()
    maps = [torch.randn(2, c, *size, dtype=torch.double) for c, size in ((3, (11, 13)), (4, (5, 6)), (5, (2, 1)))]
    with torch.no_grad():
        up_sampled = [F.interpolate(x, (11, 13), mode='bilinear') for x in maps]
        expected = F.conv2d(torch.cat(up_sampled, 1), conv.weight, conv.bias, padding=1)
        assert (conv(maps) - expected).abs().max() < 1e-12


def test_one_layer_convolves_a_tensor_as_usual():
    """A batch of as many images as there are maps is no list of maps."""
    conv, x = LateUpsampleConv2d([3, 4, 5], 6), torch.randn(3, 12, 7, 9)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


def by_transforms(head: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch's transforms make of a head: each needs derivatives of its operations, or their names."""

    class Traceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, *maps):
            return self.head(list(maps))

    def objective(first: torch.Tensor) -> torch.Tensor:
        return head([first, *inputs[1:]]).pow(2).sum()

    ones = [torch.ones_like(x) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(head(leaves).pow(2).sum(), leaves, create_graph=True)
    with forward_ad.dual_level():
        dual = head([forward_ad.make_dual(x, one) for x, one in zip(inputs, ones, strict=True)])
        tangent = forward_ad.unpack_dual(dual).tangent
    return {
        'trace': torch.jit.trace(Traceable(), tuple(torch.rand_like(x) for x in inputs))(*inputs),
        'double backward': torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves[1])[0],
        'forward mode': tangent,
        'jvp': torch.func.jvp(lambda *maps: head(list(maps)), tuple(inputs), tuple(ones))[1],
        'vmap': torch.vmap(lambda *maps: head([x[None] for x in maps])[0])(*inputs),
        'func.grad': torch.func.grad(objective)(inputs[0]),
        'forward over reverse': torch.func.jvp(torch.func.grad(objective), (inputs[0],), (ones[0],))[1],
    }


@pytest.mark.parametrize('align_corners', [False, True])
def test_torchs_transforms_take_it_as_they_take_upernets_head(align_corners):
    plain, late = (head.eval().double() for head in pair(align_corners=align_corners))
    inputs = features(STRIDED)
    expected, results = by_transforms(plain, inputs), by_transforms(late, inputs)
    for name, result in results.items():
        assert relative_error(result, expected[name]) < 1e-9, name
