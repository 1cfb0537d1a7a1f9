"""Winograd's algorithm against the direct convolution, in float64 where it is a reference."""

import pytest
import torch
import torch.nn.functional as F
from support import relative_error

from mmseg_inceptionnext.models import winograd
from mmseg_inceptionnext.models.winograd import conv2d_3x3, convolve, transform_weight

CHANNELS = winograd.MIN_CHANNELS


@pytest.mark.parametrize('onednn', [True, False], ids=['oneDNN', 'BLAS'])
@pytest.mark.parametrize('size', [(16, 16), (17, 23), (16, 70)], ids=str)
def test_result_and_gradients(size, onednn, monkeypatch):
    if onednn and not winograd._onednn_works():
        pytest.skip('this torch has no such operator')
    monkeypatch.setattr(winograd, '_onednn_works', lambda: onednn)
    x, weight, bias = (
        torch.randn(2, CHANNELS, *size),
        torch.randn(CHANNELS + 8, CHANNELS, 3, 3),
        torch.randn(CHANNELS + 8),
    )
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = conv2d_3x3(*tensors), F.conv2d(*doubles, padding=1)
    assert 'Winograd' in type(out.grad_fn.next_functions[0][0]).__name__
    seed = torch.randn_like(out)
    results = [
        (o, *torch.autograd.grad(o, t, s)) for o, t, s in ((out, tensors, seed), (expected, doubles, seed.double()))
    ]
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_whether_onednn_works_does_not_depend_on_torchs_defaults():
    """It is asked once, wherever that is."""
    works = winograd._onednn_works.__wrapped__
    expected = works()
    torch.set_default_dtype(torch.double)
    try:
        with torch.device('meta'):
            assert works() == expected
    finally:
        torch.set_default_dtype(torch.float)


def test_rounding_is_that_of_float32():
    """The error against float64 is of the direct convolution's size: the transforms only add."""
    x, weight = torch.randn(1, CHANNELS, 24, 24).relu(), torch.randn(CHANNELS, CHANNELS, 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    ours, direct = (out - expected for out in (conv2d_3x3(x, weight), F.conv2d(x, weight, padding=1)))
    assert ours.abs().max() < 2e-6 * expected.abs().max()
    assert ours.abs().mean() < 3 * direct.abs().mean()


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (7, 1), (3, 3)], ids=str)
def test_images_of_less_than_a_block(size):
    x, weight = torch.randn(3, 4, *size), torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(
        convolve(x, transform_weight(weight)), F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-5
    )


def test_what_it_leaves_to_torch():
    """Other types, few channels, autocast."""
    for x, weight in (
        (torch.randn(1, CHANNELS, 16, 16).double(), torch.randn(CHANNELS, CHANNELS, 3, 3).double()),
        (torch.randn(1, 8, 16, 16), torch.randn(8, 8, 3, 3)),
    ):
        assert torch.equal(conv2d_3x3(x, weight), F.conv2d(x, weight, padding=1))
    with torch.autocast('cpu', torch.bfloat16):
        assert (
            conv2d_3x3(torch.randn(1, CHANNELS, 16, 16), torch.randn(CHANNELS, CHANNELS, 3, 3)).dtype == torch.bfloat16
        )


def test_it_can_be_differentiated_twice_and_transformed():
    x, weight = torch.randn(1, CHANNELS, 18, 17), torch.randn(CHANNELS, CHANNELS, 3, 3) / 50

    def second_derivative(convolution) -> torch.Tensor:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        grads = torch.autograd.grad(convolution(*leaves).pow(2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves[1])[0]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=1)

    assert relative_error(second_derivative(conv2d_3x3), second_derivative(plain)) < 1e-4
    tangents = torch.ones_like(x), torch.ones_like(weight)
    results, expected = (torch.func.jvp(function, (x, weight), tangents) for function in (conv2d_3x3, plain))
    torch.testing.assert_close(results, expected)
