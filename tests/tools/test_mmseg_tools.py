"""mmseg's own tools, as they are installed, run our configs and give what ours give."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mmseg
import pytest
from support import ROOT, TINY_CONFIG
from textures import make_textures

TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'


@pytest.fixture
def mmseg_tool(tmp_path):
    """Run one from another folder; returns what it printed."""

    def run(name: str, *arguments, tools: Path = TOOLS) -> str:
        command = [sys.executable, tools / name, *map(str, arguments)]
        environment = os.environ | {'OMP_NUM_THREADS': '1'}
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout + process.stderr

    return run


@pytest.fixture
def config(tmp_path, mini_root) -> Path:
    path = tmp_path / 'own.py'
    path.write_text(
        f"_base_ = '{TINY_CONFIG}'\n"
        f"test_dataloader = dict(dataset=dict(data_root='{mini_root}'))\n"
        f"val_dataloader = dict(dataset=dict(data_root='{mini_root}'))\n"
        f"train_dataloader = dict(dataset=dict(data_root='{mini_root}'))\n"
    )
    return path


@pytest.mark.slow
def test_train_and_test(mmseg_tool, tool_here, config, tmp_path):
    options = ('--cfg-options', 'train_cfg.max_iters=3', 'train_cfg.val_interval=3', 'model.backbone.init_cfg=None')
    options += ('randomness.seed=0',)  # or, in one run of many, a tie of two logits decides the last digit
    mmseg_tool('train.py', config, '--work-dir', 'work', *options)
    checkpoint = tmp_path / 'work' / 'iter_3.pth'
    for tta in ([], ['--tta']):
        text = mmseg_tool('test.py', config, checkpoint, '--work-dir', 'test', *tta)
        theirs = float(re.findall(r'mIoU: ([\d.]+)', text)[-1])
        assert tool_here('test', config, checkpoint, '--work-dir', 'ours', '--json', 'f.json', *tta).returncode == 0
        assert theirs == json.loads((tmp_path / 'f.json').read_text())['mIoU']


@pytest.mark.slow
def test_mmpretrains_tools_train_and_test_a_classifier(mmseg_tool, tool_here, tmp_path):
    tools = Path(pytest.importorskip('mmpretrain').__file__).parent / '.mim' / 'tools'
    root, config = make_textures(tmp_path / 'data', train=2, val=4), tmp_path / 'own.py'
    loaders = (
        f"{split}_dataloader = dict(persistent_workers=False, dataset=dict(data_root='{root}'))\n"
        for split in ('train', 'val', 'test')
    )
    config.write_text(f"_base_ = '{ROOT / 'tests' / 'configs' / 'imagenet_tiny.py'}'\n{''.join(loaders)}")
    mmseg_tool('train.py', config, '--work-dir', 'work', tools=tools)
    checkpoint = tmp_path / 'work' / 'iter_4.pth'
    text = mmseg_tool('test.py', config, checkpoint, '--work-dir', 'test', tools=tools)
    assert tool_here('test', config, checkpoint, '--work-dir', 'ours', '--json', 'f.json').returncode == 0
    theirs = float(re.findall(r'accuracy/top1: ([\d.]+)', text)[-1])
    assert theirs == json.loads((tmp_path / 'f.json').read_text())['accuracy/top1']


def test_pictures_of_predictions(mmseg_tool, config, trained, tmp_path):
    mmseg_tool('test.py', config, trained, '--work-dir', 'work', '--show-dir', tmp_path / 'show')
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 2


@pytest.mark.parametrize('by_name', [pytest.param(False, marks=pytest.mark.slow), True], ids=['by path', 'by name'])
def test_browse_the_data_set(mmseg_tool, config, tmp_path, by_name):
    if by_name:
        name = "__import__('mmseg_inceptionnext').config_path('mini/fpn_inceptionnext_a')"
        config.write_text(config.read_text().replace(f"'{TINY_CONFIG}'", name))
    mmseg_tool('analysis_tools/browse_dataset.py', config, '--output-dir', 'browsed', '--not-show')
    assert len(list((tmp_path / 'browsed').iterdir())) == 4
