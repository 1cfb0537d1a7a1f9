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
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleConv2d

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


def test_another_kind_of_convolution_is_left_alone():
    plain, late = pair(conv_cfg=dict(type='ConvAWS'))
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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_the_plain_head_s(dtype):
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
