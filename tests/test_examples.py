"""The examples, as they stand, at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, TINY_CONFIG

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.export import export


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


@pytest.mark.parametrize('labels', [False, True], ids=['logits', 'labels'])
def test_onnx_only_needs_no_torch(trained, mini_root, tmp_path, labels):
    """Where nothing but numpy, Pillow and onnxruntime can be imported; it writes what Segmentor returns."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    if torch.__version__.startswith('2.6.'):
        pytest.skip("torch 2.6's ONNX exporter cannot write these segmentors")
    export(TINY_CONFIG, trained, tmp_path / 'm.onnx', (160, 160), labels=labels, verify=1)
    picture = Image.open(next((mini_root / 'images' / 'validation').iterdir())).resize((160, 160))
    picture.save(tmp_path / 'a.png')
    others = 'torch', 'mmseg', 'mmcv', 'mmengine', 'cv2', 'onnx', 'mmseg_inceptionnext'
    code = (
        f'import runpy, sys; [sys.modules.__setitem__(name, None) for name in {others}]; '
        f'sys.argv[1:] = "m.onnx", "a.png", "o.png"; '
        f'runpy.run_path({str(ROOT / "examples" / "onnx_only.py")!r}, run_name="__main__")'
    )
    process = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    result = Segmentor(tmp_path / 'm.onnx')(tmp_path / 'a.png')
    assert np.mean(np.asarray(Image.open(tmp_path / 'o.png')) != np.asarray(result.label_image())) < 1e-3
    printed = dict(line.rsplit(': ', 1) for line in process.stdout.splitlines())
    assert printed.keys() == result.areas().keys()


@pytest.mark.slow
def test_ray_needs_a_column_of_paths(tmp_path):
    pytest.importorskip('ray.data')
    parquet = pytest.importorskip('pyarrow.parquet')
    from pyarrow import table

    parquet.write_table(table(dict(file=['a.png'])), tmp_path / 'files.parquet')
    (tmp_path / 'text.parquet').write_text('path')
    for name, message in (('files', "has no column 'path', but file"), ('text', 'is no Parquet file'),
                          ('none', 'is no Parquet file')):  # fmt: skip
        command = [sys.executable, ROOT / 'examples/predict_with_ray.py', 'c', 'c.pth', f'{name}.parquet', '--out', 'o']
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert process.returncode == 2 and process.stderr.startswith('error: ') and message in process.stderr
        assert process.stderr.count('\n') == 1 and f'{name}.parquet' in process.stderr


@pytest.mark.slow
def test_ray_gives_what_predict_gives(trained, tmp_path, tool_here):
    """On two actors of this machine, from a folder, from paths and from bytes; a file that is no image is named."""
    pytest.importorskip('ray.data')
    parquet = pytest.importorskip('pyarrow.parquet')
    from pyarrow import table

    random = np.random.default_rng(0)
    for name in ('a.png', 'b/c.png', 'b/d.png'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'bad.jpg').write_bytes(b'text')
    tool_here('predict', TINY_CONFIG, trained, 'in', '--out', 'expected', '--labels', '--skip-existing',
              '--precision', 'fp32')  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / 'expected/manifest.jsonl').read_text().splitlines()[1:]]
    paths = [line['file'] for line in lines]
    content = [(tmp_path / path).read_bytes() for path in paths]
    parquet.write_table(table(dict(path=[str(tmp_path / path) for path in paths])), tmp_path / 'paths.parquet')
    parquet.write_table(table(dict(path=[f'x/{path}' for path in paths], bytes=content)), tmp_path / 'bytes.parquet')
    for source in ('in', 'paths.parquet', 'bytes.parquet'):
        out = tmp_path / f'out of {source}'
        output = run('predict_with_ray.py', TINY_CONFIG, trained, source, '--out', out, '--actors', 2, cwd=tmp_path)
        assert f'3 images in {out}, 1 could not be read' in output
        rows = {Path(row['path']).name: row for row in parquet.read_table(out / 'results').to_pylist()}
        maps = {path.name.split('.')[0]: path.read_bytes() for path in (out / 'labels').rglob('*.png')}
        assert len(maps) == 3 and 'bad.jpg' in rows and rows['bad.jpg']['reason']
        for line in lines:
            if 'reason' not in line:
                name = Path(line['file'])
                assert json.loads(rows[name.name]['classes']) == pytest.approx(line['classes'], abs=1e-6)
                assert maps[name.stem] == (tmp_path / 'expected' / 'labels' / f'{line["output"]}.png').read_bytes()
