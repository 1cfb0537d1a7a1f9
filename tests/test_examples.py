"""The examples, as they stand, at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, TINY_CONFIG


def run(script: str, *arguments, cwd: Path) -> str:
    command = [sys.executable, ROOT / 'examples' / script, *map(str, arguments)]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_segment_images(trained, mini_root, tmp_path):
    images = sorted((mini_root / 'images' / 'validation').iterdir())
    lines = run('segment_images.py', TINY_CONFIG, trained, *images, cwd=tmp_path).splitlines()
    assert [line for line in lines if not line.startswith(' ')] == list(map(str, images))
    assert all('%' in line for line in lines if line.startswith(' '))
    assert len(list(tmp_path.glob('*_segmented.png'))) == len(images)


@pytest.mark.slow
def test_custom_data(roads, tmp_path):
    output = run(
        'custom_data/train_and_test.py', '--data-root', roads, '--work-dir', 'work', '--weights', 'none',
        '--cfg-options', 'model.backbone.arch=atto', 'model.neck.in_channels=[40,80,160,320]',
        'model.backbone.layer_scale_init_value=1.0', 'optim_wrapper.optimizer.lr=0.002', 'train_cfg.max_iters=2',
        'train_dataloader.batch_size=2', 'train_dataloader.num_workers=1', 'val_dataloader.num_workers=1',
        'test_dataloader.num_workers=1', cwd=tmp_path,
    )  # fmt: skip
    lines = output.strip().splitlines()[-4:]
    assert lines[0].startswith('mIoU ') and lines[3].endswith('% road')
    assert [line.split(':')[0] for line in lines[1:3]] == ['  road', '  other']
    report = json.loads((tmp_path / 'work' / 'report' / 'report.json').read_text())
    assert sum(row['pixels'] for row in report['per_class'].values()) == 2 * 46 * 64  # without the ignored rows
    assert (tmp_path / 'work' / 'example.png').is_file()
