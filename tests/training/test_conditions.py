"""What containers and shared machines do to a training, each condition made for real where that is possible."""

import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmseg.registry import HOOKS, TRANSFORMS
from support import ROOT, TINY_CONFIG, assert_user_error
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.device import SharedMemory, raise_open_file_limit
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.training import workers
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.signals import Interrupted, StopSignal, disable_sigchld_handler
from mmseg_inceptionnext.training.train import run_result, train
from mmseg_inceptionnext.training.workers import Workers, size_of


@pytest.fixture
def under(tmp_path):
    """Run a tool after shell commands that change its surroundings, in a mount namespace of its own."""
    namespace = ['unshare', '--map-root-user', '--mount', 'bash', '-c']
    if not shutil.which('unshare') or subprocess.run([*namespace, f'mount -t tmpfs none {tmp_path}']).returncode:
        pytest.skip('this system lets no user mount a file system')

    def run(setup: str, name: str, *arguments, timeout: int = 120, **environment) -> subprocess.CompletedProcess:
        command = shlex.join(map(str, [sys.executable, ROOT / 'tools' / f'{name}.py', *arguments]))
        return subprocess.run(
            [*namespace, f'{setup}\nexec {command}'], cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
            env=os.environ | {'OMP_NUM_THREADS': '1'} | environment,
        )  # fmt: skip

    return run


@pytest.fixture
def training(mini_root, tmp_path) -> tuple:
    return (
        'train', TINY_CONFIG, '--data-root', mini_root, '--weights', 'none', '--work-dir', tmp_path / 'w', '--iters', 4,
        '--cfg-options', 'train_dataloader.num_workers=2',
    )  # fmt: skip


@pytest.mark.parametrize(
    'size', [pytest.param('64k', marks=pytest.mark.slow), '256k', pytest.param('400k', marks=pytest.mark.slow)]
)
def test_a_small_shared_memory_ends_the_run_with_its_name(size, under, training):
    process = under(f'mount -t tmpfs -o size={size} tmpfs /dev/shm', *training)
    assert_user_error(process, '/dev/shm, through which', 'is full', '--shm-size 1g', 'fewer workers')
    if size != '64k':
        assert '2 workers × 2 batches of ' in process.stderr


@pytest.mark.slow
def test_the_check_without_shared_memory_says_what_to_do(under, mini_root):
    arguments = ('mount -t tmpfs -o size=4k tmpfs /dev/shm', 'check_dataset', TINY_CONFIG, '--data-root', mini_root)
    assert_user_error(under(*arguments, '--workers', 2), '/dev/shm', '--workers 1')
    assert under(*arguments, '--workers', 1).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize('files', [24, 40])
def test_few_open_files_end_the_run_with_the_number_needed(files, under, training):
    process = under(f'ulimit -n {files}', *training)
    assert_user_error(process, f'{files} files may be open', 'need about', 'ulimit -n')


@pytest.mark.slow
@pytest.mark.parametrize('files', [24, 32, 40])
def test_a_worker_that_runs_out_of_open_files_leaves_no_run_waiting(files, under, training, tmp_path):
    """As if the estimate before the run were wrong."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import mmseg_inceptionnext.training.workers as workers\nworkers.Workers.check_limits = lambda self: None\n'
    )
    process = under(f'ulimit -n {files}', *training, PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert process.returncode in (0, 2), process.stderr
    if process.returncode:
        assert_user_error(process, 'files may be open in a process')


def test_no_handler_raises_where_a_worker_dies(monkeypatch):
    monkeypatch.setattr(signal_handling, '_SIGCHLD_handler_set', False)  # as in a process that had no workers yet
    disable_sigchld_handler()
    assert list(DataLoader(range(2), num_workers=1)) == [0, 1]
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_the_limit_of_open_files_is_raised_as_far_as_one_may():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_workers_need_is_said(monkeypatch):
    loader = Workers(8, 2, 8)
    batch = {'inputs': [torch.zeros(3, 512, 512, dtype=torch.uint8)] * 8, 'data_samples': []}
    assert size_of(batch) == 8 * 3 * 512 * 512
    monkeypatch.setattr(workers, 'shared_memory', lambda: SharedMemory('/dev/shm', 2**26, 2**26))
    assert loader.warning(batch).startswith(
        '/dev/shm has 64 MB, 8 workers × 2 batches of 8 images need 96 MB: give it more'
    )
    monkeypatch.setattr(workers, 'shared_memory', lambda: SharedMemory('/dev/shm', 2**30, 2**30))
    assert loader.warning(batch) == ''
    assert '(ulimit -n)' in loader.fault(OSError(errno.EMFILE, 'Too many open files'))
    assert 'need 96 MB' in loader.fault(OSError(errno.ENOSPC, 'No space left on device'), size_of(batch))
    assert loader.fault(RuntimeError('a bug')) == ''


@TRANSFORMS.register_module(force=True)
class HangAt(BaseTransform):
    """A worker waits for ever on a file, as on a disk that does not answer."""

    def __init__(self, name: str):
        self.name = name

    def transform(self, results: dict) -> dict:
        if results['img_path'].endswith(self.name) and get_worker_info():
            time.sleep(1000)
        return results


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_data_that_never_come(tiny_cfg):
    tiny_cfg.train_dataloader.update(num_workers=1)
    tiny_cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='HangAt', name='ADE_train_00000003.jpg'))
    alarm = threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    start = time.monotonic()
    end = run_result(train(tiny_cfg, TrainOptions(seed=5)))
    assert end['stopped_by'] == 'SIGTERM' and time.monotonic() - start < 60
    assert end['done'] == 0 or Path(tiny_cfg.work_dir, f'iter_{end["done"]}.pth').is_file()


def test_a_signal_is_noted_between_waits_and_ends_the_next():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.received == signal.SIGTERM
        with pytest.raises(Interrupted), stop.while_waiting():
            pytest.fail('it waited')


@pytest.mark.slow
def test_a_second_signal_ends_the_process_but_the_echo_of_sigterm_does_not():
    program = (
        'import os, signal, sys, time\n'
        'from mmseg_inceptionnext.training.signals import StopSignal\n'
        'with StopSignal():\n'
        '    for pause in (0, 0, float(sys.argv[1])):\n'
        '        time.sleep(pause); os.kill(os.getpid(), int(sys.argv[2]))\n'
        '    time.sleep(0.1)\n'
    )
    for number, pause, code in ((signal.SIGTERM, 0, 0), (signal.SIGTERM, 1.2, -15), (signal.SIGINT, 0, -2)):
        command = [sys.executable, '-c', program, str(pause), str(int(number))]
        assert subprocess.run(command, capture_output=True).returncode == code


@HOOKS.register_module(force=True)
class MoveWorkDirHook(Hook):
    """Somebody moves the work dir away after the second iteration."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if batch_idx == 1:
            os.rename(runner.work_dir, f'{runner.work_dir}.moved')


@pytest.mark.slow
def test_a_work_dir_that_is_moved_away_costs_no_run(tiny_cfg):
    tiny_cfg.custom_hooks = [*tiny_cfg.custom_hooks, dict(type='MoveWorkDirHook')]
    tiny_cfg.default_hooks.checkpoint.interval = 2
    end = run_result(train(tiny_cfg, TrainOptions(seed=5)))
    assert end['done'] == 6
    assert Path(tiny_cfg.work_dir, 'iter_6.pth').is_file() and end['config'].is_file()
    assert Path(f'{tiny_cfg.work_dir}.moved').is_dir()


@pytest.mark.slow
def test_where_the_work_dir_cannot_be_written_the_last_checkpoint_is_kept_elsewhere(tiny_cfg, tmp_path, monkeypatch):
    from mmseg_inceptionnext.training import runner

    def broken(path, *arguments, **options):
        if path.parent == Path(tiny_cfg.work_dir):
            raise OSError(errno.EIO, 'Input/output error', str(path))
        return atomic_write(path, *arguments, **options)

    monkeypatch.setattr(runner, 'atomic_write', broken)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    tiny_cfg.default_hooks.checkpoint.save_best = None
    with pytest.raises(UserError, match=r'cannot be written \(Input/output error\); the last checkpoint is kept as'):
        train(tiny_cfg, TrainOptions(seed=5))
    monkeypatch.undo()
    (kept,) = tmp_path.glob('work_*_iter_6.pth')
    tiny_cfg.train_cfg.max_iters = 7
    assert train(tiny_cfg, TrainOptions(resume=str(kept), overwrite=True)).iter == 7


def test_a_pointer_that_may_not_be_read_is_one_line(trained, mini_root, tool_here, tmp_path, monkeypatch):
    (tmp_path / 'w').mkdir()
    shutil.copy(trained, tmp_path / 'w')
    (tmp_path / 'w' / 'last_checkpoint').write_text('iter_3.pth')
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == 'last_checkpoint':
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, 'read_text', refuse)
    process = tool_here('train', TINY_CONFIG, '--data-root', mini_root, '--work-dir', tmp_path / 'w', '--resume')
    assert_user_error(process, 'last_checkpoint: Permission denied: change its permissions')


@pytest.mark.slow
def test_a_closed_pipe_ends_no_run_and_leaves_no_litter(training, tmp_path):
    (tmp_path / 't').mkdir()
    command = shlex.join(map(str, [sys.executable, ROOT / 'tools' / 'train.py', *training[1:]]))
    script = f'{command} default_hooks.logger.interval=1 2>&1 | head -1; echo "${{PIPESTATUS[0]}}"'
    process = subprocess.run(
        ['bash', '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {'TMPDIR': str(tmp_path / 't'), 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert process.stdout.splitlines()[-1] == '0', process.stdout + process.stderr
    assert (tmp_path / 'w' / 'iter_4.pth').is_file()
    (log,) = (tmp_path / 'w').glob('*/*.log')
    assert 'Iter(train) [4/4]' in log.read_text(encoding='utf-8')
    assert not list((tmp_path / 't').glob('pymp-*'))


@pytest.mark.slow
def test_names_in_other_letters_under_a_locale_without_them(under, mini_root, tmp_path):
    """One name is no UTF-8 at all; OpenCV, which writes pictures, crashes on such a string."""
    root = tmp_path / 'data'
    shutil.copytree(mini_root, root)
    for split in ('training', 'validation'):
        for kind, suffix in (('images', '.jpg'), ('annotations', '.png')):
            folder = root / kind / split
            for path, name in zip(sorted(folder.iterdir()), (b'\xff\xfe', 'straße'.encode()), strict=False):
                os.rename(path, folder / (os.fsdecode(name) + suffix))
    options = ('--data-root', root, '--work-dir', 'w')
    locale = dict(LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    process = under(':', 'check_dataset', TINY_CONFIG, '--data-root', root, '--json', 'check.json', **locale)
    assert process.returncode == 0, process.stderr
    process = under(':', 'train', TINY_CONFIG, *options, '--weights', 'none', '--iters', 2, **locale)
    assert process.returncode == 0, process.stderr
    process = under(
        ':', 'test', TINY_CONFIG, 'w/iter_2.pth', *options, '--report', 'r', '--out', 'o', '--json', 'q.json', **locale
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'r' / 'index.html').read_text(encoding='utf-8')
    assert len(list((tmp_path / 'o').iterdir())) == 2


def test_a_folder_whose_name_is_no_utf8_is_one_line(mini_root, tool_here, tmp_path):
    odd = tmp_path / os.fsdecode(b'\xff')
    shutil.copytree(mini_root, odd)
    process = tool_here('train', TINY_CONFIG, '--data-root', odd, '--weights', 'none', '--work-dir', 'w')
    assert_user_error(process, '--data-root', 'is no UTF-8', 'ln -s')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['model.pt2', 'model.onnx'])
def test_an_export_to_a_full_disk_is_one_line_and_keeps_the_old_file(name, under, trained, tmp_path):
    (tmp_path / 'disk').mkdir()
    process = under(
        f'mount -t tmpfs -o size=100k tmpfs disk; echo old > disk/{name}; trap "" EXIT',
        'export', TINY_CONFIG, trained, '--out', f'disk/{name}', '--shape', 64, 64, '--verify', 1,
    )  # fmt: skip
    assert_user_error(process, f'disk/{name}: No space left on device: free space')


@pytest.mark.slow
def test_a_run_without_a_home(under, training):
    process = under('unset HOME USER LOGNAME', *training)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize('condition', ['/dev/shm', 'lock'])
def test_two_processes_end_together(condition, training, tmp_path, under):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29641']
    tool = [ROOT / 'tools' / 'train.py', *training[1:10], '--launcher', 'pytorch', *training[10:]]
    hold = (
        'import fcntl, os, time; os.makedirs("w", exist_ok=True); f = open("w/.lock", "w");'
        'fcntl.lockf(f, fcntl.LOCK_EX); time.sleep(60)'
    )
    setup = {
        '/dev/shm': 'mount -t tmpfs -o size=400k tmpfs /dev/shm',
        'lock': f"{sys.executable} -c '{hold}' & holder=$!; sleep 2",
    }[condition]
    script = f'{setup}\n{shlex.join(map(str, [*launch, *tool]))}; code=$?; [ -z "$holder" ] || kill $holder; exit $code'
    process = subprocess.run(
        ['unshare', '--map-root-user', '--mount', 'bash', '-c', script], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.count('error: ') >= 2
    assert ('/dev/shm' if condition == '/dev/shm' else 'is in use by') in process.stderr
