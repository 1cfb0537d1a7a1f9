"""Every tool as a user calls it: a subprocess, in another folder."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from support import ROOT, TINY_CONFIG, assert_user_error

from mmseg_inceptionnext.config import load_config


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory, mini_root):
    """Of a run of three iterations."""
    folder = tmp_path_factory.mktemp('trained')
    command = [sys.executable, ROOT / 'tools' / 'train.py', TINY_CONFIG, '--work-dir', folder, '--data-root']
    command += [mini_root, '--weights', 'none', '--seed', '0', '--cfg-options', 'train_cfg.max_iters=3']
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'eta' in process.stdout and 'the recipe is made for 8: --auto-batch' in process.stdout
    (folder / 'last_line').write_text(process.stdout.strip().splitlines()[-1])
    return folder


def test_a_run_ends_with_the_command_that_tests_its_best_checkpoint(work_dir, tmp_path):
    figure, command = (work_dir / 'last_line').read_text().split('. Test it: ')
    assert re.fullmatch(r'mIoU \d+\.\d\d at iteration 3', figure)
    python, *arguments = shlex.split(command)
    assert python == 'python' and Path(arguments[-1]).name == 'best_mIoU_iter_3.pth'
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().splitlines()[-1].startswith(figure.split(' at ')[0])


def test_train_then_test(work_dir, tool_here, mini_root, tmp_path):
    process = tool_here(
        'test', TINY_CONFIG, work_dir / 'iter_3.pth', '--data-root', mini_root, '--work-dir', tmp_path / 'work',
        '--out', 'labels', '--show-dir', 'pictures', '--json', 'new/figures.json',
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    figures = json.loads((tmp_path / 'new' / 'figures.json').read_text())
    assert set(figures) == {'mIoU', 'mAcc', 'aAcc', 'per_class'} and set(figures['per_class']['sky']) == {'IoU', 'Acc'}
    headline = f'mIoU {figures["mIoU"]}, mAcc {figures["mAcc"]}, aAcc {figures["aAcc"]}'
    assert process.stdout.strip().splitlines()[-1] == headline
    for folder in ('labels', 'pictures'):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ['ADE_val_00000001.png', 'ADE_val_00000002.png']


def test_multi_scale_reports_that_are_compared(work_dir, tool_here, mini_root, tmp_path):
    for options in ([], ['--tta']):
        name = 'b' if options else 'a'
        process = tool_here(
            'test', TINY_CONFIG, work_dir / 'iter_3.pth', '--data-root', mini_root, '--work-dir', tmp_path / 'work',
            '--report', name, '--report-images', 1, *options,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.strip().splitlines()[-1] == f'Report: {name}/index.html'
        assert '--report' in json.loads((tmp_path / name / 'report.json').read_text())['run']['command']
    process = tool_here('compare_reports', 'a', 'b/report.json')
    assert process.returncode == 0 and '| mIoU ' in process.stdout and 'B − A' in process.stdout


def test_label_maps_without_ground_truth(work_dir, tool_here, mini_root, tmp_path):
    shutil.copytree(mini_root / 'images' / 'validation', tmp_path / 'data' / 'images' / 'validation')
    process = tool_here('test', TINY_CONFIG, work_dir / 'iter_3.pth', '--data-root', 'data', '--out', 'labels', '--tta')
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'there are no metrics. Predictions are in labels' in process.stdout.strip().splitlines()[-1]
    assert len(list((tmp_path / 'labels').iterdir())) == 2


def test_predict(work_dir, tool, mini_root, tmp_path):
    command = [sys.executable, ROOT / 'tools' / 'predict.py', TINY_CONFIG, work_dir / 'iter_3.pth', '-', 'nowhere.jpg']
    paths = '\n'.join(map(str, (mini_root / 'images' / 'validation').iterdir()))
    process = subprocess.run(
        [*command, '--out', 'new/out', '--legend', '--labels', '--batch-size', '2', '--device', 'cpu'],
        input=paths, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert_user_error(process, 'nowhere.jpg: no such file')
    assert process.stdout == '2 images in new/out\n' and 'images/s' in process.stderr
    written = sorted(str(path.relative_to(tmp_path / 'new/out')) for path in (tmp_path / 'new/out').rglob('*.png'))
    names = ['ADE_val_00000001.png', 'ADE_val_00000002.png']
    assert written == [*names, *(f'labels/{name}' for name in names)]


def test_mistakes_of_predict(work_dir, tool_here, mini_root, tmp_path):
    checkpoint, images = work_dir / 'iter_3.pth', mini_root / 'images' / 'validation'
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'ADE_val_00000002.png').touch()
    arguments = (TINY_CONFIG, checkpoint, images, '--out')
    assert_user_error(tool_here('predict', *arguments, 'out'), 'ADE_val_00000002.png exist already', '--overwrite')
    assert_user_error(tool_here('predict', *arguments, 'x', '--opacity', 2), '2 is not from 0 to 1')
    assert_user_error(tool_here('predict', *arguments, 'x', '--batch-size', 0), 'not a positive whole number')
    assert_user_error(tool_here('predict', *arguments, 'x', '--device', 'abacus'), '--device abacus cannot be used')
    assert_user_error(tool_here('predict', *arguments, 'x', '--classes', 'c.txt'), 'cannot read classes from c.txt')
    assert_user_error(tool_here('predict', TINY_CONFIG, checkpoint, '*.jpg', '--out', 'x'), '*.jpg holds no image')
    assert_user_error(tool_here('predict', 'inceptionnext_t', checkpoint, images, '--out', 'x'), 'several configs')
    assert_user_error(tool_here('predict', TINY_CONFIG, checkpoint, images), '--out')
    assert_user_error(tool_here('compare_reports', 'nowhere', 'out'), 'no report at nowhere')
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, '--report-images', 'x'), 'not a positive whole number')


def test_dry_run(tool_here, mini_root, tmp_path):
    process = tool_here(
        'train', 'mini/upernet_inceptionnext_a', '--data-root', mini_root, '--work-dir', 'w', '--dry-run',
        '--auto-batch', '--cfg-options', 'train_dataloader.batch_size=2',
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'effective batch  8 = 1 × 2 × 4' in process.stdout and 'about 0:' in process.stdout
    assert list((tmp_path / 'w').iterdir()) == []


@pytest.mark.slow
def test_resume_goes_on_in_the_same_work_dir(work_dir, tool_here, mini_root):
    process = tool_here('train', TINY_CONFIG, '--work-dir', work_dir, '--data-root', mini_root, '--resume')
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'Iter(train) [4/6]' in process.stdout and 'Iter(train) [3/6]' not in process.stdout


def test_work_dirs_of_upernet_and_fpn_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in ('upernet', 'fpn'):
        cfg = load_config(ROOT / 'configs' / family / 'inceptionnext_t.py')
        assert cfg.work_dir == f'work_dirs/{family}/inceptionnext_t' and Path(cfg.work_dir).is_dir()


def test_mistakes_end_in_one_line_and_exit_code_2(work_dir, tool_here, mini_root, tmp_path):
    checkpoint, data = work_dir / 'iter_3.pth', ('--data-root', mini_root)
    (tmp_path / 'file').write_text('')
    (tmp_path / 'broken.py').write_text('model = dict(')
    (tmp_path / 'torn.pth').write_bytes(checkpoint.read_bytes()[:20000])
    assert_user_error(tool_here('train', 'nowhere.py'), 'no config at', str(tmp_path / 'nowhere.py'))
    assert_user_error(tool_here('train', 'broken.py'), 'broken.py cannot be read as a config')
    assert_user_error(tool_here('train', TINY_CONFIG, '--data-root', 'no'), f'no data set at {tmp_path / "no"}')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, '--work-dir', 'file/x'), 'cannot write to', '--work-dir')
    assert_user_error(
        tool_here('train', TINY_CONFIG, *data, '--weights', 'nowhere.pth'),
        'no checkpoint at',
        str(tmp_path / 'nowhere.pth'),
    )
    options = ('--cfg-options', 'model.backbone.arch=huge')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, *options), "unknown arch 'huge'", "'tiny'")
    options = ('--cfg-options', 'model.backbone.out_indices=(0,1,2,7)')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, *options), 'out_indices=(0, 1, 2, 7)')
    assert_user_error(tool_here('test', TINY_CONFIG, 'torn.pth', *data), 'torn.pth is truncated')
    assert_user_error(tool_here('test', TINY_CONFIG, 'none.pth', *data), 'no checkpoint at', str(tmp_path / 'none.pth'))
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, *data, '--json', 'file/x.json'), 'cannot write')
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, *data, '--out', 'file/x'), 'cannot write into file/x')
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, *data, '--out', ''), 'cannot write into')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, '--cfg-options', 'nonsense'), 'KEY=VALUE')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, '--cfg-options', 'model=1'), 'lacks model')
    for option in ('train_dataloader.batch_size=0', 'train_dataloader.batch_size=x', 'train_cfg.val_interval=0'):
        process = tool_here('train', TINY_CONFIG, *data, '--dry-run', '--auto-batch', '--cfg-options', option)
        assert_user_error(process, option.split('=')[0], 'must be a positive whole number')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, '--launcher', 'pytorch'), 'torchrun', 'RANK is not set')
    small = ('--cfg-options', 'model.backbone.arch=atto', 'model.neck.in_channels=[40,80,160,320]')
    assert_user_error(tool_here('test', TINY_CONFIG, checkpoint, *data, *small), 'does not fit', 'shapes differ')
    assert_user_error(tool_here('make_mini_ade20k', '--out', 'x', '--size', '3'), '--size 3')


def test_a_bad_label_met_by_a_worker_is_one_line_too(tool, mini_root, tmp_path):
    """The error comes out of a data-loading process, wrapped in its traceback."""
    options = ['train_dataloader.dataset.pipeline.3.num_classes=2', 'train_dataloader.num_workers=2']
    process = tool('train', TINY_CONFIG, '--data-root', mini_root, '--weights', 'none', '--cfg-options', *options)
    assert_user_error(process, 'annotations/training/ADE_train_', 'outside 1 … 2 of 2 classes')


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (
            ['model.backbone.type=InceptionNext'],
            "type='InceptionNext' in the config is not a registered model (did you mean Incep",
        ),
        (['default_hooks.timer.type=Tea'], "type='Tea' in the config is not a registered hook: correct it"),
        (['model.decode_head.chanels=4'], 'chanels in the config is not an argument of BaseDecodeHead'),
        (['train_dataloader.batchsize=4'], 'batchsize in the config is not an argument of DataLoader'),
    ],
)
def test_names_that_mmengine_does_not_know(tool_here, mini_root, options, said):
    data = ('--data-root', mini_root, '--weights', 'none')
    assert_user_error(tool_here('train', TINY_CONFIG, *data, '--cfg-options', *options), said)


@HOOKS.register_module()
class BuggyHook(Hook):
    """Fails as mmengine does at an argument that a config misspells; but this one is not the config's."""

    def before_train(self, runner) -> None:
        super().before_train(runner, batchsize=1)


def test_a_bug_keeps_its_traceback(tool_here, mini_root):
    data = ('--data-root', mini_root, '--weights', 'none')
    with pytest.raises(TypeError, match=r"Hook.before_train\(\) got an unexpected keyword argument 'batchsize'"):
        tool_here('train', TINY_CONFIG, *data, '--cfg-options', 'default_hooks.bug.type=BuggyHook')


def test_make_mini_ade20k(tool_here, tmp_path):
    process = tool_here('make_mini_ade20k', '--out', 'data/mini', '--train', 2, '--val', 1, '--size', 64, '--seed', 1)
    assert process.returncode == 0, process.stderr
    assert process.stdout == '2 training and 1 validation pairs in data/mini\n'
    assert len(list((tmp_path / 'data' / 'mini').rglob('*.jpg'))) == 3


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'tools').glob('*.py')))
def test_help_is_clean_and_says_how_to_call_it(tool_here, name):
    process = tool_here(name, '--help')
    assert process.returncode == 0 and process.stderr == ''
    script = ROOT / 'tools' / f'{name}.py'
    assert process.stdout.startswith('usage: python ') and (f'python {script} ' in process.stdout or name == 'doctor')


def test_get_flops(tool_here, tmp_path):
    configs = [ROOT / 'configs' / 'fpn' / 'inceptionnext_t.py', TINY_CONFIG]
    process = tool_here('get_flops', *configs, 'nowhere.py', '--paper', '--json', 'x/flops.json')
    assert_user_error(process, 'nowhere.py: no config at')  # which does not stop the others
    rows = json.loads((tmp_path / 'x' / 'flops.json').read_text())
    assert [row['config'] for row in rows] == list(map(str, configs))
    keys = {'config', 'params_m', 'params_m_without_aux', 'gmacs', 'gmacs_executed', 'shape'}
    assert set(rows[0]) == keys and rows[0]['shape'] == [512, 512]
    assert round(rows[0]['gmacs']) == 44 and round(rows[0]['params_m']) == 28
    assert process.stdout.count('\n') == 4 and '43.5' in process.stdout and '44' in process.stdout


def test_benchmark(tool_here, tmp_path):
    process = tool_here(
        'benchmark', TINY_CONFIG, 'nowhere.py', '--shape', 64, 64, '--repeat', 2, '--json', 'speed.json'
    )  # fmt: skip
    assert_user_error(process, 'nowhere.py: no config at')
    (row,) = json.loads((tmp_path / 'speed.json').read_text())
    assert {'config', 'fps', 'fps_min', 'fps_max', 'ratio_to_first', 'peak_memory_mb'} <= set(row)
    assert {'device', 'threads', 'dtype', 'versions', 'layout'} <= set(row)
    assert '| config ' in process.stdout and ' images/s |' in process.stdout


@pytest.mark.slow
def test_the_script_of_the_speed_tables(tool):
    process = tool('../benchmarks/fast_path', 'tail', '--repeat', 1)
    assert process.returncode == 0 and 'LabelMapSegmentor' in process.stdout, process.stderr
    assert_user_error(tool('../benchmarks/fast_path', 'nonsense'), "no table 'nonsense'")
