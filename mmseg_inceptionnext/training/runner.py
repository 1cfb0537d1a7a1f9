"""mmengine's runners, made to survive kills, signals, dead workers and full disks."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook, LoggerHook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, LOOPS, RUNNERS
from mmengine.runner import BaseLoop, FlexibleRunner, Runner, ValLoop
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.console import is_quiet, quieten, say
from mmseg_inceptionnext.data.faster_transforms import use_faster_transforms
from mmseg_inceptionnext.data.guard import CurrentFiles, guard_pipelines
from mmseg_inceptionnext.data.pipeline import read_images_safely
from mmseg_inceptionnext.device import shared_memory
from mmseg_inceptionnext.distributed import any_rank
from mmseg_inceptionnext.errors import BadSample, MissingPackage, UserError, first_sentence, one_line
from mmseg_inceptionnext.files import atomic_write, system_fault
from mmseg_inceptionnext.labels import check_same_classes
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import load_for_finetuning
from mmseg_inceptionnext.training.faster_steps import speed_up_steps
from mmseg_inceptionnext.training.follow_config import differences, follow_config, settings_of
from mmseg_inceptionnext.training.hooks.checkpoint import SafeCheckpointHook
from mmseg_inceptionnext.training.hooks.early_stopping import ResumableEarlyStoppingHook  # noqa: F401  registers
from mmseg_inceptionnext.training.hooks.progress import ProgressHook
from mmseg_inceptionnext.training.hooks.repeat_validation import RepeatValidationHook
from mmseg_inceptionnext.training.hooks.same_size import SameSizeHook
from mmseg_inceptionnext.training.hooks.stop_on_signal import StopOnSignalHook
from mmseg_inceptionnext.training.signals import (
    Interrupted,
    StopSignal,
    disable_sigchld_handler,
    ignore_signals_in_worker,
)
from mmseg_inceptionnext.training.workers import Workers, exit_where_a_batch_is_lost, share_temporary_folder

# What takes the place of mmengine's hooks.
_OUR_HOOKS = {CheckpointHook: 'SafeCheckpointHook', EarlyStoppingHook: 'ResumableEarlyStoppingHook'}


_LITTLE_SHARED_MEMORY = 2**20

# Packages that mmengine's backends import when a run starts, and do not require.
_PACKAGES_OF_BACKENDS = {
    'AimVisBackend': 'aim',
    'ClearMLVisBackend': 'clearml',
    'DVCLiveVisBackend': 'dvclive',
    'MLflowVisBackend': 'mlflow',
    'NeptuneVisBackend': 'neptune',
    'TensorboardVisBackend': 'tensorboard',
    'WandbVisBackend': 'wandb',
}


def check_backends(visualizer: dict | Visualizer | None) -> None:
    """Check that the packages of a visualizer's backends are installed.

    Raises:
        UserError: One is not.
    """
    backends = visualizer.get('vis_backends') if isinstance(visualizer, dict) else None
    for backend in [backends] if isinstance(backends, dict) else backends or []:
        package = _PACKAGES_OF_BACKENDS.get(backend['type']) if isinstance(backend, dict) else None
        if package and find_spec(package) is None:
            raise MissingPackage(
                f'{backend["type"]} needs {package}: pip install {package}, or take it out of visualizer.vis_backends'
            )


class FaultTolerantMixin:
    """Makes one of mmengine's runners survive signals, bad files, dead workers, full disks.

    - Checkpoints are written atomically, and are on the disk before older ones are removed.
    - SIGTERM, SIGUSR1 and Ctrl-C stop a training between two iterations, with a checkpoint.
    - A file of the data set that cannot be used stops it in the same way and is named; with ``skip_bad_images`` in the
      config, training images that cannot be read are replaced by others. If a worker dies, its file is named.
    - A full disk costs logs and pictures, but does not stop the run.

    :class:`SafeCheckpointHook`, :class:`ResumableEarlyStoppingHook` and :class:`TolerantValLoop` replace mmengine's
    CheckpointHook, EarlyStoppingHook and ValLoop, even where the config does not name them; the saved config is not
    changed. A checkpoint that was saved just before a validation is resumed with that validation.

    Attributes:
        stop_signal: The signal that this process has received.
        stopped_by (str | None): The signal that has stopped the training early, if one has.
        resumed_from (str | None): Path of the checkpoint that the run resumes from.
        skipped_images (Path): File that lists the training images that were replaced, a line each time.
    """

    def __init__(self, *args, **kwargs):
        self.stop_signal = StopSignal()
        self.stopped_by: str | None = None
        self._current_files: list[tuple[CurrentFiles, Workers]] = []
        super().__init__(*args, **kwargs)

    @property
    def resumed_from(self) -> str | None:
        return self._load_from if self._resume else None

    def resume_from(self, checkpoint: str) -> None:
        """Resume from a checkpoint when training starts; the saved config does not name it."""
        self._load_from, self._resume = checkpoint, True

    @property
    def skipped_images(self) -> Path:
        return Path(self.work_dir, 'skipped_images.txt')

    def train(self) -> nn.Module:
        """Run the training loop.

        Raises:
            UserError: A file of the data set cannot be used, a data-loading worker or another rank has died, or a batch
                norm has a single value.
        """
        super().dump_config()
        if isinstance(self.model, dict):  # FlexibleRunner would leave it to its strategy
            self.model = self.build_model(self.model)
        if self._load_from or self.cfg.get('finetune'):
            # All weights come from the checkpoint: pretrained ones need not be fetched only to be overwritten.
            model = self.model.module if is_model_wrapper(self.model) else self.model
            model.init_cfg = model.backbone.init_cfg = None
        speed_up_steps(self.model)
        try:
            with self.stop_signal, self.noticing_dead_ranks(), self.closing_progress():
                try:
                    return super().train()
                except Interrupted:  # here, where another signal does not end the process while it saves
                    self.stop_if_asked(self.iter)
                    self.call_hook('after_train')
                    self.call_hook('after_run')
                    return self.model
        except BadSample as error:
            # Data are fetched between iterations, by all ranks together: the weights are those of a complete iteration.
            kept = self.save_now(self.iter)
            raise UserError(f'{one_line(error)}; {kept}: fix it, then start again with resume=True') from error
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):  # torch's batch norms
                raise
            raise UserError(
                'a head pools the only image of a process to 1×1, which gives a batch norm no statistics: set '
                'train_dataloader.batch_size to 2 or more; with several GPUs (SyncBN), one image each is enough'
            ) from error

    def dump_config(self) -> None:
        """Do nothing when mmengine calls this: a test must not replace the config of the training in its work dir."""

    def test(self) -> dict:
        """Run the test loop.

        Raises:
            UserError: A data-loading worker, whose file is named, or another rank has died.
        """
        with self.naming_files_of_dead_workers(), self.noticing_dead_ranks(), self.closing_progress():
            return super().test()

    def stop_if_asked(self, iteration: int) -> None:
        """Save a checkpoint and stop the training loop if any rank has received a signal; all ranks call this together.

        Args:
            iteration: Number of iterations that are done.
        """
        if any_rank(bool(self.stop_signal.received)):
            received = self.stop_signal.received
            self.stopped_by = received.name if received else 'a signal to another process'
            self.logger.info(f'Asked to stop after iteration {iteration}; {self.save_now(iteration)}')
            self.train_loop.stop_training = True

    def save_now(self, iteration: int) -> str:
        """Save a checkpoint now, if there is a hook for it; return :attr:`last_checkpoint`."""
        if self.checkpoint_hook and iteration > 0:
            self.checkpoint_hook.save(self, iteration)
        return self.last_checkpoint

    @property
    def last_checkpoint(self) -> str:
        """A phrase for messages that names the last checkpoint."""
        path = self.checkpoint_hook and self.checkpoint_hook.last_ckpt
        return f'the last checkpoint is {path}' if path else 'there is no checkpoint of this run'

    @property
    def checkpoint_hook(self) -> SafeCheckpointHook | None:
        """The hook that saves the run's checkpoints, if there is one."""
        return next((hook for hook in self.hooks if isinstance(hook, SafeCheckpointHook)), None)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Save a checkpoint as mmengine does, but atomically.

        Raises:
            OSError: It cannot be written.
        """
        arguments = inspect.signature(super().save_checkpoint).bind(out_dir, filename, *args, **kwargs).arguments
        backend = get_file_backend(str(out_dir), backend_args=arguments.get('backend_args'))
        if not isinstance(backend, LocalBackend) or not is_main_process():
            # Object stores are atomic; and the other ranks write nothing, but may hold a shard of the weights.
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
        else:
            with atomic_write(Path(out_dir, filename), durable=True) as partial_file:
                super().save_checkpoint(str(out_dir), partial_file.name, *args, **kwargs)
            if self.cfg.filename and not Path(self.work_dir, Path(self.cfg.filename).name).exists():
                super().dump_config()  # somebody has removed the work dir

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Load weights, optimizer, schedulers and message hub from a checkpoint; rates and schedules are the config's.

        Raises:
            UserError: What it holds besides weights is damaged.
        """
        HistoryBuffer()  # registers its statistics, which the first that a process creates does, not the first it reads
        settings = settings_of(self.optim_wrapper, self.param_schedulers)
        try:
            super().resume(filename, *args, **kwargs)
            saved = read_checkpoint(filename, mmap=True)
            check_same_classes(saved, filename, self.train_dataloader.dataset.metainfo['classes'])
            if settings is not None:
                states = saved.get('param_schedulers', [])
                follow_config(self.optim_wrapper, self.param_schedulers, settings, self.iter, states)
        except UserError:
            raise
        except Exception as error:  # what is in a file can be anything
            reason = f'{type(error).__name__}: {first_sentence(error)}'
            raise UserError(f'{filename} cannot be resumed ({reason}): start anew, or from another one') from error
        say(f'Resumed from {filename}, iteration {self.iter}')
        if text := differences(self.cfg, saved):
            say(text)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.stream.reconfigure(encoding='utf-8', errors='backslashreplace')  # whatever the locale
        if is_quiet():
            quieten(logger)
        return logger

    def load_or_resume(self) -> None:
        """Load the checkpoint to resume from, or ``finetune`` of the config."""
        super().load_or_resume()
        if self.cfg.get('finetune') and not self._resume:
            say(load_for_finetuning(self.model, self.cfg.finetune, self.train_dataloader.dataset.metainfo['classes']))

    def build_model(self, model: dict | nn.Module) -> nn.Module:
        return model if isinstance(model, nn.Module) else build_segmentor(self.cfg)

    def build_dataloader(self, dataloader: dict | DataLoader, *args, **kwargs) -> DataLoader:
        """Build the data loader; its data set names its files on failure, its workers ignore signals."""
        training = dataloader is self._train_dataloader
        if isinstance(dataloader, dict):
            dataloader = copy.deepcopy(dataloader)
            read_images_safely(dataloader)
            use_faster_transforms(dataloader)
            if not dataloader.get('num_workers'):
                # torch refuses what is about workers, which the recipes set, where there are none.
                for key in ('persistent_workers', 'prefetch_factor', 'multiprocessing_context'):
                    dataloader.pop(key, None)
        loader = super().build_dataloader(dataloader, *args, **kwargs)
        workers = Workers.of(loader)
        workers.check_limits()
        if loader.num_workers:
            share_temporary_folder()
            disable_sigchld_handler()
        current = CurrentFiles(loader.num_workers)
        self._current_files.append((current, workers))
        skip = training and self.cfg.get('skip_bad_images', False)
        guard_pipelines(loader.dataset, current, self.skipped_images if skip else None)
        loader.worker_init_fn = partial(_init_worker, current=current, workers=workers, then=loader.worker_init_fn)
        return loader

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the training loop; if one rank gets no data, all stop together."""
        with self.naming_files_of_dead_workers():  # mmengine 0.10.7 starts the workers here
            loop = super().build_train_loop(loop)
        if hasattr(loop, 'dataloader_iterator'):  # a loop over epochs takes the data loader itself
            loop.dataloader_iterator = _CommonBatches(loop.dataloader_iterator, self, Workers.of(loop.dataloader))
        return loop

    def build_visualizer(self, visualizer: dict | Visualizer | None = None) -> Visualizer:
        """Build mmengine's under the run's own name: under a fixed one, the next run in this process would get it.

        Raises:
            UserError: A package that one of its backends needs is not installed.
        """
        check_backends(visualizer)
        if isinstance(visualizer, dict):
            visualizer = {key: value for key, value in visualizer.items() if key != 'name'}
        return super().build_visualizer(visualizer)

    def build_val_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        if isinstance(loop, dict) and LOOPS.get(loop.get('type', 'ValLoop')) is ValLoop:
            loop = dict(loop, type='TolerantValLoop')
        return super().build_val_loop(loop)

    def register_hook(self, hook: dict | Hook, *args, **kwargs) -> None:
        if isinstance(hook, dict) and (ours := _OUR_HOOKS.get(HOOKS.get(hook['type']))):
            hook = dict(hook, type=ours)
        super().register_hook(hook, *args, **kwargs)

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        self.register_hook(StopOnSignalHook())
        self.register_hook(RepeatValidationHook())
        self.register_hook(SameSizeHook())
        if is_quiet():
            logger = (self.cfg.get('default_hooks') or {}).get('logger') or {}
            self.register_hook(ProgressHook(logger.get('interval', 50)))

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call a method of every hook; in training, one that cannot write or read a file is logged and skipped."""
        for hook in self.hooks:
            if fn_name == 'after_test_epoch' and isinstance(hook, LoggerHook) and not is_main_process():
                continue  # every rank would write the same file
            try:
                if hasattr(hook, fn_name):
                    getattr(hook, fn_name)(self, **kwargs)
            except OSError as error:
                if not (fault := system_fault(error)) or 'test' in fn_name:
                    raise
                self.logger.error(f'{type(hook).__name__} fails on {fault}')

    @contextmanager
    def closing_progress(self) -> Iterator[None]:
        """Stop the progress bar on every way out: it has hidden the terminal's cursor."""
        try:
            yield
        finally:
            for hook in self.hooks:
                if isinstance(hook, ProgressHook):
                    hook.stop_bar()

    @contextmanager
    def noticing_dead_ranks(self) -> Iterator[None]:
        """Turn the failure to communicate with another rank into a UserError; gloo raises a plain RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and 'gloo' not in str(error):
                raise
            raise UserError(
                f'process {self.rank} of {self.world_size} lost the connection to another, which says why '
                f'({first_sentence(error)}); {self.last_checkpoint}: start again with resume=True'
            ) from error

    @contextmanager
    def naming_files_of_dead_workers(self) -> Iterator[None]:
        """Turn the death of a data-loading worker, of which torch gives the process id, into a BadSample."""
        try:
            yield
        except RuntimeError as error:
            dead = re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)', str(error))
            if faults := [fault for _, workers in self._current_files if (fault := workers.fault(error))]:
                raise BadSample(faults[0]) from error
            if dead is None:
                raise
            pids = list(map(int, dead[1].split(', ')))
            if reasons := [r for pid in pids for current, _ in self._current_files if (r := current.failure_of(pid))]:
                raise BadSample(f'a data-loading worker cannot hand over a batch: {reasons[0]}') from error
            if shared_memory().free < _LITTLE_SHARED_MEMORY:  # a worker that writes into it is killed
                raise BadSample(self._current_files[-1][1].full()) from error
            files = {current.files_of(pid) for pid in pids for current, _ in self._current_files} - {None}
            raise BadSample(
                f'a data-loading worker {dead[2].strip(" .")}, on {", ".join(files) or "no file yet"}: it may have run '
                'out of memory (use fewer workers), or the file is corrupt'
            ) from error


@RUNNERS.register_module()
class SafeRunner(FaultTolerantMixin, Runner):
    """mmengine's Runner, see :class:`FaultTolerantMixin`."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model as mmengine does, on CPUs too, for which it has no default."""
        if self.distributed and get_device() == 'cpu':
            model_wrapper_cfg = {
                'type': 'MMDistributedDataParallel',
                'broadcast_buffers': False,
                'find_unused_parameters': self.cfg.get('find_unused_parameters', False),
                **(model_wrapper_cfg or {}),
                'device_ids': None,
            }
        return super().wrap_model(model_wrapper_cfg, model)


@RUNNERS.register_module()
class SafeFlexibleRunner(FaultTolerantMixin, FlexibleRunner):
    """mmengine's FlexibleRunner, which hands model and optimizer to a strategy; see :class:`FaultTolerantMixin`."""


class _CommonBatches:
    """An iterator over batches that fails on all ranks if it fails on one."""

    def __init__(self, batches: Iterator, runner: FaultTolerantMixin, workers: Workers):
        self.batches, self.runner, self._workers, self._is_first = batches, runner, workers, True

    def __next__(self):
        failure = batch = None
        try:
            with self.runner.naming_files_of_dead_workers(), self.runner.stop_signal.while_waiting():
                batch = next(self.batches)
        except (BadSample, Interrupted) as error:
            failure = error
        if any_rank(failure is not None):
            if any_rank(isinstance(failure, Interrupted)):
                raise Interrupted from failure
            raise failure or BadSample('another process of the run cannot go on')
        if self._is_first and (warning := self._workers.warning(batch)):
            self.runner.logger.warning(warning)
        self._is_first = False
        return batch

    def __getattr__(self, name: str):
        return getattr(self.batches, name)


def _init_worker(worker_id: int, current: CurrentFiles, workers: Workers, then: Callable | None) -> None:
    ignore_signals_in_worker()
    exit_where_a_batch_is_lost(current, workers)
    if then is not None:
        then(worker_id)
