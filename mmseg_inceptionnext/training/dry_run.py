"""Estimate the schedule and the cost of a training run from two iterations."""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmseg_inceptionnext.device import device_name, peak_memory_mb
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.training.batch import EffectiveBatch, effective_batch
from mmseg_inceptionnext.training.hooks.repeat_validation import has_missed_validation
from mmseg_inceptionnext.training.loops import validations_left
from mmseg_inceptionnext.training.runner import SafeRunner
from mmseg_inceptionnext.training.schedule import schedule_text


@dataclass(frozen=True)
class Plan:
    """A resolved schedule and its cost on this machine.

    Attributes:
        parameters: Number of parameters of the model.
        batch: Images in an optimizer step.
        iterations, done: Iterations of the whole run, and those that the resumed checkpoint has done.
        training_images, validation_images: Size of the data sets; None without validation.
        lr: Distinct learning rates of the parameter groups, before the schedule.
        schedule: Type and iterations of each parameter scheduler.
        validations: Validations that are left.
        seconds_per_iteration: Time of the second iteration, with its data; None if none is left.
        seconds_per_validation_image: Time of a validation image, after a warm-up.
        peak_memory_mb: Peak memory of the GPU, or of the process on a CPU, in MiB.
        device: Name of the device.
    """

    parameters: int
    batch: EffectiveBatch
    iterations: int
    done: int
    training_images: int
    validation_images: int | None
    lr: list[float]
    schedule: str
    validations: int
    seconds_per_iteration: float | None
    seconds_per_validation_image: float | None
    peak_memory_mb: float
    device: str

    @property
    def images_seen(self) -> int:
        return self.iterations * self.batch.per_iteration

    @property
    def seconds(self) -> float | None:
        """Seconds that the rest of the run takes; None if nothing is left."""
        if self.seconds_per_iteration is None:
            return None
        validation = self.validations * (self.validation_images or 0) * (self.seconds_per_validation_image or 0)
        return (self.iterations - self.done) * self.seconds_per_iteration + validation / self.batch.processes

    def __str__(self) -> str:
        lines = {
            'parameters': f'{self.parameters / 1e6:.1f} M',
            'effective batch': f'{self.batch} (processes × images × accumulation)',
            'iterations': f'{self.iterations}' + (f', {self.done} of them done' if self.done else ''),
            'images seen': f'{self.images_seen}, {self.images_seen / self.training_images:.1f} epochs of '
            f'{self.training_images}',
            'learning rate': ', '.join(f'{lr:g}' for lr in self.lr) + f'; {self.schedule}',
            'validation': f'{self.validations} times {self.validation_images} images'
            if self.validations
            else 'none',
            'device': self.device,
            'peak memory': f'{self.peak_memory_mb:.0f} MB',
        }  # fmt: skip
        if self.seconds is None:
            lines['time'] = 'nothing is left to train'
        else:
            parts = [f'{self.seconds_per_iteration:.2f} s an iteration']
            if self.seconds_per_validation_image is not None:
                parts.append(f'{self.seconds_per_validation_image:.2f} s a validation image')
            lines['time'] = f'about {timedelta(seconds=round(self.seconds))} ({", ".join(parts)})'
        text = '\n'.join(f'{key:<16} {value}' for key, value in lines.items())
        return text + (f'\nwarning: {self.batch.warning}' if self.batch.warning else '')


def dry_run(cfg: Config, make_runner: Callable[[Config], SafeRunner]) -> Plan:
    """Build all of a run, train two iterations and validate one batch twice, once each to warm up; keep nothing.

    Args:
        cfg: Config of the run; it stays as it is.
        make_runner: Function that builds the runner of a config.
    """
    cfg = copy.deepcopy(cfg)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='_StopwatchHook')]
    cfg.default_hooks.checkpoint = None
    cfg.log_level = 'WARNING'
    cfg.visualizer = dict(type=(cfg.get('visualizer') or {}).get('type', 'SegLocalVisualizer'))  # without backends
    has_validation = cfg.get('val_dataloader') is not None
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        # Not the runner's model: under FSDP a rank has only a shard.
        parameters = sum(p.numel() for p in build_segmentor(cfg).parameters())
        runner = make_runner(cfg)
        runner.train()
        if runner.stopped_by:
            raise KeyboardInterrupt
        hook = next(hook for hook in runner.hooks if isinstance(hook, _StopwatchHook))
        if has_validation:
            runner.call_hook('before_val')
            runner.model.eval()
            batch = next(iter(runner.val_dataloader))
            for index in range(2):
                runner.val_loop.run_iter(index, batch)
        optimizer = runner.optim_wrapper.optimizer
        return Plan(
            parameters=parameters,
            batch=effective_batch(cfg),
            iterations=runner.max_iters,
            done=hook.start,
            training_images=len(runner.train_dataloader.dataset),
            validation_images=len(runner.val_dataloader.dataset) if has_validation else None,
            lr=sorted({group.get('initial_lr', group['lr']) for group in optimizer.param_groups}, reverse=True),
            schedule=schedule_text(cfg.get('param_scheduler')),
            validations=hook.validations,
            seconds_per_iteration=hook.seconds[-1] if hook.seconds else None,
            seconds_per_validation_image=hook.validation_seconds,
            peak_memory_mb=peak_memory_mb(get_device()),
            device=device_name(get_device()),
        )


@HOOKS.register_module()
class _StopwatchHook(Hook):
    """Stops a run after its second iteration, and measures how long each took, with the wait for its data.

    It counts the validations that are left, and prevents them: one batch is validated afterwards, not the whole set.
    """

    priority = 'VERY_HIGH'  # so that the time of other hooks is not counted

    def __init__(self):
        self.seconds: list[float] = []
        self.validation_seconds: float | None = None

    def before_train(self, runner) -> None:
        loop = runner.train_loop
        self.start = runner.iter
        self.validations = validations_left(loop) + has_missed_validation(runner) if runner.val_loop else 0
        loop.val_begin = sys.maxsize
        self.clock = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.seconds.append(self._lap())
        runner.train_loop.stop_training = len(self.seconds) == 2

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._lap()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.validation_seconds = self._lap() / len(outputs)

    def _lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        then, self.clock = self.clock, time.perf_counter()
        return self.clock - then
