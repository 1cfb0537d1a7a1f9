"""Several processes on CPUs, over gloo, do what one does."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support import ROOT, TINY_CONFIG, assert_user_error, relative_error
from torch import nn

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.fsdp import ShardedStrategy, check_fsdp
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import resume_if_restarted, train

# Without dropout and stochastic depth, of which every process draws its own.
RECORDED = """
_base_ = {base!r}
custom_imports = dict(imports=['mmseg_inceptionnext', 'process_hooks'], allow_failed_imports=False)
custom_hooks = [dict(type='RecordingHook', folder={folder!r})]
model = dict(type={model!r}, backbone=dict(drop_path_rate=0.0), decode_head=dict(dropout_ratio=0.0))
# AdamW divides by the size of a gradient: it makes a whole step of the rounding errors of one that is zero.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01))
# Three images, which two processes cannot share equally.
test_dataloader = dict(dataset=dict(
    indices=3, data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Write TINY_CONFIG with a :class:`process_hooks.RecordingHook`."""
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'training'))

    def write(name: str, model: str) -> Path:
        path = tmp_path / f'{name}.py'
        path.write_text(RECORDED.format(base=str(TINY_CONFIG), folder=str(tmp_path / name), model=model))
        return path

    return write


@pytest.fixture
def two(tmp_path, mini_root):
    """Run a tool in two processes, from another folder, and do something to them meanwhile; returns the launcher."""

    def run(
        name: str, *arguments, restarts=0, data_root=mini_root, meanwhile=lambda launcher: None
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2]
        command += ['--max-restarts', restarts, ROOT / 'tools' / f'{name}.py', *arguments]
        command += ['--launcher', 'pytorch', '--data-root', data_root]
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT / 'tests' / 'training')}
        launcher = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        meanwhile(launcher)
        out, err = launcher.communicate(timeout=300)
        return subprocess.CompletedProcess(command, launcher.returncode, out, err)

    return run


@pytest.fixture
def script(tmp_path):
    """Run ``tools/<name>.sh`` from another folder, with programs of the test's own before those of the system."""

    def run(name: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(tmp_path / 'bin'), str(Path(sys.executable).parent), os.environ['PATH']])
        environment = (
            os.environ
            | {'PATH': path, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT / 'tests' / 'training')}
            | environment
        )
        command = ['bash', ROOT / 'tools' / f'{name}.sh', *arguments]
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]


@pytest.mark.slow
def test_two_processes_train_and_test_as_one_with_the_doubled_batch(script, tool_here, recorded, mini_root, tmp_path):
    """The same losses, weights and figures; and only the first process writes.

    Batch norms use their running statistics, which would be those of a process's own images.
    """
    data = ('--data-root', mini_root, '--work-dir')
    options = (*data, 'work', '--weights', 'none', '--seed', 3)
    process = script('dist_train', recorded('two', 'Float64EncoderDecoder'), 2, *options, PORT=free_port())
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = records(tmp_path / 'two')
    assert [path for path in second['written'] if 'work' in Path(path).parts] == []
    assert any(path.endswith('last_checkpoint') for path in first['written'])

    cfg = load_config(recorded('one', 'Float64EncoderDecoder'), tmp_path / 'alone', mini_root)
    cfg.train_dataloader.batch_size *= 2
    train(cfg, TrainOptions(weights='none', seed=3))
    (one,) = records(tmp_path / 'one')
    # mmseg adds 1.2e-7 to the number of pixels that it divides by: a relative 1e-11 here, which depends on the batch.
    expected, *ours = (torch.tensor(x['losses'], dtype=torch.float64) for x in (one, first, second))
    assert len(expected) == 6 and relative_error(sum(ours) / 2, expected) < 1e-10
    checkpoints = [tmp_path / folder / 'iter_6.pth' for folder in ('work', 'alone')]
    ours, reference = (read_checkpoint(path)['state_dict'] for path in checkpoints)
    assert max(relative_error(ours[key], reference[key]) for key in reference) < 1e-10

    config = recorded('two', 'EncoderDecoder')
    options = (*data, 'test', '--json')
    process = script('dist_test', config, checkpoints[0], 2, *options, 'two.json', PORT=free_port())
    assert process.returncode == 0, process.stderr[-3000:]
    assert tool_here('test', config, checkpoints[0], *options, 'one.json').returncode == 0
    assert json.loads((tmp_path / 'two.json').read_text()) == json.loads((tmp_path / 'one.json').read_text())
    first, second = records(tmp_path / 'two')
    assert [path for path in second['written'] if {'test', 'two.json'} & set(Path(path).parts)] == []


def test_slurm_scripts_pass_everything_on(script, tmp_path):
    """To a program that prints what it is called with, a word a line."""
    (tmp_path / 'bin').mkdir()
    srun = tmp_path / 'bin' / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    process = script('slurm_train', 'gpu', 'my run', 'a config.py', '--resume', '--work-dir', 'my dir',
                     GPUS='16', SRUN_ARGS='--qos=high --time=10')  # fmt: skip
    words = process.stdout.splitlines()
    assert {'--partition=gpu', '--job-name=my run', '--ntasks=16', '--gres=gpu:8', '--kill-on-bad-exit=1'} <= set(words)
    assert {'--qos=high', '--time=10'} <= set(words)
    program = ['python', '-u', str(ROOT / 'tools' / 'train.py'), 'a config.py', '--launcher', 'slurm']
    assert words[-9:] == [*program, '--resume', '--work-dir', 'my dir'], process.stderr
    words = script('slurm_test', 'gpu', 'job', 'c.py', 'c.pth', '--tta', GPUS_PER_NODE='4').stdout.splitlines()
    program[2:4] = [str(ROOT / 'tools' / 'test.py'), 'c.py', 'c.pth']
    assert words[-8:] == [*program, '--tta'] and '--gres=gpu:4' in words


@pytest.mark.parametrize('name', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_scripts_say_what_they_want(script, name):
    process = script(name, 'one')
    assert process.returncode == 2 and process.stderr.startswith('usage: ') and process.stderr.count('\n') == 1


def kill_one(launcher: subprocess.Popen, once: Path) -> None:
    """Kill the second process as soon as there is a file."""
    while not once.is_file() and launcher.poll() is None:
        time.sleep(0.01)
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(work_dir / 'iter_12.pth')['state_dict']


def assert_same_weights(work_dir: Path, reference: Path) -> None:
    ours, theirs = weights(work_dir), weights(reference)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


TWELVE = ['--weights', 'none', '--seed', 3, '--cfg-options', 'train_cfg.max_iters=12', 'train_cfg.val_interval=12']


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_run_goes_on_with_resume_or_by_itself(two, tmp_path):
    """With the weights, at the end, of a run that nothing happened to."""
    assert two('train', TINY_CONFIG, '--work-dir', 'whole', *TWELVE).returncode == 0

    begin = []

    def kill(launcher):
        kill_one(launcher, tmp_path / 'hurt' / 'iter_6.pth')  # when both know that the one before is complete
        begin.append(time.monotonic())

    process = two('train', TINY_CONFIG, '--work-dir', 'hurt', *TWELVE, meanwhile=kill)
    assert process.returncode == 1 and time.monotonic() - begin[0] < 60
    assert re.search(
        r'error: process 0 of 2 lost the connection to another, .*; the last checkpoint is .*iter_\d\.pth: '
        'start again with --resume',
        process.stderr,
    )
    assert two('train', TINY_CONFIG, '--work-dir', 'hurt', '--resume', *TWELVE).returncode == 0
    assert_same_weights(tmp_path / 'hurt', tmp_path / 'whole')

    # In a work dir that has checkpoints of another run, which go when this one begins, not when it restarts.
    shutil.copytree(tmp_path / 'whole', tmp_path / 'elastic')
    (tmp_path / 'elastic' / 'iter_9.pth').unlink()

    def kill_again(launcher):
        kill_one(launcher, tmp_path / 'elastic' / 'iter_9.pth')

    options = ('--work-dir', 'elastic', '--overwrite', *TWELVE)
    process = two('train', TINY_CONFIG, *options, restarts=1, meanwhile=kill_again)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'iter_9.pth, iteration 9' in process.stdout
    assert_same_weights(tmp_path / 'elastic', tmp_path / 'whole')


@pytest.mark.slow
def test_fsdp_trains_as_ddp_and_their_checkpoints_are_the_same(two, tmp_path):
    """Weights bit for bit, also where a run goes on from a checkpoint of the other strategy; and test.py reads them."""
    assert two('train', TINY_CONFIG, '--work-dir', 'ddp', *TWELVE).returncode == 0
    process = two('train', TINY_CONFIG, '--work-dir', 'fsdp', '--strategy', 'fsdp', *TWELVE)
    assert process.returncode == 0, process.stderr[-3000:]
    assert_same_weights(tmp_path / 'fsdp', tmp_path / 'ddp')
    for strategy, other in (('fsdp', 'ddp'), ('ddp', 'fsdp')):
        checkpoint = tmp_path / other / 'iter_9.pth'
        arguments = ['--work-dir', f'then_{strategy}', '--strategy', strategy, '--resume', checkpoint]
        process = two('train', TINY_CONFIG, *arguments, *TWELVE)
        assert process.returncode == 0, process.stderr[-3000:]
        assert 'iter_9.pth, iteration 9' in process.stdout
        assert_same_weights(tmp_path / f'then_{strategy}', tmp_path / 'ddp')
    assert two('test', TINY_CONFIG, tmp_path / 'fsdp' / 'iter_12.pth', '--work-dir', 'test').returncode == 0


@pytest.mark.slow
def test_fsdp_stops_at_a_loss_that_is_not_finite_with_the_last_checkpoint(two, tmp_path):
    """In one process of two, between two checkpoints, where nobody has all the weights."""
    config = tmp_path / 'spoilt.py'
    config.write_text(f"""
_base_ = {str(TINY_CONFIG)!r}
custom_imports = dict(imports=['mmseg_inceptionnext', 'process_hooks'], allow_failed_imports=False)
custom_hooks = [dict(type='StopOnNonFiniteLossHook'), dict(type='SpoilLossHook', rank=1, iteration=5)]
""")
    process = two('train', config, '--weights', 'none', '--work-dir', 'work', '--strategy', 'fsdp')
    assert process.returncode == 1
    assert re.search(
        r'error: the loss is not finite at iteration 5 .*; the last checkpoint is .*iter_3\.pth', process.stderr
    )


@pytest.mark.slow
def test_a_bad_validation_image_in_one_process_ends_the_validation_of_both_under_fsdp(two, mini_root, tmp_path):
    """Where a process that went on alone would wait for the other's weights for ever."""
    shutil.copytree(mini_root, tmp_path / 'data')
    first = min((tmp_path / 'data' / 'images' / 'validation').iterdir())
    first.write_bytes(first.read_bytes()[:200])
    options = ['--weights', 'none', '--work-dir', 'work', '--strategy', 'fsdp']
    process = two('train', TINY_CONFIG, *options, data_root=tmp_path / 'data')
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'No validation at iteration 6' in process.stdout and first.name in process.stdout


def test_a_restart_goes_on_from_checkpoints_of_this_run_only(tmp_path, monkeypatch):
    cfg = Config(dict(work_dir=str(tmp_path), launcher='pytorch'))
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text('of another run')

    def after(restarts: int, run: str, resume: str | bool) -> str | bool:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run)
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(restarts))
        monkeypatch.setenv('RANK', '0')
        return resume_if_restarted(cfg, TrainOptions(resume=resume)).resume

    assert after(1, 'a', False) is False  # it died before it came here
    assert after(0, 'a', 'a.pth') == 'a.pth'
    assert after(1, 'a', 'a.pth') == 'a.pth'
    pointer.write_text('of this run')
    os.utime(pointer, (0, 0))  # somebody has set the clock back
    assert after(2, 'a', 'a.pth') is True and after(2, 'a', False) is True
    assert after(1, 'b', False) is False


def test_what_mmengine_does_otherwise_under_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for options in (
        dict(clip_grad=dict(max_norm=1)),
        dict(constructor='X'),
        dict(paramwise_cfg=dict(flat_decay_mult=0)),
    ):
        with pytest.raises(UserError, match="strategy='fsdp'"):
            check_fsdp(Config(dict(launcher='pytorch', optim_wrapper=options)))
    with pytest.raises(UserError, match='not mpi'):
        monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
        check_fsdp(Config(dict(launcher='mpi', optim_wrapper={})))
    model = nn.ModuleDict({'block': nn.ModuleDict({'_fsdp_wrapped_module': nn.ModuleDict({'mlp': nn.Linear(1, 1)})})})
    with pytest.raises(UserError, match="'block.mlp' does not match under FSDP"):
        keys = dict(custom_keys={'mlp': {}, 'block.mlp': {}})
        ShardedStrategy.build_optim_wrapper(None, dict(paramwise_cfg=keys), model)


def test_several_processes_without_a_launcher_are_refused(tool_here, mini_root, monkeypatch):
    """They would write the same files."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'a')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert_user_error(tool_here('train', TINY_CONFIG, '--data-root', mini_root), 'add --launcher pytorch')


def test_fsdp_needs_several_processes(tool_here, mini_root):
    process = tool_here('train', TINY_CONFIG, '--data-root', mini_root, '--strategy', 'fsdp')
    assert_user_error(process, '--strategy fsdp divides the model among several processes', 'docs/scaling.md')


@pytest.mark.slow
def test_the_tables_of_the_documentation_are_what_the_script_prints(tool):
    process = tool('../benchmarks/scaling')
    assert process.returncode == 0, process.stderr
    rows = [line for line in process.stdout.splitlines() if line.startswith('|')]
    documented = (ROOT / 'docs' / 'scaling.md').read_text().splitlines()
    assert len(rows) == 22 and [row for row in rows if row not in documented] == []
