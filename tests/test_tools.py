"""Every tool as a user calls it: a subprocess, in another folder."""

import json
import os
import subprocess
import sys

import mmseg
import pytest
from conftest import ROOT, TINY_CONFIG, assert_user_error


@pytest.fixture(scope='module')
def trained(tmp_path_factory, mini_root):
    """The work dir of a run of three iterations."""
    work_dir = tmp_path_factory.mktemp('trained')
    command = [sys.executable, ROOT / 'tools' / 'train.py', TINY_CONFIG, '--work-dir', work_dir, '--data-root']
    command += [mini_root, '--weights', 'none', '--seed', '0', '--cfg-options', 'train_cfg.max_iters=3']
    process = subprocess.run(command, capture_output=True, text=True, cwd=work_dir)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'eta' in process.stdout
    return work_dir


def test_train_then_test(trained, tool, mini_root, tmp_path):
    process = tool(
        'test', TINY_CONFIG, trained / 'iter_3.pth', '--data-root', mini_root, '--work-dir', tmp_path / 'work',
        '--out', 'labels', '--show-dir', 'pictures', '--json', 'new/figures.json',
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    figures = json.loads((tmp_path / 'new' / 'figures.json').read_text())
    assert set(figures) == {'mIoU', 'mAcc', 'aAcc', 'per_class'} and set(figures['per_class']['sky']) == {'IoU', 'Acc'}
    headline = f'mIoU {figures["mIoU"]}, mAcc {figures["mAcc"]}, aAcc {figures["aAcc"]}'
    assert process.stdout.strip().splitlines()[-1] == headline
    for folder in ('labels', 'pictures'):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ['ADE_val_00000001.png', 'ADE_val_00000002.png']


def test_resume_goes_on_in_the_same_work_dir(trained, tool, mini_root):
    process = tool('train', TINY_CONFIG, '--work-dir', trained, '--data-root', mini_root, '--resume')
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'Iter(train) [4/6]' in process.stdout and 'Iter(train) [3/6]' not in process.stdout


def test_mmsegs_own_tools_run_the_configs(tool, mini_root, tmp_path):
    """`custom_imports` names the package; on one CPU process SyncBN is BN by torch's own doing."""
    tools = f'{mmseg.__path__[0]}/.mim/tools'
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
    options += [f'{split}_dataloader.dataset.data_root={mini_root}' for split in ('train', 'val', 'test')]
    for script, *arguments in (('train', TINY_CONFIG), ('test', TINY_CONFIG, tmp_path / 'w' / 'iter_2.pth')):
        command = [sys.executable, f'{tools}/{script}.py', *arguments, '--work-dir', tmp_path / 'w']
        process = subprocess.run(
            [*command, '--cfg-options', *options], capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert process.returncode == 0, process.stderr[-3000:]
    assert 'mIoU' in process.stdout


def test_work_dirs_of_upernet_and_fpn_do_not_collide(tool, tmp_path):
    for family in ('upernet', 'fpn'):
        tool('train', ROOT / 'configs' / family / 'inceptionnext_t.py')
        assert (tmp_path / 'work_dirs' / family / 'inceptionnext_t').is_dir()


def test_mistakes_end_in_one_line_and_exit_code_2(trained, tool, mini_root, tmp_path):
    checkpoint, data = trained / 'iter_3.pth', ('--data-root', mini_root)
    (tmp_path / 'file').write_text('')
    (tmp_path / 'broken.py').write_text('model = dict(')
    (tmp_path / 'torn.pth').write_bytes(checkpoint.read_bytes()[:20000])
    assert_user_error(tool('train', 'nowhere.py'), 'no config at', str(tmp_path / 'nowhere.py'))
    assert_user_error(tool('train', 'broken.py'), 'broken.py cannot be read as a config')
    assert_user_error(tool('train', TINY_CONFIG, '--data-root', 'nowhere'), f'no data set at {tmp_path / "nowhere"}')
    assert_user_error(tool('train', TINY_CONFIG, *data, '--work-dir', 'file/x'), 'cannot write to', '--work-dir')
    assert_user_error(
        tool('train', TINY_CONFIG, *data, '--weights', 'nowhere.pth'), 'no checkpoint at', str(tmp_path / 'nowhere.pth')
    )
    options = ('--cfg-options', 'model.backbone.arch=huge')
    assert_user_error(tool('train', TINY_CONFIG, *data, *options), "unknown arch 'huge'", "'tiny'")
    options = ('--cfg-options', 'model.backbone.out_indices=(0,1,2,7)')
    assert_user_error(tool('train', TINY_CONFIG, *data, *options), 'out_indices=(0, 1, 2, 7)')
    assert_user_error(tool('test', TINY_CONFIG, 'torn.pth', *data), 'torn.pth is truncated')
    assert_user_error(tool('test', TINY_CONFIG, 'none.pth', *data), 'no checkpoint at', str(tmp_path / 'none.pth'))
    assert_user_error(tool('test', TINY_CONFIG, checkpoint, *data, '--json', 'file/x.json'), 'cannot write')
    assert_user_error(tool('test', TINY_CONFIG, checkpoint, *data, '--out', 'file/x'), 'cannot write into file/x')
    assert_user_error(tool('test', TINY_CONFIG, checkpoint, *data, '--out', ''), 'cannot write into')
    assert_user_error(tool('train', TINY_CONFIG, *data, '--cfg-options', 'nonsense'), 'KEY=VALUE')
    assert_user_error(tool('train', TINY_CONFIG, *data, '--cfg-options', 'model=1'), 'lacks model')
    assert_user_error(tool('train', TINY_CONFIG, *data, '--launcher', 'pytorch'), 'torchrun', 'RANK is not set')
    small = ('--cfg-options', 'model.backbone.arch=atto', 'model.neck.in_channels=[40,80,160,320]')
    assert_user_error(tool('test', TINY_CONFIG, checkpoint, *data, *small), 'does not fit the config', 'shapes differ')
    assert_user_error(tool('make_mini_ade20k', '--out', 'x', '--size', '3'), 'size=3')


def test_a_bad_label_met_by_a_worker_is_one_line_too(tool, mini_root, tmp_path):
    """The error comes out of a data-loading process, wrapped in its traceback."""
    options = ['train_dataloader.dataset.pipeline.3.num_classes=2', 'train_dataloader.num_workers=2']
    process = tool('train', TINY_CONFIG, '--data-root', mini_root, '--weights', 'none', '--cfg-options', *options)
    assert_user_error(process, 'annotations/training/ADE_train_', 'outside 1 … 2 of 2 classes')


def test_a_bug_keeps_its_traceback(tool, mini_root):
    process = tool('train', TINY_CONFIG, '--data-root', mini_root, '--cfg-options', 'model.neck.nonsense=1')
    assert process.returncode == 1 and 'Traceback' in process.stderr


def test_make_mini_ade20k(tool, tmp_path):
    process = tool('make_mini_ade20k', '--out', 'data/mini', '--train', 2, '--val', 1, '--size', 64, '--seed', 1)
    assert process.returncode == 0, process.stderr
    assert process.stdout == '2 training and 1 validation pairs in data/mini\n'
    assert len(list((tmp_path / 'data' / 'mini').rglob('*.jpg'))) == 3


@pytest.mark.parametrize('name', ['train', 'test', 'make_mini_ade20k', 'get_flops', 'benchmark'])
def test_help_is_clean(tool, name):
    process = tool(name, '--help')
    assert process.returncode == 0 and process.stdout.startswith('usage:') and process.stderr == ''


def test_two_processes_on_cpus_train_and_test(tool, mini_root, tmp_path):
    """Over gloo; the figures of a split test are those of one process, on an odd number of images."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    data = ['--data-root', mini_root, '--work-dir', tmp_path / 'work']
    options = ['--cfg-options', 'train_cfg.max_iters=2', 'test_dataloader.dataset.indices=1']
    for script, *arguments in (('train', TINY_CONFIG), ('test', TINY_CONFIG, 'work/iter_2.pth', '--json', 'two.json')):
        command = [*torchrun, ROOT / 'tools' / f'{script}.py', *arguments, '--launcher', 'pytorch', *data, *options]
        process = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-3000:]
    assert tool('test', TINY_CONFIG, 'work/iter_2.pth', '--json', 'one.json', *data, *options).returncode == 0
    assert json.loads((tmp_path / 'two.json').read_text()) == json.loads((tmp_path / 'one.json').read_text())


def test_get_flops(tool, tmp_path):
    configs = [ROOT / 'configs' / 'fpn' / 'inceptionnext_t.py', TINY_CONFIG]
    process = tool('get_flops', *configs, 'nowhere.py', '--paper', '--json', 'x/flops.json')
    assert_user_error(process, 'nowhere.py: no config at')  # which does not stop the others
    rows = json.loads((tmp_path / 'x' / 'flops.json').read_text())
    assert [row['config'] for row in rows] == list(map(str, configs))
    keys = {'config', 'params_m', 'params_m_without_aux', 'gmacs', 'gmacs_executed', 'shape'}
    assert set(rows[0]) == keys and rows[0]['shape'] == [512, 512]
    assert round(rows[0]['gmacs']) == 44 and round(rows[0]['params_m']) == 28
    assert process.stdout.count('\n') == 4 and '43.5' in process.stdout and '44' in process.stdout


def test_benchmark(tool, tmp_path):
    process = tool(
        'benchmark', TINY_CONFIG, 'nowhere.py', '--shape', 64, 64, '--repeat', 2, '--json', 'speed.json'
    )  # fmt: skip
    assert_user_error(process, 'nowhere.py: no config at')
    (row,) = json.loads((tmp_path / 'speed.json').read_text())
    assert {'config', 'fps', 'fps_min', 'fps_max', 'ratio_to_first', 'peak_memory_mb'} <= set(row)
    assert {'device', 'threads', 'dtype', 'versions', 'layout'} <= set(row)
    assert '| config ' in process.stdout and ' images/s |' in process.stdout


def test_the_script_of_the_speed_tables(tool):
    process = tool('../benchmarks/fast_path', 'tail', '--repeat', 1)
    assert process.returncode == 0 and 'LabelMapSegmentor' in process.stdout, process.stderr
    assert_user_error(tool('../benchmarks/fast_path', 'nonsense'), "no table 'nonsense'")
