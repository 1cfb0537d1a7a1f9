"""Maps of where a segmentor looks for a class."""

import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.inference.cam import class_activation_map
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

pytest.importorskip('pytorch_grad_cam')


@pytest.fixture(scope='module')
def segmentor(trained):
    return Segmentor(TINY_CONFIG, trained, device='cpu', precision='fp32')


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'in' / 'a.png'
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(70, 110, 3), dtype=np.uint8)).save(path)
    return path


def test_a_map_has_the_size_of_the_image_and_changes_no_prediction(segmentor, picture):
    before = segmentor(picture).labels
    values = segmentor.cam(picture, 'wall')
    assert values.shape == (70, 110) and values.dtype == np.float32
    assert values.min() >= 0 and values.max() == pytest.approx(1, abs=0.05)
    assert not np.array_equal(values, segmentor.cam(picture, 'wall', 'backbone.stages.1'))
    assert np.array_equal(segmentor(picture).labels, before)


def test_it_is_grad_cam_of_the_summed_logits():
    """By hand: channels weighted by their mean gradient, negative values cut off."""
    model = build_segmentor(Config.fromfile(TINY_CONFIG)).eval()
    stage, kept = model.backbone.stages[2], []
    x = torch.randn(1, 3, 64, 96)
    stage.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = model(x, mode='tensor')[0]
    index = int(logits.argmax(0).flatten().mode().values)
    (gradient,) = torch.autograd.grad(logits[index][logits.argmax(0) == index].sum(), kept[0])
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)[0].relu()
    model.data_preprocessor.forward = lambda data, training: dict(inputs=torch.stack(data['inputs']))
    values = class_activation_map(
        model.requires_grad_(False), dict(inputs=x[0], data_samples=None), index, 'backbone.stages.2'
    )
    small = torch.nn.functional.interpolate(expected[None, None].detach(), (64, 96), mode='bilinear')[0, 0].numpy()
    assert np.corrcoef(values.ravel(), small.ravel())[0, 1] > 0.999


@pytest.mark.slow
def test_the_mass_lies_on_the_class_more_than_a_random_maps(mini_root, tmp_path):
    """On the data that a segmentor has learnt, for every class that it finds."""
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', mini_root, cfg_options={'train_cfg.max_iters': 300})
    cfg.default_hooks.checkpoint.interval = cfg.train_cfg.val_interval = 300
    train(cfg, TrainOptions(weights='none', seed=0))
    segmentor = Segmentor(TINY_CONFIG, tmp_path / 'work' / 'iter_300.pth', precision='fp32')
    random, gains = np.random.default_rng(0), []
    for path in sorted((mini_root / 'images' / 'training').iterdir()):
        result = segmentor(path)
        for name, share in result.areas().items():
            if share > 0.02:
                inside = result.labels == result.class_names.index(name)
                on_class, by_chance = (
                    values[inside].sum() / values.sum()
                    for values in (segmentor.cam(path, name, 'backbone.stages.1'), random.random(inside.shape))
                )
                gains.append(on_class / by_chance)
    assert len(gains) > 5 and np.median(gains) > 1.2


def test_a_folder_is_drawn(trained, picture, tool_here, tmp_path):
    (picture.parent / 'b.png').write_text('no image')
    arguments = ['predict', TINY_CONFIG, trained, picture.parent, '--out', tmp_path / 'out', '--cam', 'wall']
    process = tool_here(*arguments)
    assert_user_error(process, 'b.png')
    assert '1 images in' in process.stdout
    assert Image.open(tmp_path / 'out' / 'a.png').size == (110, 70)
    assert_user_error(tool_here(*arguments), 'a.png exists already: pass --overwrite')
    assert tool_here(*arguments, '--overwrite', '--cam-layer', 'backbone.stages.0').stdout == process.stdout
    (tmp_path / 'out' / 'manifest.jsonl').write_text('{}\n')
    assert_user_error(tool_here(*arguments, '--overwrite'), 'has a manifest', 'choose another --out DIR')


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (['--cam', 'wal'], ["--cam wal is no class of the model: did you mean 'wall'?"]),
        (['--cam', 'wall', '--cam-layer', 'backbone.stage.3'], ['is not in the model: did you mean backbone.stages.3']),
        (['--cam', 'wall', '--cam-layer', 'backbone.norm3.weight'], ['is not in the model']),
        (['--cam-layer', 'backbone.stages.3'], ['--cam-layer goes with --cam']),
        (['--cam', 'wall', '--labels'], ['--labels does not go with --cam']),
        (['--cam', 'wall', '--tile', '64'], ['--tile does not go with --cam']),
        (['--cam', 'wall', '--overlap', '8'], ['--overlap does not go with --cam']),
        (['--cam', 'wall', '--confidence'], ['--confidence does not go with --cam']),
        (['--cam', 'wall', '--min-confidence', '0.5'], ['--min-confidence does not go with --cam']),
        (['--cam', 'wall', '--skip-existing'], ['--skip-existing does not go with --cam']),
        (['--cam', 'wall', '--shard', '1/2'], ['--shard does not go with --cam']),
        (['--cam', 'wall', '--precision', 'bf16'], ['--precision does not go with --cam']),
    ],
    ids=str,
)
def test_mistakes(options, parts, trained, picture, tool_here, tmp_path):
    assert_user_error(tool_here('predict', TINY_CONFIG, trained, picture, '--out', tmp_path / 'out', *options), *parts)


def test_a_layer_without_a_map(segmentor, picture):
    with pytest.raises(UserError, match=r"layer='auxiliary_head.conv_seg' is not in the model|no feature map"):
        segmentor.cam(picture, 'wall', 'auxiliary_head.conv_seg')
    with pytest.raises(UserError, match="layer='data_preprocessor' returns no feature map that the logits depend on"):
        segmentor.cam(picture, 'wall', 'data_preprocessor')


def test_without_the_package_it_says_how_to_get_it(segmentor, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(UserError, match='need grad-cam: pip install'):
        segmentor.cam(picture, 'wall')


def test_an_onnx_file_and_tiles_have_none(trained, picture):
    tiled = Segmentor(TINY_CONFIG, trained, precision='fp32', tile=64)
    with pytest.raises(UserError, match='tile=64: maps of a class are of whole images'):
        tiled.cam(picture, 'wall')
