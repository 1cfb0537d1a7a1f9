import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from mmengine.logging import HistoryBuffer

from mmseg_inceptionnext import InceptionNeXt, UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.models.weights import check_fits


@pytest.fixture(scope='module')
def released() -> dict:
    """A state dict with the keys and shapes of the released inceptionnext_atto.pth, classifier included."""
    torch.manual_seed(0)
    return timm.create_model('inception_next_atto').state_dict()


def load(checkpoint, arch='atto', **kwargs) -> InceptionNeXt:
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    backbone = InceptionNeXt(arch, norm_cfg=dict(type='BN'), init_cfg=init_cfg, **kwargs)
    backbone.init_weights()
    return backbone


def saved(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_loaded(backbone: InceptionNeXt, released: dict) -> None:
    for key, value in backbone.state_dict().items():
        if not re.match(r'norm\d', key):
            assert torch.equal(value, released[key]), key


def prefixed(state_dict: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.mark.parametrize('wrap', ['bare', 'state_dict', 'model', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_containers_and_prefixes(released, tmp_path, wrap, prefix):
    content = prefixed(released, prefix)
    content = content if wrap == 'bare' else {wrap: content, 'epoch': 3}
    assert_loaded(load(saved(content, tmp_path / 'w.pth')), released)


def test_the_average_goes_before_the_raw_model(released, tmp_path):
    raw = {key: torch.zeros_like(value) for key, value in released.items()}
    content = {'state_dict': raw, 'state_dict_ema': released}
    assert_loaded(load(saved(content, tmp_path / 'w.pth')), released)


def test_safetensors(released, tmp_path):
    safetensors.torch.save_file(released, tmp_path / 'w.safetensors')
    assert_loaded(load(tmp_path / 'w.safetensors'), released)


def test_a_whole_segmentor_with_its_out_norms(released, tmp_path):
    trained = InceptionNeXt('atto', norm_cfg=dict(type='BN'))
    trained.norm2.weight.data.fill_(0.7)
    content = {
        'meta': {'iter': 5, 'seed': 1},
        'message_hub': {'loss': HistoryBuffer([1.0, 2.0], [1, 1]), 'best': np.float64(3.0)},
        'state_dict': prefixed(trained.state_dict(), 'backbone.') | {'decode_head.conv_seg.weight': torch.zeros(3)},
    }
    loaded = load(saved(content, tmp_path / 'iter_5.pth'))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize('in_channels', [1, 2, 4, 6])
def test_other_input_channels_are_adapted_as_timm_does(released, tmp_path, in_channels):
    backbone = load(saved(released, tmp_path / 'w.pth'), in_channels=in_channels)
    stem = timm.models.adapt_input_conv(in_channels, released['stem.0.weight'])
    assert torch.equal(backbone.stem[0].weight, stem)


def test_stages_that_are_not_built_may_be_left_over(released, tmp_path):
    assert_loaded(load(saved(released, tmp_path / 'w.pth'), out_indices=(0, 1)), released)


def test_norms_of_stages_that_are_not_returned_may_be_left_over(tmp_path):
    whole = InceptionNeXt('atto', norm_cfg=dict(type='BN'))
    path = saved({'state_dict': prefixed(whole.state_dict(), 'backbone.')}, tmp_path / 'w.pth')
    assert torch.equal(load(path, out_indices=(1, 3)).norm3.weight, whole.norm3.weight)


def test_one_log_line_says_what_was_loaded(released, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('mmseg_inceptionnext.models.weights.say', lambda message, **_: lines.append(message))
    load(saved(released, tmp_path / 'w.pth'))
    classifier = sum(key.startswith('head.') for key in released)
    assert len(lines) == 1
    assert f'Loaded {len(released) - classifier} tensors' in lines[0] and str(tmp_path / 'w.pth') in lines[0]
    assert f'{classifier} of the classifier' in lines[0]


def broken(released: dict, how: str) -> dict:
    content = dict(released)
    if how == 'missing':
        del content['stages.1.blocks.0.gamma']
    elif how == 'unknown':
        content['stages.0.extra'] = torch.zeros(1)
    elif how == 'shape':
        content['stem.0.bias'] = torch.zeros(7)
    return content


@pytest.mark.parametrize(
    ('how', 'messages'),
    [
        ('missing', ['1 keys are missing', 'stages.1.blocks.0.gamma']),
        ('unknown', ['1 keys are not known', 'stages.0.extra']),
        ('shape', ['stem.0.bias is (7,), here (40,)']),
    ],
)
def test_nothing_is_loaded_in_part(released, tmp_path, how, messages):
    backbone = InceptionNeXt('atto', norm_cfg=dict(type='BN'))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_cfg = dict(type='Pretrained', checkpoint=str(saved(broken(released, how), tmp_path / 'w.pth')))
    with pytest.raises(UserError) as caught:
        backbone.init_weights()
    for message in messages:
        assert message in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_another_arch_is_recognised(tmp_path, arch):
    path = saved(timm.create_model(f'inception_next_{arch}').state_dict(), tmp_path / 'w.pth')
    with pytest.raises(UserError, match=f'this is inception_next_{arch}'):
        load(path)


def test_weights_of_a_backbone_are_no_segmentor():
    content = timm.create_model('inception_next_tiny').state_dict()
    with pytest.raises(UserError, match='w.pth holds weights of a backbone, inception_next_tiny, not of a trained'):
        check_fits(torch.nn.Linear(1, 1), content, 'w.pth')


def test_another_family_is_recognised(tmp_path):
    path = saved(timm.create_model('resnet18').state_dict(), tmp_path / 'w.pth')
    with pytest.raises(UserError, match='this is no InceptionNeXt'):
        load(path)


class Malicious:
    """Unpickled, it would create the file that it names."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('place', ['top', 'nested'])
def test_a_file_that_would_run_code_is_refused_by_name(released, tmp_path, place):
    evil = Malicious(tmp_path / 'executed')
    content = evil if place == 'top' else {'state_dict': released, 'meta': {'hook': [evil]}}
    with pytest.raises(UserError, match=r'it wants to run io\.open|it wants to run builtins\.open|_io\.open'):
        load(saved(content, tmp_path / 'w.pth'))
    assert not (tmp_path / 'executed').exists()


def test_getattr_is_not_a_way_in(tmp_path):
    class Getattr:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    path = saved({'state_dict': Getattr()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='it wants to run builtins.getattr'):
        read_checkpoint(path)


@pytest.mark.parametrize('content', [{1: torch.zeros(1)}, {'state_dict': 5}, [torch.zeros(1)]], ids=str)
def test_what_is_no_state_dict(tmp_path, content):
    with pytest.raises(UserError, match='holds'):
        load(saved(content, tmp_path / 'w.pth'))


@pytest.mark.parametrize(
    'content', [b'', b'not a checkpoint', pickle.dumps({'a': 1}), b'PK\x03\x04' + b'\0' * 100], ids=len
)
def test_garbage(tmp_path, content):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(UserError, match='checkpoint|no tensors'):
        load(tmp_path / 'w.pth')


@pytest.mark.parametrize('fraction', [0.01, 0.5, 0.99])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_truncated(released, tmp_path, fraction, suffix):
    path = tmp_path / f'w{suffix}'
    safetensors.torch.save_file(released, path) if suffix == '.safetensors' else saved(released, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match='truncated'):
        load(path)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('/nowhere/w.pth', 'no checkpoint at /nowhere/w.pth'),
        ('inception_next_gigantic', 'inception_next_tiny.sail_in1k'),
        ('http://example.org/w.pth', 'https:// only'),
        ('ftp://example.org/w.pth', 'https:// only'),
        ('https://example.org/', 'names no file'),
        ('https://exa mple.org/w.pth', 'could not download'),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(source)


def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError('Name or service not known')

    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', unreachable)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)
    for source in ('https://github.com/x/y.pth', 'inception_next_atto.sail_in1k', 'inception_next_atto'):
        with pytest.raises(UserError, match='pass the file .* or train from scratch'):
            load(source)


def test_a_url_is_downloaded_once(monkeypatch, released, tmp_path):
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    downloads = []

    def download(url, path, **_):
        downloads.append(url)
        torch.save(released, path)

    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    for _ in range(2):
        assert_loaded(load('https://github.com/sail-sg/inceptionnext/releases/x/inceptionnext_atto.pth'), released)
    assert len(downloads) == 1


def test_a_timm_name_is_looked_up_on_the_hub(monkeypatch, released, tmp_path):
    safetensors.torch.save_file(released, tmp_path / 'model.safetensors')
    asked = []
    monkeypatch.setattr(
        'huggingface_hub.hf_hub_download', lambda *args: asked.append(args) or str(tmp_path / 'model.safetensors')
    )
    assert_loaded(load('inception_next_atto.sail_in1k'), released)
    assert asked == [('timm/inception_next_atto.sail_in1k', 'model.safetensors')]
