"""A config of one's own, whatever the way in which it inherits, through all tools and mmseg's functions."""

import numpy as np
import pytest
from mmseg.apis import MMSegInferencer, inference_model, init_model
from PIL import Image
from support import TINY_CONFIG

from mmseg_inceptionnext import Segmentor

BASE = 'mini/fpn_inceptionnext_a'
WAYS = {
    'name': f"'mmseg_inceptionnext::{BASE}.py'",
    'expression': f"__import__('mmseg_inceptionnext').config_path('{BASE}')",
    'path': repr(str(TINY_CONFIG.parents[2] / 'configs' / f'{BASE}.py')),
}


@pytest.fixture(params=WAYS)
def config(request, tmp_path, mini_root):
    base, own = TINY_CONFIG.read_text().split('\n', 2)[1:]
    assert base.startswith('_base_')
    path = tmp_path / 'own.py'
    roots = [
        f"{split}_dataloader['dataset'] = dict(data_root={str(mini_root)!r})" for split in ('train', 'val', 'test')
    ]
    path.write_text('\n'.join([f'_base_ = {WAYS[request.param]}', own, *roots]))
    return path


@pytest.mark.slow
def test_all_tools(config, tool_here, tmp_path, mini_root):
    image = next((mini_root / 'images' / 'validation').iterdir())
    checkpoint = tmp_path / 'work' / 'iter_2.pth'
    alone = ('--cfg-options', 'model.backbone.init_cfg=None')
    for name, *arguments in (
        ('check_dataset', config),
        ('train', config, '--work-dir', 'work', '--weights', 'none', '--iters', 2),
        ('train', config, '--work-dir', 'work', '--iters', 4, '--resume', *alone),
        ('test', config, checkpoint, '--work-dir', 't', '--tta'),
        ('test', tmp_path / 'work' / 'own.py', checkpoint, '--work-dir', 't', '--show-dir', 'shown'),
        ('predict', config, checkpoint, image, '--out', 'p', '--labels', '--precision', 'fp32'),
        ('export', config, checkpoint, '--out', 'm.onnx', '--shape', 96, 96, '--verify', 1),
        ('predict', 'm.onnx', image, '--out', 'q', '--labels'),
        ('get_flops', config, '--shape', 64, 64),
        ('benchmark', config, '--shape', 64, 64, '--repeat', 1),
    ):
        process = tool_here(name, *arguments)
        assert process.returncode == 0, f'{name}: {process.stderr[-2000:]}'
    ours, exported = (np.asarray(Image.open(tmp_path / out / 'labels' / f'{image.stem}.png')) for out in 'pq')
    assert np.mean(ours == exported) > 0.999


def test_mmsegs_functions(config, trained, mini_root):
    """They read the config themselves, and know only loaders of mmseg's names."""
    image = next((mini_root / 'images' / 'validation').iterdir())
    expected = Segmentor(config, trained, device='cpu', precision='fp32')(image).labels
    model = init_model(str(config), str(trained), device='cpu')
    assert np.array_equal(inference_model(model, str(image)).pred_sem_seg.data[0].numpy(), expected)
    pixels = np.asarray(Image.open(image))[..., ::-1]
    assert np.array_equal(inference_model(model, pixels).pred_sem_seg.data[0].numpy(), expected)
    result = MMSegInferencer(str(config), str(trained), device='cpu')(str(image), show=False)
    assert np.array_equal(result['predictions'], expected)
