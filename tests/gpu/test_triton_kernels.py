"""Each kernel against its plain form in float64: values and derivatives, dtypes, odd sizes, layouts.

On a GPU, or in Triton's interpreter, which runs on a CPU where TRITON_INTERPRET=1 is set before the process starts:
tests/models/test_kernels.py does that. The interpreter knows no instructions, and no order of threads.
"""

import os
from copy import deepcopy
from functools import partial

import pytest
import torch
from support import TINY_UPERNET, relative_error, segmentor_with_statistics

from mmseg_inceptionnext import optimize_for_inference
from mmseg_inceptionnext.inference.label_map_segmentor import label_map
from mmseg_inceptionnext.models.kernels import _swap
from mmseg_inceptionnext.models.late_upsample_uper_head import Taps, add_up_sampled
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d

triton = pytest.importorskip('triton')

from mmseg_inceptionnext.models.kernels.label_map import label_map_by_kernel  # noqa: E402
from mmseg_inceptionnext.models.kernels.token_mixer import FusedInceptionDWConv2d  # noqa: E402
from mmseg_inceptionnext.models.kernels.up_sampled_sum import add_up_sampled_by_kernel  # noqa: E402

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# Of the largest value: a rounding of the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize('dtype', TOLERANCE, ids=lambda dtype: str(dtype).removeprefix('torch.'))
layouts = pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])


@pytest.fixture(params=['cpu'] if INTERPRETED else [pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def assert_agree(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        assert relative_error(value.cpu().double(), wanted) < TOLERANCE[dtype]


@layouts
@dtypes
@pytest.mark.parametrize('channels, size', [(48, (7, 9)), (11, (5, 1))], ids=str)
def test_token_mixer(channels, size, dtype, layout, device):
    """Down to a single channel a branch, and a side of one pixel."""
    ours = InceptionDWConv2d(channels, 3, 5, 0.125).to(device, dtype)
    plain = deepcopy(ours).cpu().double()
    ours.__class__ = FusedInceptionDWConv2d
    x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(2, channels, *size).to(dtype)
    results = []
    for module, place, kind in ((ours, device, dtype), (plain, 'cpu', torch.double)):
        inputs = x.to(place, kind).requires_grad_()
        out = module(inputs)
        results.append([out, *torch.autograd.grad(out, [inputs, *module.parameters()], grad.to(place, kind))])
    assert results[0][0].stride() == x.stride()
    assert_agree(*results, dtype)


def test_token_mixer_takes_views_and_skips_gradients_that_nobody_wants(device):
    """Part of a larger tensor, whose layout is neither."""
    ours = InceptionDWConv2d(16, 3, 11, 0.25).to(device)
    plain = deepcopy(ours)
    ours.__class__ = FusedInceptionDWConv2d
    x = torch.randn(2, 9, 40, 8, device=device).transpose(1, 2)[:, 3:19, ::2]
    assert relative_error(ours(x), plain(x)) < 1e-6
    x = x.detach().requires_grad_()
    (found,), (expected,) = (torch.autograd.grad(m.requires_grad_(False)(x).sin().sum(), x) for m in (ours, plain))
    assert relative_error(found, expected) < 1e-6


@layouts
@dtypes
@pytest.mark.parametrize('align_corners', [False, True])
def test_up_sampled_sum(align_corners, dtype, layout, device):
    """Of a map as large, smaller ones of odd ratios, and a pooled one of one pixel."""
    n = 2 if dtype == torch.float64 else 1  # the interpreter takes seconds
    channels, size, smaller = 3, (5, 4), ((5, 2), (3, 3), (2, 4), (1, 1))
    out = torch.randn(n, channels, *size).to(dtype).contiguous(memory_format=layout)
    products = [torch.randn(n, 9 * channels, w, h).to(dtype) for h, w in smaller]
    grad = torch.randn(n, channels, *size).to(dtype)
    results = []
    for function, place, kind in (
        (add_up_sampled_by_kernel, device, dtype),
        (add_up_sampled, 'cpu', torch.double),
    ):
        inputs = [x.to(place, kind).requires_grad_() for x in (out, *products)]
        taps = [Taps(x, 0, x.shape[2]) for x in inputs[1:]]
        found = function(inputs[0] * 1, taps, align_corners)  # the plain form may overwrite it
        results.append([found, *torch.autograd.grad(found, inputs, grad.to(place, kind))])
    assert_agree(*results, dtype)


def test_up_sampled_sum_of_more_maps_than_a_kernel_takes(device):
    out, products = torch.randn(1, 2, 4, 4, device=device), [torch.randn(1, 18, 2, 2, device=device) for _ in range(5)]
    taps = [Taps(x, 0, 2) for x in products]
    expected = add_up_sampled(out.clone(), taps, False)
    assert torch.equal(add_up_sampled_by_kernel(out.clone(), taps, False), expected)


@dtypes
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    'size, original, more',
    [
        ((28, 36), (28, 36), {}),
        ((29, 37), (50, 21), {}),
        ((7, 9), (15, 12), {}),
        ((7, 9), (7, 9), {}),
        ((32, 40), (25, 33), dict(padding_size=(3, 1, 2, 4))),
        ((32, 40), (26, 36), dict(img_padding_size=(3, 1, 2, 4), flip=True, flip_direction='horizontal')),
        ((32, 40), (25, 33), dict(flip=True, flip_direction='vertical')),
    ],
    ids=str,
)
def test_label_map(size, original, more, align_corners, dtype, device):
    """Of two equal classes the first is taken; in float64 the plain form is called."""
    logits = torch.randn(6, 7, 9).to(device, dtype)
    logits[3] = logits[1]
    arguments = logits, size, dict(ori_shape=original, **more), align_corners
    expected, found = label_map(*arguments), label_map_by_kernel(*arguments, plain=label_map)
    assert found.dtype == torch.long and found.shape == (1, *original)
    assert not (found == 3).any() and found.unique().numel() == 5
    # On a GPU, products and sums may be fused in another way: near ties can differ.
    assert (found != expected).float().mean() <= (0 if INTERPRETED else 0.002)


def test_label_map_of_mmsegs_argmax_and_of_logits_that_are_not_finite(device):
    logits = torch.randn(4, 5, 6, device=device)
    logits[2, 3] = float('inf')
    logits[1, 2, 2] = float('nan')
    meta = dict(ori_shape=(5, 6))
    found = label_map_by_kernel(logits, (5, 6), meta, False, plain=label_map)
    assert torch.equal(found, label_map(logits, (5, 6), meta, False))
    logits[1, 2, 2] = 0
    found = label_map_by_kernel(logits, (5, 6), meta, False, plain=label_map)
    assert torch.equal(found[0], logits.argmax(0))


def test_a_whole_model(device):
    model = segmentor_with_statistics(TINY_UPERNET).to(device)
    fast = optimize_for_inference(model)
    plain = deepcopy(fast)
    replaced = _swap(fast)
    # Four mixers, two convolutions, which are packed on a CPU and have no kernel there, and the label map.
    assert replaced == 4 + 2 * (device == 'cuda') + 1
    trained = deepcopy(model)
    assert _swap(trained) == 4 + 2
    x = torch.randn(1, 3, 64, 48, device=device)
    with torch.no_grad():
        assert relative_error(trained(x, mode='tensor'), model(x, mode='tensor')) < 1e-5
        found, expected = (m(x, mode='predict')[0].pred_sem_seg.data for m in (fast, plain))
    assert (found != expected).float().mean() < 1e-3
    restored = deepcopy(fast)
    assert isinstance(restored.label_map, partial)
