"""mmengine's Runner for days on shared machines: whole checkpoints, signals, workers that die, disks that are full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook
from mmengine.runner import BaseLoop, FlexibleRunner, Runner
from mmseg.registry import RUNNERS
from torch import nn
from torch.utils.data import DataLoader

from mmseg_inceptionnext.data.guard import CurrentFiles, guard
from mmseg_inceptionnext.errors import BadSample, UserError, one_line, summary
from mmseg_inceptionnext.files import FULL_DISK, whole_file
from mmseg_inceptionnext.training.checkpoint_hook import SafeCheckpointHook
from mmseg_inceptionnext.training.stop_signal import (
    StopOnSignalHook,
    StopSignal,
    any_process,
    notice_dead_workers_later,
    outlive_signals,
)


class Safety:
    """What makes one of mmengine's runners lose nothing that it has computed.

    - A checkpoint is written beside its place, flushed to the disk, and renamed.
    - SIGTERM, SIGUSR1 and Ctrl-C end a training between two iterations, with a checkpoint.
    - A file of the data set that cannot be used ends it in the same way and is named; with ``skip_bad_images`` in the
      config, training images that cannot be read are replaced by others. Of a worker that dies, the file is named.
    - A full disk costs logs and pictures, and not the run.

    Attributes:
        stop_signal: What this process has received.
        stopped_by (str | None): What has ended the training early, if that was a signal.
        resumed_from (str | None): The checkpoint that it goes on from.
        skipped_images (Path): Names the training images that were replaced, a line each time.
    """

    def __init__(self, *args, **kwargs):
        self.stop_signal = StopSignal()
        self.stopped_by: str | None = None
        self._current_files: list[CurrentFiles] = []
        super().__init__(*args, **kwargs)

    @property
    def resumed_from(self) -> str | None:
        return self._load_from if self._resume else None

    def go_on_from(self, checkpoint: str) -> None:
        """Resume from a checkpoint when the training begins; the config, which outlives the run, says nothing of it."""
        self._load_from, self._resume = checkpoint, True

    @property
    def skipped_images(self) -> Path:
        return Path(self.work_dir, 'skipped_images.txt')

    def train(self) -> nn.Module:
        """Run the training loop.

        Raises:
            UserError: a file of the data set cannot be used, a data-loading worker has died, or another process of the
                run; or a batch norm has a single value.
        """
        try:
            with self.stop_signal, self.noticing_dead_processes():
                return super().train()
        except BadSample as error:
            # Data are fetched between iterations, by all processes together: the weights are those of a whole one.
            kept = self.save_now(self.iter)
            raise UserError(f'{one_line(error)}; {kept}: mend that, then --resume') from error
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):  # torch's batch norms
                raise
            raise UserError(
                'a head pools the one image of a process to 1×1, of which a batch norm has no statistics: '
                'set train_dataloader.batch_size to 2 or more; several GPUs (SyncBN) can do with one image each'
            ) from error

    def test(self) -> dict:
        """Run the test loop; a data-loading worker that dies is a UserError that names its file."""
        with self.naming_files_of_dead_workers(), self.noticing_dead_processes():
            return super().test()

    def stop_if_asked(self, iteration: int) -> None:
        """Save a checkpoint and end the training loop if a signal asks any process to; all call this together.

        Args:
            iteration: How many are done.
        """
        if any_process(bool(self.stop_signal.received)):
            received = self.stop_signal.received
            self.stopped_by = received.name if received else 'a signal to another process'
            self.logger.info(f'Asked to stop after iteration {iteration}; {self.save_now(iteration)}')
            self.train_loop.stop_training = True

    def save_now(self, iteration: int) -> str:
        """Save a checkpoint outside the intervals, if there is a hook that saves them; say which is the last."""
        if self._checkpoint_hook and iteration > 0:
            self._checkpoint_hook.save(self, iteration)
        return self.last_checkpoint

    @property
    def last_checkpoint(self) -> str:
        """Which it is, in words."""
        path = self._checkpoint_hook and self._checkpoint_hook.last_ckpt
        return f'the last checkpoint is {path}' if path else 'there is no checkpoint of this run'

    @property
    def _checkpoint_hook(self) -> SafeCheckpointHook | None:
        return next((hook for hook in self.hooks if isinstance(hook, SafeCheckpointHook)), None)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """mmengine's, whose file is whole on the disk, or not there.

        Raises:
            OSError: it cannot be written.
        """
        if '://' in str(out_dir) or not is_main_process():
            # A store puts whole objects; and the other processes write nothing, but may hold parts of the weights.
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
        else:
            with whole_file(Path(out_dir, filename), durable=True) as partial_file:
                super().save_checkpoint(str(out_dir), partial_file.name, *args, **kwargs)

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: what it holds besides weights is damaged.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # what is in a file can be anything
            reason = f'{type(error).__name__}: {summary(error)}'
            raise UserError(f'{filename} cannot be resumed ({reason}): start anew, or from another') from error

    def build_dataloader(self, dataloader: dict | DataLoader, *args, **kwargs) -> DataLoader:
        """mmengine's, whose data set names its files on failure, and whose workers leave signals to this process."""
        training = dataloader is self._train_dataloader
        loader = super().build_dataloader(dataloader, *args, **kwargs)
        current = CurrentFiles(loader.num_workers)
        self._current_files.append(current)
        skip = training and self.cfg.get('skip_bad_images', False)
        guard(loader.dataset, current, self.skipped_images if skip else None)
        loader.worker_init_fn = partial(_init_worker, then=loader.worker_init_fn)
        return loader

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """mmengine's, whose processes stop together where one of them has no data."""
        loop = super().build_train_loop(loop)
        notice_dead_workers_later()  # mmengine 0.10.7 has started them here
        loop.dataloader_iterator = _CommonBatches(loop.dataloader_iterator, self)
        return loop

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        self.register_hook(StopOnSignalHook())

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call a method of every hook; while it trains, one that finds the disk full is reported and passed over."""
        for hook in self.hooks:
            if fn_name == 'after_test_epoch' and isinstance(hook, LoggerHook) and not is_main_process():
                continue  # every process would write the same file
            try:
                if hasattr(hook, fn_name):
                    getattr(hook, fn_name)(self, **kwargs)
            except OSError as error:
                if error.errno not in FULL_DISK or 'test' in fn_name:
                    raise
                self.logger.error(f'{type(hook).__name__} cannot write: {error.strerror}')

    @contextmanager
    def noticing_dead_processes(self) -> Iterator[None]:
        """What waits for another process of the run fails when that ends; gloo has no exception of its own for it."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and 'gloo' not in str(error):
                raise
            raise UserError(
                f'process {self.rank} of {self.world_size} has lost another one, whose message says why '
                f'({summary(error)}); {self.last_checkpoint}: start again with --resume'
            ) from error

    @contextmanager
    def naming_files_of_dead_workers(self) -> Iterator[None]:
        """torch says which process has died, and of what."""
        try:
            yield
        except RuntimeError as error:
            dead = re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)', str(error))
            if dead is None:
                raise
            files = {current.of(int(pid)) for pid in dead[1].split(', ') for current in self._current_files} - {None}
            raise BadSample(
                f'a data-loading worker {dead[2].strip(" .")}, on {", ".join(files) or "no file yet"}: it may have run '
                'out of memory (fewer workers need less), or the file is bad'
            ) from error


@RUNNERS.register_module()
class SafeRunner(Safety, Runner):
    """mmengine's Runner, see :class:`Safety`."""


@RUNNERS.register_module()
class SafeFlexibleRunner(Safety, FlexibleRunner):
    """mmengine's FlexibleRunner, which leaves models and optimizers to a strategy; see :class:`Safety`."""


class _CommonBatches:
    """An iterator over batches that fails in all processes of a run if it fails in one."""

    def __init__(self, batches: Iterator, runner: Safety):
        self.batches, self.runner = batches, runner

    def __next__(self):
        failure = batch = None
        try:
            with self.runner.naming_files_of_dead_workers():
                batch = next(self.batches)
        except BadSample as error:
            failure = error
        if any_process(failure is not None):
            raise failure or BadSample('another process of the run cannot go on')
        return batch

    def __getattr__(self, name: str):
        return getattr(self.batches, name)


def _init_worker(worker_id: int, then) -> None:
    outlive_signals()
    if then is not None:
        then(worker_id)
