"""A training run survives what happens to it: kills, signals, full disks, bad files, dead workers."""

import errno
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmseg.registry import DATASETS, HOOKS, TRANSFORMS
from PIL import Image
from support import ROOT, TINY_CONFIG, assert_user_error, variant
from torch.utils.data import get_worker_info

from mmseg_inceptionnext import SafeCheckpointHook, SafeRunner, TolerantValLoop, UserError, files
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config import set_data_root
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.resume import find_resume_point
from mmseg_inceptionnext.training.train import run_result, train

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

    Every second time it is killed as soon as it has begun to write a checkpoint, else at any moment after its start.
    """
    rng, counts = random.Random(seed), dict(kills=0, during_writes=0, most_lost=0)
    seen = 0
    while counts['kills'] < kills:
        process = training.start('--resume')
        in_write, begin = counts['kills'] % 2 == 1, time.monotonic()
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


@pytest.mark.slow
@pytest.mark.parametrize('kills', [1, 36])
def test_killed_at_random_moments_it_ends_with_the_same_weights(training, whole, kills):
    counts = kill_at_random(training, kills, seed=0)
    print(counts)
    assert counts['during_writes'] >= kills // 3
    assert counts['most_lost'] <= INTERVAL
    assert_ends_as(training, whole)


def signalled(training: Training, *signals: signal.Signals, group: bool = False) -> subprocess.CompletedProcess:
    """Send signals to a run, or to its workers, too, while it trains."""
    process = training.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(r'Iter\(train\) +\[ *3/', line):
            for number in signals:
                os.killpg(process.pid, number) if group else process.send_signal(number)
                time.sleep(0.05)
    _, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, ''.join(lines), err)


@pytest.mark.parametrize(
    ('number', 'group'),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(training, whole, number, group):
    process = signalled(training, number, group=group)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'Traceback' not in process.stderr and f'{number.name}: saving a checkpoint' in process.stderr
    stopped, command = process.stdout.strip().splitlines()[-1].split('. Go on: ')
    assert stopped == f'Stopped by {number.name} after iteration {training.last}' and 3 <= training.last < 6
    assert command.startswith('python ') and command.endswith(' --resume')

    process = training.run('--resume')
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'Iter(train) [ 2/' not in process.stdout
    assert_ends_as(training, whole)
    assert sorted(training.work_dir.glob('iter_*.pth')) == [training.work_dir / f'iter_{i}.pth' for i in (10, 12)]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(training, whole):
    python, *command = training.command
    training.command = [python, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, *command]
    process = training.start('--launcher', 'pytorch')
    sent = False
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not sent and re.search(r'Iter\(train\) +\[ *3/', line):
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            os.kill(int(children[-1]), signal.SIGUSR1)
            sent = True
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert 'Stopped by' in ''.join(lines) and 3 <= training.last < 6
    assert read_checkpoint(training.work_dir / f'iter_{training.last}.pth')['meta']['iter'] == training.last


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(training):
    process = signalled(training, signal.SIGINT, signal.SIGINT)
    assert 'Ctrl-C again stops at once' in process.stderr
    # The first one may have ended the run already, if it came while data were awaited.
    assert process.returncode == -signal.SIGINT or 'Stopped by SIGINT' in process.stdout


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == 'truncated':
        path.write_bytes(content[: len(content) // 2])
    elif how == 'flipped':
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif how == 'foreign':
        torch.save({'state_dict': {'a': torch.zeros(1)}}, path)
    elif how == 'empty':
        path.write_bytes(b'')


_SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ('flipped', 'truncated', 'foreign')]


@pytest.mark.parametrize('how', ['empty', *_SLOW])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tiny_cfg, how):
    """And the run ends with the same weights."""
    tiny_cfg.default_hooks.checkpoint.update(interval=1)
    work_dir = Path(tiny_cfg.work_dir)
    whole = train(deepcopy(tiny_cfg), TrainOptions(seed=5)).model.state_dict()
    damage(work_dir / 'iter_6.pth', how)
    damage(work_dir / 'last_checkpoint', 'empty' if how == 'empty' else '')
    runner = train(deepcopy(tiny_cfg), TrainOptions(resume=True))
    log = (Path(runner.log_dir) / f'{runner.timestamp}.log').read_text()
    assert re.search(r'iter_6\.pth .*resuming from .*iter_5\.pth: 1 iterations are lost', log, re.DOTALL)
    assert 'Iter(train) [6/6]' in log and 'Iter(train) [5/6]' not in log
    assert [key for key in whole if not torch.equal(whole[key], runner.model.state_dict()[key])] == []


@pytest.mark.slow
def test_damaged_checkpoints_alone_do_not_start_a_new_run(tiny_cfg):
    train(deepcopy(tiny_cfg), TrainOptions(seed=5))
    work_dir = Path(tiny_cfg.work_dir)
    for path in work_dir.glob('iter_*.pth'):
        damage(path, 'truncated')
    with pytest.raises(UserError, match=r'iter_6\.pth is truncated.*; .*iter_3\.pth is truncated'):
        train(deepcopy(tiny_cfg), TrainOptions(resume=True))


@pytest.mark.parametrize('pointer', [b'\xff\0\xfe', b'/tmp', b'x' * 5000, b'/another/machine/iter_99.pth'], ids=len)
def test_a_damaged_pointer_hides_no_checkpoint(tiny_cfg, trained, pointer):
    work_dir = Path(tiny_cfg.work_dir)
    shutil.copy(trained, work_dir / 'iter_3.pth')
    (work_dir / 'last_checkpoint').write_bytes(pointer)
    point = find_resume_point(tiny_cfg)
    assert point.path == work_dir / 'iter_3.pth' and 'which is not there' in point.warnings[0]


def test_an_empty_name_is_no_reason_to_start_anew(tiny_cfg):
    with pytest.raises(UserError, match="resume='' names no checkpoint"):
        train(tiny_cfg, TrainOptions(resume=''))


@pytest.mark.slow
def test_configs_of_other_origin_get_the_same_protection(tiny_cfg):
    tiny_cfg.default_hooks.checkpoint.type = 'mmengine.CheckpointHook'
    tiny_cfg.val_cfg = dict(type='mmengine.ValLoop')
    runner = train(variant(tiny_cfg, tiny_cfg.work_dir, **{'train_cfg.max_iters': 1}), TrainOptions(seed=5))
    assert any(isinstance(hook, SafeCheckpointHook) for hook in runner.hooks)
    assert isinstance(runner.val_loop, TolerantValLoop)
    del tiny_cfg.default_hooks.checkpoint
    options = TrainOptions(seed=5, overwrite=True)
    runner = train(variant(tiny_cfg, tiny_cfg.work_dir, **{'train_cfg.max_iters': 1}), options)
    assert any(isinstance(hook, SafeCheckpointHook) for hook in runner.hooks)
    tiny_cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    with pytest.raises(UserError, match='counts epochs'):
        train(tiny_cfg, options)


@pytest.mark.slow
def test_a_bad_image_in_one_of_two_processes_costs_no_iteration(training, spoilt_root):
    for number in (1, 2, 3):
        spoil(spoilt_root, number)
    python, *command = training.command
    training.command = [python, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, *command]
    at = training.command.index('--data-root') + 1
    training.command[at] = spoilt_root
    shutil.copy(
        spoilt_root / 'images/training/ADE_train_00000004.jpg', spoilt_root / 'images/training/ADE_train_00000001.jpg'
    )
    shutil.copy(
        spoilt_root / 'images/training/ADE_train_00000004.jpg', spoilt_root / 'images/training/ADE_train_00000002.jpg'
    )
    process = training.run('--launcher', 'pytorch')
    assert process.returncode == 1  # torchrun's
    named = re.search(
        r'ADE_train_00000003\.jpg: .*truncated.*; (?:the last checkpoint is (\S+):|there is no)', process.stderr
    )
    assert named and (named[1] is None or Path(named[1]).is_file())
    assert 'RuntimeError' not in process.stderr


@pytest.mark.slow
def test_a_named_checkpoint_that_is_damaged_is_not_replaced_but_the_one_before_is_named(tiny_cfg):
    train(deepcopy(tiny_cfg), TrainOptions(seed=5))
    damage(Path(tiny_cfg.work_dir, 'iter_6.pth'), 'truncated')
    with pytest.raises(UserError, match=r"iter_6\.pth is truncated.*try resume=.*iter_3\.pth', the one before"):
        train(deepcopy(tiny_cfg), TrainOptions(resume=str(Path(tiny_cfg.work_dir, 'iter_6.pth'))))


@pytest.mark.slow
def test_what_does_not_fit_the_optimizer_is_not_resumed(tiny_cfg):
    train(variant(tiny_cfg, tiny_cfg.work_dir), TrainOptions(seed=5))
    path = Path(tiny_cfg.work_dir, 'iter_6.pth')
    content = read_checkpoint(path)
    content['optimizer']['state'][0]['exp_avg'] = torch.zeros(7)
    torch.save(content, path)
    with pytest.raises(UserError, match=r'iter_6\.pth cannot be resumed, its optimizer does not fit'):
        train(deepcopy(tiny_cfg), TrainOptions(resume=str(path)))


@pytest.mark.slow
def test_a_checkpoint_cannot_have_other_files_removed(tiny_cfg, tmp_path):
    """It says which checkpoints a better or newer one replaces."""
    train(variant(tiny_cfg, tiny_cfg.work_dir, **{'train_cfg.max_iters': 2}), TrainOptions(seed=5))
    path = Path(tiny_cfg.work_dir, 'iter_2.pth')
    content = read_checkpoint(path)
    (tmp_path / 'precious.pth').touch()
    info = content['message_hub']['runtime_info']
    info.update(best_ckpt=str(tmp_path / 'precious.pth'), best_score=-1.0, keep_ckpt_ids=['/../../precious', 1, 2])
    torch.save(content, path)
    assert train(variant(tiny_cfg, tiny_cfg.work_dir), TrainOptions(resume=True)).iter == 6
    assert (tmp_path / 'precious.pth').exists()
    assert Path(tiny_cfg.work_dir, 'best_mIoU_iter_6.pth').exists()


@pytest.mark.parametrize(
    ('key', 'value'), [('iter', -1), ('iter', 10**30), ('iter', None), ('seed', 'x'), ('epoch', 1.5)]
)
def test_absurd_positions_are_not_resumed(tiny_cfg, trained, tmp_path, key, value):
    content = read_checkpoint(trained)
    content['meta'][key] = value
    torch.save(content, tmp_path / 'iter_3.pth')
    with pytest.raises(UserError, match='iter_3.pth (cannot be resumed|is of iteration 10+, past)'):
        train(tiny_cfg, TrainOptions(resume=str(tmp_path / 'iter_3.pth')))


class FullDisk:
    """The disk has no room for files named so, for some attempts."""

    def __init__(self, monkeypatch, suffix: str, attempts: int):
        self.attempts, sync = attempts, files.fsync

        def full(path: Path) -> None:
            if path.name.endswith(suffix) and self.attempts:
                self.attempts -= 1
                raise OSError(errno.ENOSPC, 'No space left on device', str(path))
            sync(path)

        monkeypatch.setattr(files, 'fsync', full)


def test_a_full_disk_keeps_the_checkpoint_before_and_tries_again(tiny_cfg, monkeypatch):
    tiny_cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    work_dir = Path(tiny_cfg.work_dir)
    there = []
    monkeypatch.setattr(
        SafeCheckpointHook, 'before_train_iter',
        lambda *_, **__: there.append(sorted(path.name for path in work_dir.glob('iter_*.pth'))), raising=False,
    )  # fmt: skip
    train(variant(tiny_cfg, work_dir, **{'train_cfg.max_iters': 2}), TrainOptions(seed=5))
    FullDisk(monkeypatch, '.part.pth', attempts=2)
    runner = train(tiny_cfg, TrainOptions(resume=True))
    assert there[2:] == [['iter_2.pth'], ['iter_2.pth'], ['iter_2.pth'], ['iter_5.pth']]
    log = (Path(runner.log_dir) / f'{runner.timestamp}.log').read_text()
    assert log.count('cannot be written (No space left on device); the last checkpoint is') == 2
    assert [path.name for path in work_dir.glob('iter_*.pth')] == ['iter_6.pth']
    assert list(work_dir.glob('.*.part*')) == []


@pytest.mark.slow
def test_a_disk_that_stays_full_is_an_error_that_keeps_what_there_is(tiny_cfg, monkeypatch):
    tiny_cfg.default_hooks.checkpoint.update(interval=1)
    train(variant(tiny_cfg, tiny_cfg.work_dir, **{'train_cfg.max_iters': 2}), TrainOptions(seed=5))
    FullDisk(monkeypatch, '.part.pth', attempts=100)
    with pytest.raises(UserError, match=r'the last iterations are lost: .*the last checkpoint is .*iter_2\.pth'):
        train(variant(tiny_cfg, tiny_cfg.work_dir), TrainOptions(resume=True))
    monkeypatch.undo()
    assert train(variant(tiny_cfg, tiny_cfg.work_dir), TrainOptions(resume=True)).iter == 6


def test_the_previous_best_checkpoint_goes_when_the_new_one_is_there(tiny_cfg, monkeypatch):
    runner = train(tiny_cfg, TrainOptions(seed=5))
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook))
    work_dir, hub = Path(tiny_cfg.work_dir), runner.message_hub
    runner.train_loop._iter = 8
    with monkeypatch.context() as patch:
        FullDisk(patch, '.part.pth', attempts=1)
        hook._save_best_checkpoint(runner, {'mIoU': 50.0})
    assert hub.get_info('best_score') < 50 and hub.get_info('best_ckpt') == hook.best_ckpt_path
    assert [path.name for path in work_dir.glob('best*')] == ['best_mIoU_iter_6.pth']

    there, replace = [], os.replace
    monkeypatch.setattr(
        os, 'replace', lambda *paths: (there.append(sorted(p.name for p in work_dir.glob('best*'))), replace(*paths))
    )
    hook._save_best_checkpoint(runner, {'mIoU': 60.0})
    assert there[0] == ['best_mIoU_iter_6.pth'] and there[-1] == ['best_mIoU_iter_6.pth', 'best_mIoU_iter_8.pth']
    assert [path.name for path in work_dir.glob('best*')] == ['best_mIoU_iter_8.pth']
    assert read_checkpoint(work_dir / 'iter_8.pth')['message_hub']['runtime_info']['best_score'] == 60.0


@pytest.mark.slow
def test_a_disk_that_is_really_full_for_a_while(training, whole, tmp_path):
    """A small file system of its own, which the test fills to the last byte after a checkpoint and empties again."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['unshare', '--map-root-user', '--mount', 'bash', '-c']
    if not shutil.which('unshare') or subprocess.run([*mount, f'mount -t tmpfs none {folder}']).returncode:
        pytest.skip('this system lets no user mount a file system')
    training.work_dir = training.command[training.command.index('--work-dir') + 1] = folder / 'work'
    script = f"""
        mount -t tmpfs -o size=24m none {folder}
        {shlex.join(map(str, training.command))} & run=$!
        until [ -f {folder}/work/last_checkpoint ]; do sleep 0.01; done
        cat /dev/zero > {folder}/filler
        until grep -q 'cannot be written' {tmp_path}/out; do sleep 0.01; kill -0 $run || break; done
        sleep 1; rm {folder}/filler
        wait $run || exit; cp -r {folder}/work {tmp_path}/kept
    """
    with (tmp_path / 'out').open('w') as out:
        process = subprocess.run(
            [*mount, script],
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=120,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        )
    log = (tmp_path / 'out').read_text()
    assert process.returncode == 0, log[-3000:]
    assert 'cannot be written (No space left on device); the last checkpoint is' in log
    training.work_dir = tmp_path / 'kept'
    assert_ends_as(training, whole)


def spoil(root: Path, number: int, how: str = 'truncated', split: str = 'training') -> Path:
    """Damage an image of a data set."""
    (path,) = (root / 'images' / split).glob(f'*{number:08}.jpg')
    if how == 'truncated':
        path.write_bytes(path.read_bytes()[:-200])
    elif how == 'text':
        path.write_text('not an image')
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'bomb':
        Image.new('1', (20000, 20000)).save(path, 'png')
    elif how in ('thin', 'dot'):
        size = {'thin': (20000, 1), 'dot': (1, 1)}[how]
        Image.new('RGB', size).save(path)
        (annotation,) = (root / 'annotations' / split).glob(f'*{number:08}.png')
        Image.new('L', size, 1).save(annotation)
    return path


def disguise(path: Path, how: str) -> None:
    """Save an image as something that is unusual, and an image."""
    with Image.open(path) as image:
        if how == 'animated':
            image.save(path, 'webp', save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
        elif how == 'palette':
            image.convert('P').save(path, 'png')
        else:
            image.convert({'CMYK': 'CMYK', 'grey': 'L'}[how]).save(path, 'jpeg')


@pytest.fixture
def spoilt_root(mini_root, tmp_path) -> Path:
    return shutil.copytree(mini_root, tmp_path / 'data')


@pytest.mark.parametrize('how', ['truncated', 'text', 'empty', 'bomb', 'thin', 'dot'])
def test_a_bad_image_ends_the_run_with_its_name_and_a_checkpoint(tiny_cfg, spoilt_root, how):
    set_data_root(tiny_cfg, spoilt_root)
    path = spoil(spoilt_root, 3, how)
    with pytest.raises(UserError, match=rf'{path.stem}\..*(the last checkpoint is .*iter_\d|there is no checkpoint)'):
        train(tiny_cfg, TrainOptions(seed=4))


@pytest.mark.parametrize('how', ['animated', 'palette', 'CMYK', 'grey'])
def test_unusual_images_are_images(tiny_cfg, spoilt_root, how):
    set_data_root(tiny_cfg, spoilt_root)
    for path in (spoilt_root / 'images').rglob('*.jpg'):
        disguise(path, how)
    for split in ('train', 'test'):
        dataset = DATASETS.build(tiny_cfg[f'{split}_dataloader'].dataset)
        for i in range(len(dataset)):
            assert dataset[i]['inputs'].shape[0] == 3


def test_of_image_and_annotation_the_damaged_one_is_named(tiny_cfg, spoilt_root):
    set_data_root(tiny_cfg, spoilt_root)
    for path in (spoilt_root / 'annotations' / 'training').iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r'annotations/training/ADE_train_0000000\d\.png cannot be used') as caught:
        train(tiny_cfg, TrainOptions(seed=5))
    assert '.jpg' not in str(caught.value)


def test_a_bad_test_image_is_one_line(trained, spoilt_root, tool_here):
    path = spoil(spoilt_root, 2, split='validation')
    process = tool_here(
        'test', TINY_CONFIG, trained, '--data-root', spoilt_root, '--cfg-options', 'test_dataloader.num_workers=1'
    )
    assert_user_error(process, f'{path}: ', 'truncated')


@pytest.mark.slow
def test_a_bad_image_met_by_a_worker_costs_no_iteration(tiny_cfg, spoilt_root, mini_root, tmp_path):
    """The run goes on from where it was when the image is mended, to the same weights."""
    tiny_cfg.train_dataloader.num_workers = 1
    whole = train(variant(tiny_cfg, tmp_path / 'whole'), TrainOptions(seed=5)).model.state_dict()
    set_data_root(tiny_cfg, spoilt_root)
    path = spoil(spoilt_root, 3)
    with pytest.raises(UserError, match=rf'{path.name}: .*truncated.*; (.*iter_\d.*|.*no checkpoint.*)resume=True'):
        train(variant(tiny_cfg, tmp_path / 'parts'), TrainOptions(seed=5))
    shutil.copy(mini_root / path.relative_to(spoilt_root), path)
    resumed = train(variant(tiny_cfg, tmp_path / 'parts'), TrainOptions(seed=5, resume=True)).model.state_dict()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


@pytest.mark.slow
def test_bad_images_are_skipped_counted_and_the_run_stays_reproducible(tiny_cfg, spoilt_root, tmp_path):
    set_data_root(tiny_cfg, spoilt_root)
    bad = [spoil(spoilt_root, 2, 'text'), spoil(spoilt_root, 3)]
    workers = {'train_dataloader.num_workers': 2}
    runner = train(variant(tiny_cfg, tmp_path / 'whole', **workers), TrainOptions(seed=5, skip_bad_images=True))
    skipped = run_result(runner)['skipped']
    assert sorted(Path(line.split(': ')[0]).name for line in skipped) == [path.name for path in bad]
    assert sum(skipped.values()) >= 4
    part = {'train_cfg.max_iters': 3}
    train(variant(tiny_cfg, tmp_path / 'parts', **part), TrainOptions(seed=5, skip_bad_images=True))
    resumed = train(variant(tiny_cfg, tmp_path / 'parts', **workers), TrainOptions(resume=True, skip_bad_images=True))
    whole, ours = runner.model.state_dict(), resumed.model.state_dict()
    assert [key for key in whole if not torch.equal(whole[key], ours[key])] == []


@pytest.mark.slow
def test_a_folder_of_bad_images_alone_ends_the_run(tiny_cfg, spoilt_root):
    set_data_root(tiny_cfg, spoilt_root)
    for number in range(1, 5):
        spoil(spoilt_root, number, 'empty')
    with pytest.raises(UserError, match='50 files in a row cannot be read'):
        train(tiny_cfg, TrainOptions(seed=5, skip_bad_images=True))


@pytest.mark.slow
def test_a_bad_label_is_not_skipped(tiny_cfg, spoilt_root):
    set_data_root(tiny_cfg, spoilt_root)
    for path in (spoilt_root / 'annotations' / 'training').iterdir():
        Image.fromarray(np.full((96, 96), 200, np.uint8)).save(path)
    with pytest.raises(UserError, match='has label 200, outside 1 … 150'):
        train(tiny_cfg, TrainOptions(seed=5, skip_bad_images=True))


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_validation_that_fails_does_not_lose_the_run(tiny_cfg, spoilt_root, tmp_path, workers):
    """Nor does a later one, of the same workers, suffer from it."""
    tiny_cfg.train_cfg.val_interval = 2
    tiny_cfg.val_dataloader.update(num_workers=workers, persistent_workers=bool(workers))
    whole = train(variant(tiny_cfg, tmp_path / 'whole'), TrainOptions(seed=5)).model.state_dict()
    set_data_root(tiny_cfg, spoilt_root)
    path = spoil(spoilt_root, 2, split='validation')
    tiny_cfg.custom_hooks = [*tiny_cfg.custom_hooks, dict(type='MendHook', at=5, path=str(path))]
    runner = train(variant(tiny_cfg, tmp_path / 'spoilt'), TrainOptions(seed=5))
    end = run_result(runner)
    assert list(end['failed_validations']) == [2, 4]
    assert all(f'{path}: ' in reason and 'Traceback' not in reason for reason in end['failed_validations'].values())
    assert end['iteration'] == 6 and end['best'] is not None
    assert [key for key in whole if not torch.equal(whole[key], runner.model.state_dict()[key])] == []


@HOOKS.register_module()
class MendHook(Hook):
    """Replaces a damaged image before an iteration."""

    def __init__(self, at: int, path: str):
        self.at, self.path = at, path

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.at:
            Image.new('RGB', (96, 96)).save(self.path)


@TRANSFORMS.register_module()
class DieAt(BaseTransform):
    """The worker dies on a file, as if it had run out of memory."""

    def __init__(self, name: str):
        self.name = name

    def transform(self, results: dict) -> dict:
        if results['img_path'].endswith(self.name) and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return results


def test_of_a_worker_that_dies_the_file_is_named(tiny_cfg):
    tiny_cfg.train_dataloader.update(num_workers=2)
    tiny_cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='DieAt', name='ADE_train_00000003.jpg'))
    with pytest.raises(
        UserError, match=r'a data-loading worker .*, on .*_00000003\.jpg and .*_00000003\.png: .*resume=True'
    ):
        train(tiny_cfg, TrainOptions(seed=5))


@pytest.mark.slow
def test_a_worker_that_dies_in_validation_costs_that_validation(tiny_cfg):
    tiny_cfg.train_cfg.val_interval = 3
    tiny_cfg.val_dataloader.update(num_workers=1, persistent_workers=True)
    tiny_cfg.val_dataloader.dataset.pipeline.insert(0, dict(type='DieAt', name='ADE_val_00000002.jpg'))
    end = run_result(train(tiny_cfg, TrainOptions(seed=5)))
    assert end['done'] == 6 and list(end['failed_validations']) == [3, 6]
    assert all('ADE_val_00000002.jpg' in reason for reason in end['failed_validations'].values())


@pytest.mark.slow
def test_a_bug_in_a_pipeline_names_the_file_and_keeps_its_cause(tiny_cfg):
    del tiny_cfg.train_dataloader.dataset.pipeline[1]  # the image is never read
    with pytest.raises(RuntimeError, match=r'the pipeline failed on .*\.jpg and .*\.png') as caught:
        train(tiny_cfg, TrainOptions(seed=5))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.slow
def test_an_epoch_loop_from_code(tiny_cfg):
    """mmseg's tools run such configs, with our runner if they name it; ours count iterations."""
    tiny_cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
    tiny_cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    tiny_cfg.param_scheduler = [dict(type='PolyLR', by_epoch=True, end=2)]
    tiny_cfg.log_processor = dict(by_epoch=True)
    tiny_cfg.default_hooks.checkpoint.update(by_epoch=True, interval=1)
    tiny_cfg.model.backbone.init_cfg = None
    runner = SafeRunner.from_cfg(tiny_cfg)
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 4) and runner.val_loop.failures == {}
    assert read_checkpoint(Path(runner.work_dir, 'epoch_2.pth'))['meta']['epoch'] == 2
    tiny_cfg.train_cfg.max_epochs = 3
    resumed = SafeRunner.from_cfg(tiny_cfg)
    resumed.resume_from(str(Path(runner.work_dir, 'epoch_2.pth')))
    resumed.train()
    assert (resumed.epoch, resumed.iter) == (3, 6)
