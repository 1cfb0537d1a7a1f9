import logging
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from PIL import Image
from support import ROOT, TINY_CONFIG

os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # tests import onnxruntime themselves, too

from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.data.mini_ade20k import make_mini_ade20k
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """mmengine logs every parameter of a backbone that is initialised on its own."""
    if not MMLogger.check_instance_created('tests'):
        MMLogger.get_instance('tests', log_level=logging.ERROR)
    init_default_scope('mmseg')
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def mini_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'mini'
    make_mini_ade20k(root, train=4, val=2, size=96)
    return root


@pytest.fixture
def tiny_cfg(tmp_path, mini_root) -> Config:
    """A whole config that trains in seconds."""
    return load_config(TINY_CONFIG, work_dir=tmp_path / 'work', data_root=mini_root)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, mini_root) -> Path:
    """A checkpoint of TINY_CONFIG after three iterations, with all that mmengine writes into one."""
    init_default_scope('mmseg')
    work_dir = tmp_path_factory.mktemp('trained')
    cfg = load_config(TINY_CONFIG, work_dir, mini_root, cfg_options={'train_cfg.max_iters': 3})
    train(cfg, TrainOptions(weights='none', seed=0))
    return work_dir / 'iter_3.pth'


@pytest.fixture(scope='session')
def ade20k_sample() -> Path:
    """Two real ADE20K pairs, which may not be copied into the project."""
    root = ROOT.parent / 'shared' / 'ade20k_sample'
    if not root.is_dir():
        pytest.skip('the two real ADE20K pairs are not beside this checkout')
    return root


@pytest.fixture(autouse=True)
def no_race(monkeypatch):
    """Let ``precision='auto'`` be float32: what wins a race depends on the machine, and on what else it does."""
    monkeypatch.setattr('mmseg_inceptionnext.inference.precision.multiplies_bfloat16', lambda device: False)


@pytest.fixture
def roads(tmp_path) -> Path:
    """Grey roads on green ground, a few pixels unlabelled."""
    for split, number in (('training', 4), ('validation', 2)):
        for i in range(number):
            labels = np.ones((48, 64), np.uint8)
            labels[:, 10 + 4 * i : 34 + 4 * i] = 0
            image = np.where(labels[..., None], (40, 160, 40), (120, 120, 120)).astype(np.uint8)
            labels[:2] = 255
            for kind, pixels, suffix in (('images', image, 'jpg'), ('annotations', labels, 'png')):
                folder = tmp_path / 'roads' / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f'{i}.{suffix}')
    return tmp_path / 'roads'


@pytest.fixture
def tool(tmp_path):
    """Run ``tools/<name>.py`` as a user would, from another folder; returns the finished process."""

    def run(name: str, *arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, arguments)]
        environment = os.environ | {'OMP_NUM_THREADS': '1'}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Run what would follow `python` in this process, which spares the seconds that importing takes."""

    def run(*arguments) -> subprocess.CompletedProcess:
        arguments = list(map(str, arguments))
        is_module = arguments[0] == '-m'
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'orig_argv', [sys.executable, *arguments])
        monkeypatch.setattr(sys, 'argv', arguments[is_module:])
        # Two runs in the same second share mmengine's logger, whose stream may be that of a test before.
        monkeypatch.setattr(logging, 'raiseExceptions', False)
        # Tools change these for their process: with the default for SIGPIPE, a later test would end this one.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
        try:
            if is_module:
                runpy.run_module(arguments[1], run_name='__main__')
            else:
                runpy.run_path(arguments[0], run_name='__main__')
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    return run


@pytest.fixture
def tool_here(run_here):
    """The same as ``tool`` in this process; for runs that end early."""
    return lambda name, *arguments: run_here(ROOT / 'tools' / f'{name}.py', *arguments)
