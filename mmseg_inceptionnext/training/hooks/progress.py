"""Show how a run goes, in few lines."""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from numbers import Real

from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmseg_inceptionnext.config_files import pretrained_source
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.device import device_name
from mmseg_inceptionnext.models.build import heads_of
from mmseg_inceptionnext.training.batch import effective_batch

_WIDTH = 100
_MOST_CLASSES = 20
_SECONDS_BETWEEN_LINES = 60
_ITERATIONS_AVERAGED = 20


class ProgressHook(Hook):
    """Shows how a run goes: a bar on a terminal, else a line now and then; and what each validation says.

    Args:
        interval: Iterations between two lines where there is no terminal; the first comes at once.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 50):
        self.interval = interval
        self._bar: Progress | None = None
        self._console = Console(stderr=True)

    def before_train(self, runner) -> None:
        for line in run_lines(runner):
            say(line)
        self._seconds = deque(maxlen=_ITERATIONS_AVERAGED)
        self._start_bar(runner.max_iters, runner.iter)
        self._last_line = 0.0
        self._started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        now = time.perf_counter()
        self._seconds.append(now - self._started)
        self._started = now
        done = batch_idx + 1
        is_due = (
            len(self._seconds) == 1 or done % self.interval == 0 or done == runner.max_iters
            or now - self._last_line > _SECONDS_BETWEEN_LINES
        )  # fmt: skip
        if not self._bar and not is_due:
            return
        seconds = sum(self._seconds) / len(self._seconds)
        parts = dict(
            loss=f'{outputs["loss"].item():.3f}' if 'loss' in (outputs or {}) else '–',
            lr=f'{runner.optim_wrapper.optimizer.param_groups[-1]["lr"]:.2g}',
            speed=f'{len(data_batch["inputs"]) * runner.world_size / seconds:.1f} images/s',
            eta=f'{timedelta(seconds=round((runner.max_iters - done) * seconds))}',
        )
        if self._bar:
            self._bar.update(self._task, completed=done, **parts)
            return
        self._last_line = now
        # As mmengine's lines begin, for who reads them by a program.
        count = f'{done:{len(str(runner.max_iters))}}/{runner.max_iters}'
        speed = f'{parts["speed"]}  eta: {parts["eta"]}'
        say(f'Iter(train) [{count}]  loss: {parts["loss"]}  lr: {parts["lr"]}  {speed}')

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if metrics:
            say(f'validation at iteration {runner.iter}: {figures_text(metrics)}')
            self._show_classes(runner.val_evaluator)
        self._started = time.perf_counter()

    def after_train(self, runner) -> None:
        self.stop_bar()

    def before_test(self, runner) -> None:
        self._start_bar(len(runner.test_dataloader), 0)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self._bar:
            self._bar.update(self._task, completed=batch_idx + 1)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        self.stop_bar()
        self._show_classes(runner.test_evaluator)

    def _show_classes(self, evaluator) -> None:
        figures = next((metric.figures for metric in evaluator.metrics if getattr(metric, 'figures', None)), {})
        there = {name: row['IoU'] for name, row in figures.get('per_class', {}).items() if row['Acc'] is not None}
        if there:
            say(classes_text(there))

    def _start_bar(self, total: int, done: int) -> None:
        self._bar = None
        if self._console.is_terminal and is_main_process():
            labels = {'loss': 'loss ', 'lr': 'lr ', 'speed': '', 'eta': 'ETA '}
            fields = [TextColumn(f'{label}{{task.fields[{name}]}}') for name, label in labels.items()]
            self._bar = Progress(BarColumn(12), MofNCompleteColumn(), *fields, console=self._console, transient=True)
            self._task = self._bar.add_task('', total=total, completed=done, loss='', lr='', speed='', eta='')
            self._bar.start()

    def stop_bar(self) -> None:
        """Give the terminal back; nothing to do without a bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def figures_text(metrics: dict) -> str:
    """Return the figures of a validation in a line, without the times that mmengine adds; aAcc comes last."""
    names = [name for name, value in metrics.items() if isinstance(value, Real) and name not in ('time', 'data_time')]
    return ', '.join(f'{name} {metrics[name]:.2f}' for name in sorted(names, key='aAcc'.__eq__))


def classes_text(ious: dict[str, float | None]) -> str:
    """Return the IoU of classes, worst first, in a few lines."""
    ranked = sorted(ious, key=lambda name: ious[name] or 0.0)
    # The space that cannot break keeps a name and its figure in one line.
    parts = [f'{name}\xa0{ious[name] or 0.0:.1f}' for name in ranked[:_MOST_CLASSES]]
    if len(ranked) > _MOST_CLASSES:
        parts.append(f'and {len(ranked) - _MOST_CLASSES} better ones')
    text = textwrap.fill(f'IoU, worst first: {", ".join(parts)}', _WIDTH, initial_indent='  ', subsequent_indent='  ')
    return text.replace('\xa0', ' ')


def run_lines(runner) -> Iterator[str]:
    """Yield a line each for data, model, device and schedule of a run that starts."""
    cfg, train = runner.cfg, runner.train_dataloader.dataset
    validation = f', {len(runner.val_dataloader.dataset)} for validation' if runner.val_loop else ''
    yield f'data: {len(train)} training images{validation}, {len(train.metainfo["classes"])} classes'

    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    parts = [part for part in (model.backbone, getattr(model, 'neck', None), *heads_of(model)) if part is not None]
    names = ' + '.join(type(part).__name__ for part in parts)
    start = pretrained_source(cfg.model)
    source = runner.resumed_from or cfg.get('load_from') or cfg.get('finetune') or start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = f'from {source}' if source else 'from random weights, no pretrained ones'
    yield f'model: {names}, {parameters / 1e6:.1f} M parameters, {weights}'

    dtype = getattr(runner.optim_wrapper, 'cast_dtype', None) or 'float32'
    precision = str(dtype).removeprefix('torch.')
    processes = f' × {runner.world_size}' if runner.world_size > 1 else ''
    yield f'device: {device_name(get_device())}{processes}, {precision}'

    batch = effective_batch(cfg).per_iteration
    every = f', validation every {cfg.train_cfg.val_interval}' if cfg.train_cfg.get('val_interval') else ''
    yield (
        f'schedule: {runner.max_iters} iterations of {batch} images ({runner.max_iters * batch / len(train):.1f} '
        f'epochs){every}; log and checkpoints in {runner.work_dir}'
    )
