"""Where a classifier looks for a class."""

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from support import ROOT, assert_user_error

pytest.importorskip('mmpretrain')
pytest.importorskip('pytorch_grad_cam')

from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.classifier import Classifier
from mmseg_inceptionnext.models.build import build_segmentor

TINY = ROOT / 'tests' / 'configs' / 'imagenet_tiny.py'
NAMES = [f'class {i}' for i in range(10)]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build_segmentor(read_config(TINY))
    init_default_scope('mmseg')
    for name, parameter in model.named_parameters():
        if name.endswith('gamma') or name == 'head.fc2.weight':
            torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp('classifier') / 'iter_1.pth'
    torch.save(dict(meta=dict(dataset_meta=dict(classes=NAMES)), state_dict=model.state_dict()), path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'in' / 'a.png'
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 128, 3), dtype=np.uint8)).save(path)
    return path


def test_it_is_grad_cam_of_the_logit(checkpoint, picture):
    """By hand: channels weighted by their mean gradient, negative values cut off; of the 64×64 in the centre."""
    classifier = Classifier(TINY, checkpoint, 'cpu')
    values = classifier.cam(picture, 'class 3', 'backbone.stages.1')
    assert values.shape == (64, 128) and values.dtype == np.float32 and values.max() == pytest.approx(1, abs=0.1)
    assert not values[:, :32].any() and not values[:, 96:].any()

    model, kept = classifier.model, []
    model.backbone.stages[1].register_forward_hook(lambda module, args, out: kept.append(out))
    pixels = np.asarray(Image.open(picture))[:, 32:96].transpose(2, 0, 1)[None]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    logits = model(((torch.tensor(pixels) - mean) / std).requires_grad_())
    (gradient,) = torch.autograd.grad(logits[0, 3], kept[0])
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu().detach()
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode='bilinear')[0, 0].numpy()
    assert np.corrcoef(values[:, 32:96].ravel(), expected.ravel())[0, 1] > 0.999


def test_a_folder_is_drawn(checkpoint, picture, tool_here, tmp_path):
    process = tool_here('predict', TINY, checkpoint, picture.parent, '--out', tmp_path / 'out', '--cam', 'class 3')
    assert process.returncode == 0 and '1 images in' in process.stdout, process.stderr
    assert Image.open(tmp_path / 'out' / 'a.png').size == (128, 64)


def test_classes_of_imagenet_are_named_in_english_too(picture, tmp_path):
    torch.save(timm.create_model('inception_next_atto').state_dict(), tmp_path / 'timm.pth')
    classifier = Classifier('imagenet/inceptionnext_a', tmp_path / 'timm.pth', 'cpu')
    assert np.array_equal(classifier.cam(picture, 'tabby'), classifier.cam(picture, 'n02123045'))
    with pytest.raises(UserError, match="cam='crane' is the name of n02012849 and n03126707: name one of these"):
        classifier.cam(picture, 'crane')
    with pytest.raises(UserError, match="cam='taby' is no class of the model: did you mean 'tabby'"):
        classifier.cam(picture, 'taby')


@pytest.mark.parametrize('meta', [None, [], dict(dataset_meta=3), dict(dataset_meta=dict(classes='abc'))], ids=str)
def test_a_checkpoint_can_say_anything_about_its_classes(meta, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    torch.save(content | dict(meta=meta), tmp_path / 'x.pth')
    assert Classifier(TINY, tmp_path / 'x.pth', 'cpu').names == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ('options', 'part'),
    [
        ([], 'is the config of a classifier: pass --cam CLASS'),
        (['--cam', 'class 11'], "--cam class 11 is no class of the model: did you mean 'class 1'?"),
        (['--cam', 'class 1', '--cam-layer', 'backbone.stage.0'], 'did you mean backbone.stages.0'),
        (['--cam', 'class 1', '--classes', 'ade20k'], '--classes is for segmentors'),
        (['--cam', 'class 1', '--labels'], '--labels does not go with --cam'),
    ],
    ids=str,
)
def test_mistakes(options, part, checkpoint, picture, tool_here, tmp_path):
    assert_user_error(tool_here('predict', TINY, checkpoint, picture, '--out', tmp_path / 'out', *options), part)
