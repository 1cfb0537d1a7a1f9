"""A training run survives what happens to it: kills, signals, full disks, bad files, dead workers."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_CONFIG, assert_user_error

from mmseg_inceptionnext.checkpoints import read_checkpoint

ITERATIONS, INTERVAL = 12, 2


class Training:
    """``tools/train.py`` on the tiny config, as a process that can be hurt."""

    def __init__(self, work_dir: Path, data_root: Path):
        self.work_dir = work_dir
        self.command = [
            sys.executable, ROOT / 'tools' / 'train.py', TINY_CONFIG, '--work-dir', work_dir, '--data-root', data_root,
            '--seed', 5, '--weights', 'none', '--cfg-options', 'train_dataloader.num_workers=2',
            f'train_cfg.max_iters={ITERATIONS}', f'train_cfg.val_interval={ITERATIONS}',
            f'default_hooks.checkpoint.interval={INTERVAL}', 'default_hooks.logger.interval=1',
        ]  # fmt: skip

    def start(self, *arguments, **kwargs) -> subprocess.Popen:
        return subprocess.Popen(
            list(map(str, [*self.command, *arguments])), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS': '1'}, **kwargs,
        )  # fmt: skip

    def run(self, *arguments, **kwargs) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **kwargs)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def last(self) -> int:
        """The iteration of the last checkpoint."""
        pointer = self.work_dir / 'last_checkpoint'
        return int(re.search(r'iter_(\d+)', pointer.read_text())[1]) if pointer.is_file() else 0

    @property
    def partial_files(self) -> list[Path]:
        return list(self.work_dir.glob('.*.part*'))

    def weights(self) -> dict:
        return read_checkpoint(self.work_dir / f'iter_{ITERATIONS}.pth')['state_dict']


@pytest.fixture(scope='module')
def whole(tmp_path_factory, mini_root) -> Training:
    """A run that nothing happened to."""
    training = Training(tmp_path_factory.mktemp('whole') / 'work', mini_root)
    process = training.run()
    assert process.returncode == 0, process.stderr[-3000:]
    return training


@pytest.fixture
def training(tmp_path, mini_root) -> Training:
    return Training(tmp_path / 'work', mini_root)


def assert_ends_as(training: Training, whole: Training) -> None:
    ours, theirs = training.weights(), whole.weights()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert training.partial_files == []


def kill_at_random(training: Training, kills: int, seed: int) -> dict[str, int]:
    """Kill a run and resume it, again and again, until it has been killed so often; then let it finish.

    Every third time it is killed as soon as it has begun to write a checkpoint, else at any moment after its start.
    """
    rng, counts = random.Random(seed), dict(kills=0, during_writes=0, most_lost=0)
    seen = 0
    while counts['kills'] < kills:
        process = training.start('--resume')
        in_write, begin = counts['kills'] % 3 == 2, time.monotonic()
        pause = rng.uniform(1, 12)
        while process.poll() is None:
            partial = training.partial_files
            if in_write and partial or not in_write and time.monotonic() - begin > pause:
                os.killpg(process.pid, signal.SIGKILL)
                counts['kills'] += 1
                counts['during_writes'] += bool(partial and training.partial_files)
                break
            time.sleep(0.0005 if in_write else 0.01)
        out, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err[-3000:]
        done = max([0, *map(int, re.findall(r'Iter\(train\) +\[ *(\d+)/', out))])
        seen = max(seen, done)
        counts['most_lost'] = max(counts['most_lost'], seen - training.last)
        if process.returncode == 0:  # it was faster: once more from the beginning
            shutil.rmtree(training.work_dir)
            seen = 0
    process = training.run('--resume')
    assert process.returncode == 0, process.stderr[-3000:]
    return counts


@pytest.mark.parametrize('kills', [3, pytest.param(36, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_weights(training, whole, kills):
    counts = kill_at_random(training, kills, seed=0)
    print(counts)
    assert counts['during_writes'] >= kills // 6
    assert counts['most_lost'] <= INTERVAL
    assert_ends_as(training, whole)
