"""Measure speed and memory of several configs side by side.

Each config has its own process and is timed in turn (A B C A B C …): drift in the machine's speed favours none, peak
memory is that of one config, and a failure does not affect the others.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import statistics
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from mmengine.device import get_device
from mmengine.logging import MMLogger

from mmseg_inceptionnext.config import user_error_message
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.measure.imagenet import is_imagenet_model
from mmseg_inceptionnext.measure.timed_model import Setting, TimedModel
from mmseg_inceptionnext.models.build import LARGEST_STRIDE


@dataclasses.dataclass(frozen=True)
class Speed:
    """Figures of one config: median, minimum and maximum over the rounds.

    Ratios are to the first config in the same round; their median is reported.
    """

    config: str
    fps: float
    fps_min: float
    fps_max: float
    ratio_to_first: float
    ratio_min: float
    ratio_max: float
    peak_memory_mb: float
    fps_forward_backward: float | None
    task: str
    shape: tuple[int, int]
    batch_size: int
    rounds: int
    device: str
    threads: int
    dtype: str
    layout: str
    compiled: bool
    fast: bool
    versions: dict[str, str]


def measure_speed(
    configs: Sequence[str],
    settings: Setting | Sequence[Setting],
    checkpoints: Sequence[str] = (),
    progress: Callable[[Iterator, int], Iterator] = lambda rounds, total: rounds,
) -> tuple[list[Speed], dict[str, str]]:
    """Measure configs interleaved. Ctrl-C ends the measurement early; complete rounds count.

    Args:
        configs: Paths or names of configs; for 'backbone' also archs of MetaNeXt and models of timm, which are timed
            with their classifiers. Ratios are to the first that can be measured.
        settings: What to measure: one setting for all configs, or one for each, of the same task.
        checkpoints: Path of a trained segmentor for each config, or none at all: random weights are as fast.
        progress: Function that wraps the iterator over single measurements, given their number.

    Returns:
        The figures, and why the others failed: ``{config: message}``.

    Raises:
        UserError: A setting that no config could be measured with.
    """
    settings = [settings] * len(configs) if isinstance(settings, Setting) else settings
    for setting in settings:
        _check(setting, configs, checkpoints)
    context = multiprocessing.get_context('spawn')
    processes = [
        ModelProcess(context, config, setting, checkpoint)
        for config, setting, checkpoint in zip(configs, settings, checkpoints or [None] * len(configs), strict=True)
    ]
    try:
        failures = {p.config: p.failure for p in processes if p.wait_until_ready()}
        ready = [p for p in processes if not p.failure]
        rounds = interleave([p.run_round for p in ready], settings[0].repeat, progress)
        failures |= {p.config: p.failure for p in ready if p.failure}
        complete = [(p, column) for p, column in zip(ready, zip(*rounds, strict=True), strict=False) if not p.failure]
        return [summarize_rounds(p, column, complete[0][1]) for p, column in complete], failures
    finally:
        for process in processes:
            process.close()


def interleave(
    runs: Sequence[Callable[[], dict]], repeat: int, progress: Callable[[Iterator, int], Iterator] = lambda r, n: r
) -> list[list[dict]]:
    """Call every function in turn, ``repeat`` times over; a Ctrl-C keeps the complete rounds.

    Returns:
        The results, ``[round][function]``.
    """
    rounds: list[list[dict]] = []
    try:
        for i in progress(iter(range(repeat * len(runs))), repeat * len(runs)):
            if i % len(runs) == 0:
                rounds.append([])
            rounds[-1].append(runs[i % len(runs)]())
    except KeyboardInterrupt:
        pass
    return [results for results in rounds if len(results) == len(runs)]


class ModelProcess:
    """A :class:`TimedModel` in its own process."""

    def __init__(self, context, config: str, setting: Setting, checkpoint: str | None):
        self.config, self.setting, self.failure, self.facts = config, setting, '', {}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, setting, checkpoint), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> str:
        """Set up the model while no other runs; return why it cannot be measured, or an empty string."""
        self.facts = self._ask('set up')
        return self.failure

    def run_round(self) -> dict:
        """Return images/s by figure, and the peak memory so far; nothing if the config failed."""
        if self.failure:
            return {}
        return self._ask('round')

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _ask(self, what: str) -> dict:
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            answer = f'its process ended with code {self._process.exitcode} (out of memory?)'
        if isinstance(answer, str):
            self.failure = answer
            return {}
        return answer


def _serve(connection, config: str, setting: Setting, checkpoint: str | None) -> None:
    """Answer the requests of a :class:`ModelProcess`, in its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    warnings.simplefilter('ignore')  # they would come once for each config
    MMLogger.get_instance('benchmark', log_level='ERROR')  # or mmengine prints every parameter's learning rate
    try:
        connection.recv()
        model = TimedModel(config, setting, checkpoint)
        connection.send(model.facts)
        while connection.recv() == 'round':
            connection.send(model.run_round())
    except EOFError:
        pass
    except Exception as error:
        connection.send(user_error_message(error) or traceback.format_exc())


def _check(setting: Setting, configs: Sequence[str], checkpoints: Sequence[str]) -> None:
    if checkpoints and len(checkpoints) != len(configs):
        raise UserError(f'{len(checkpoints)} checkpoints for {len(configs)} configs: give one for each, or none')
    for name, number in (('repeat', setting.repeat), ('batch_size', setting.batch_size)):
        if number is not None and number < 1:
            raise UserError(f'{name}={number} must be at least 1')
    if setting.shape and min(setting.shape) < LARGEST_STRIDE:
        raise UserError(f'shape={tuple(setting.shape)}: no model takes less than {LARGEST_STRIDE} pixels a side')
    if setting.data_root is not None and setting.task != 'fps':
        raise UserError(f"data_root={setting.data_root!r} goes with task='fps': other tasks measure synthetic input")
    if setting.fast and setting.layout is not None:
        raise UserError(f'fast=True chooses the layout: leave layout={setting.layout!r} out')
    if setting.precision == 'auto' and setting.task != 'fps':
        raise UserError(f"precision='auto' goes with task='fps': choose one for task={setting.task!r}")
    if (classifiers := [config for config in configs if is_imagenet_model(config)]) and (
        setting.task != 'backbone' or setting.fast or setting.data is not None
    ):
        raise UserError(
            f"{classifiers[0]} is an ImageNet classifier: time it by task='backbone', without fast and data"
        )
    needs_gpu = setting.precision == 'tf32' or (setting.precision, setting.task) == ('fp16', 'train')
    if needs_gpu and get_device() != 'cuda':
        raise UserError(f'precision={setting.precision!r} needs a GPU: choose fp32 or bf16')


def summarize_rounds(process: ModelProcess, results: Sequence[dict], first: Sequence[dict]) -> Speed:
    """Return median and spread of the rounds of one config, and its ratios to the rounds of the first."""
    setting = process.setting
    fps = [result['fps'] for result in results]
    ratios = [result['fps'] / reference['fps'] for result, reference in zip(results, first, strict=True)]
    both = [result['fps_forward_backward'] for result in results if 'fps_forward_backward' in result]
    return Speed(
        config=str(process.config),
        fps=statistics.median(fps),
        fps_min=min(fps),
        fps_max=max(fps),
        ratio_to_first=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        peak_memory_mb=max(result['peak_memory_mb'] for result in results),
        fps_forward_backward=statistics.median(both) if both else None,
        task=setting.task,
        rounds=len(fps),
        compiled=setting.compile,
        fast=setting.fast,
        **process.facts,
    )
