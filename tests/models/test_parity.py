"""The backbone computes what timm's InceptionNeXt computes, from the same weights."""

import pytest
import timm
import torch
from support import relative_error

from mmseg_inceptionnext import InceptionNeXt

NAMES = {'a': 'atto', 't': 'tiny', 's': 'small', 'b': 'base'}


def pair(arch: str, **kwargs) -> tuple[InceptionNeXt, torch.nn.Module]:
    """Ours and timm's, with equal weights. γ is drawn anew: at its initial 1e-6 no block would matter."""
    reference = timm.create_model(f'inception_next_{NAMES[arch]}', **kwargs)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith('gamma'):
                parameter.normal_(0.3, 0.1)
        for name, buffer in reference.named_buffers():
            if name.endswith('running_var'):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith('running_mean'):
                buffer.normal_(0, 0.2)
    ours = InceptionNeXt(arch, out_norm=False, norm_cfg=dict(type='BN'), **kwargs)
    state_dict = {key: value for key, value in reference.state_dict().items() if not key.startswith('head.')}
    ours.load_state_dict(state_dict, strict=True)
    return ours, reference


@pytest.mark.parametrize('size', [(64, 64), (97, 131)], ids=str)
@pytest.mark.parametrize('arch', NAMES)
def test_features_in_eval_mode(arch, size):
    ours, reference = pair(arch)
    ours.eval(), reference.eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        features, expected = ours(x), reference.forward_intermediates(x, intermediates_only=True)
    assert len(features) == 4
    for ours_i, expected_i in zip(features, expected, strict=True):
        assert relative_error(ours_i, expected_i) < 1e-5


@pytest.mark.parametrize('arch', NAMES)
def test_features_gradients_and_statistics_in_train_mode(arch):
    """With stochastic depth: equal seeds must drop equal paths, so the rates of all blocks agree too."""
    ours, reference = pair(arch, drop_path_rate=0.3)
    ours.double().train(), reference.double().train()
    x = torch.randn(2, 3, 65, 99, dtype=torch.double)
    outputs = []
    for forward in (ours, lambda x: reference.forward_intermediates(x, intermediates_only=True)):
        torch.manual_seed(1)
        outputs.append(forward(x))
        sum(map(torch.Tensor.sum, (feature.sin() for feature in outputs[-1]))).backward()

    for ours_i, expected_i in zip(*outputs, strict=True):
        assert relative_error(ours_i, expected_i) < 1e-5
    expected = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for name, p in expected.items() if not name.startswith('head.'))
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() < 1e-5 * largest, name
    expected = dict(reference.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, expected[name])


@pytest.mark.parametrize(('arch', 'millions'), [('a', 4.2), ('t', 28.1), ('s', 49.4), ('b', 86.7)])
def test_parameters_are_those_of_table_3(arch, millions):
    ours, reference = pair(arch)
    classifier = reference.head
    total = sum(p.numel() for module in (ours, classifier) for p in module.parameters())
    assert round(total / 1e6, 1) == millions
