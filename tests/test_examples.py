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
def test_own_data(roads, tmp_path):
    (tmp_path / 'roads.yaml').write_text(
        f'path: {roads}\ntrain: {{images: images/training, masks: annotations/training}}\n'
        'val: {images: images/validation, masks: annotations/validation}\nclasses: [road, grass]\n'
    )
    output = run(
        'own_data.py', 'roads.yaml', '--recipe', TINY_CONFIG, '--work-dir', 'work', '--weights', 'none', '--iters', '2',
        cwd=tmp_path,
    )  # fmt: skip
    lines = output.strip().splitlines()[-5:]
    assert [line.split()[0] for line in lines[:3]] == ['mIoU', 'road:', 'grass:']
    assert 'Segmentation(64×48' in lines[3] and lines[4].endswith('of its labels are those of the checkpoint')
    report = json.loads((tmp_path / 'work' / 'report' / 'report.json').read_text())
    assert sum(row['pixels'] for row in report['per_class'].values()) == 2 * 46 * 64  # without the ignored rows
    assert (tmp_path / 'work' / 'example.png').is_file()
