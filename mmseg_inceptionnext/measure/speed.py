"""Speed and memory of several configs side by side.

Each config lives in a process of its own and is asked in turn (A B C A B C …), so that a machine whose speed drifts
favours none, its peak memory is its own, and one that fails does not take the others with it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import mmseg
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_inceptionnext.checkpoints import read_checkpoint
from mmseg_inceptionnext.config import read_config, set_data_root
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.errors import UserError, mistake
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.measure.machine import device_name, peak_memory_mb
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.training.mixed_precision import use_mixed_precision
from mmseg_inceptionnext.weights import load_segmentor

TASKS = ('fps', 'train', 'backbone')
PRECISIONS = ('fp32', 'tf32', 'bf16', 'fp16')
LAYOUTS = ('nchw', 'channels_last', 'best')

_WARM_UP, _IMAGES = 5, 195  # of mmseg's own benchmark
_ROUND_SECONDS = 0.5  # a round repeats its step until it lasts about that long


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, the same for every config.

    Attributes:
        task: 'fps': images/s of ``predict``, up-sampling and argmax included. 'train': images/s of forward, backward
            and optimizer step. 'backbone': images/s of the backbone alone, forward, and forward with backward.
        shape: Height and width. Default: 512×512 for 'fps' (the only size that the paper's FPS are consistent with),
            the config's crop for 'train', 224×224 for 'backbone' (Table 4).
        data_root: For 'fps', take the config's test images from there instead of a synthetic one; mmseg's protocol:
            5 images to warm up, 195 timed, preprocessing outside the clock.
        batch_size: Default: 1 for 'fps', the config's for 'train'; for 'backbone' the paper's 128 on a GPU, else 8.
        repeat: Rounds of each config.
        precision: 'fp32'; 'tf32' (GPU only); 'bf16' or 'fp16' by autocast.
        compile: Run backbone, neck and head through ``torch.compile``.
        layout: 'nchw', 'channels_last', or 'best': the faster of the two for each config.
        fast: Measure what ``optimize_for_inference`` makes of the model, in the layout that it chooses. Of the
            backbone, forward alone.
    """

    task: str = 'fps'
    shape: tuple[int, int] | None = None
    data_root: str | None = None
    batch_size: int | None = None
    repeat: int = 5
    precision: str = 'fp32'
    compile: bool = False
    layout: str | None = None
    fast: bool = False


@dataclasses.dataclass(frozen=True)
class Speed:
    """Figures of one config: median, minimum and maximum over the rounds.

    Ratios are taken round by round against the first config, in the same round, and their median is reported.
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
        configs: Config files; a ratio is to the first that can be measured.
        settings: What to measure; one for all configs, or one for each, of the same task.
        checkpoints: A trained segmentor for each config, or none at all: random weights are as fast.
        progress: Wraps the iterator over single measurements, whose number it is told.

    Returns:
        The figures, and why the others failed: ``{config: message}``.

    Raises:
        UserError: numbers or names that no config could be measured with.
    """
    settings = [settings] * len(configs) if isinstance(settings, Setting) else settings
    for setting in settings:
        _check(setting, configs, checkpoints)
    context = multiprocessing.get_context('spawn')
    contestants = [
        Contestant(context, config, setting, checkpoint)
        for config, setting, checkpoint in zip(configs, settings, checkpoints or [None] * len(configs), strict=True)
    ]
    try:
        failures = {c.config: c.failure for c in contestants if c.wait_until_ready()}
        ready = [c for c in contestants if not c.failure]
        rounds = interleave([c.run_round for c in ready], settings[0].repeat, progress)
        failures |= {c.config: c.failure for c in ready if c.failure}
        sound = [(c, column) for c, column in zip(ready, zip(*rounds, strict=True), strict=False) if not c.failure]
        return [_summary(c, column, sound[0][1]) for c, column in sound], failures
    finally:
        for contestant in contestants:
            contestant.close()


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


class Contestant:
    """A config in its own process."""

    def __init__(self, context, config: str, setting: Setting, checkpoint: str | None):
        self.config, self.setting, self.failure, self.facts = config, setting, '', {}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, setting, checkpoint), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> str:
        """Set it up, alone on the machine; why it cannot be measured, or an empty string."""
        self.facts = self._ask('set up')
        return self.failure

    def run_round(self) -> dict:
        """Images/s by figure, and the peak memory so far; of a config that failed, nothing."""
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
    """The other end of a :class:`Contestant`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    warnings.simplefilter('ignore')  # as many times as there are configs
    MMLogger.get_instance('benchmark', log_level='ERROR')  # or mmengine prints every parameter's learning rate
    try:
        connection.recv()
        subject = Subject(config, setting, checkpoint)
        connection.send(subject.facts)
        while connection.recv() == 'round':
            connection.send(subject.run_round())
    except EOFError:
        pass
    except Exception as error:
        connection.send(mistake(error) or traceback.format_exc())


class Subject:
    """One model, set up and warmed up; ``steps`` maps the name of a figure to what is timed for it."""

    def __init__(self, config: str, setting: Setting, checkpoint: str | None):
        self.cfg, self.setting, self.device = read_config(config), setting, get_device()
        _set_precision(setting.precision)
        self.batch_size, self.shape = self._sizes()
        self.model = self._build(checkpoint)
        if setting.fast:
            with _autocast(self.device, setting.precision)():
                self.model = optimize_for_inference(self.model, self.shape)
        if setting.compile:
            _compile(self.model)
        layout = 'own' if setting.fast else setting.layout or ('best' if setting.task == 'backbone' else 'nchw')
        self.layout = self._faster_layout() if layout == 'best' else layout
        self._prepare(self.layout)
        self.facts = dict(
            shape=self.shape,
            batch_size=self.batch_size,
            device=device_name(self.device),
            threads=torch.get_num_threads(),
            layout=self.layout,
            versions=dict(torch=torch.__version__, mmseg=mmseg.__version__),
        )

    def run_round(self) -> dict[str, float]:
        figures = {name: self._images_per_second(name) for name in self.steps}
        return figures | {'peak_memory_mb': peak_memory_mb(self.device)}

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        task, cfg = self.setting.task, self.cfg
        batch_size = {
            'fps': 1,
            'train': cfg.get('train_dataloader', {}).get('batch_size', 1),
            'backbone': 128 if self.device == 'cuda' else 8,
        }[task]
        crop = cfg.model.get('data_preprocessor', {}).get('size') or (512, 512)
        shape = {'fps': (512, 512), 'train': crop, 'backbone': (224, 224)}[task]
        return self.setting.batch_size or batch_size, tuple(self.setting.shape or shape)

    def _build(self, checkpoint: str | None) -> nn.Module:
        init_default_scope('mmseg')
        if self.cfg.model.get('data_preprocessor', {}).get('size'):
            self.cfg.model.data_preprocessor.size = self.shape  # or training would pad to the config's crop
        model = revert_sync_batchnorm(MODELS.build(self.cfg.model))
        if checkpoint:
            load_segmentor(model, read_checkpoint(checkpoint), checkpoint, ARCHS)
        return model.to(self.device).train(self.setting.task == 'train')

    def _prepare(self, layout: str) -> None:
        """Bring model and inputs into a layout and set up the steps, warmed up."""
        memory_format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        if layout != 'own':
            self.model.to(memory_format=memory_format)
        make_steps = dict(fps=self._fps_steps, train=self._train_steps, backbone=self._backbone_steps)
        self.steps = make_steps[self.setting.task](memory_format)
        self.repetitions = {}
        for name, step in self.steps.items():
            for _ in range(2 if self.setting.data_root is None else _WARM_UP):
                step()
            self.repetitions[name] = 1
            seconds = self.batch_size / self._images_per_second(name)
            self.repetitions[name] = max(1, round(_ROUND_SECONDS / seconds))
            if self.setting.data_root is not None:
                self.repetitions[name] = max(1, _IMAGES // self.setting.repeat)

    def _faster_layout(self) -> str:
        def total_seconds(layout: str) -> float:
            self._prepare(layout)
            return sum(1 / max(self._images_per_second(name) for _ in range(2)) for name in self.steps)

        return min(('nchw', 'channels_last'), key=total_seconds)

    def _images_per_second(self, name: str) -> float:
        """Time the step's repetitions; what it returns is the time that does not count (preparing its input)."""
        step, number = self.steps[name], self.repetitions[name]
        _synchronise(self.device)
        start, aside = time.perf_counter(), 0.0
        for _ in range(number):
            aside += step() or 0.0
        _synchronise(self.device)
        return number * self.batch_size / (time.perf_counter() - start - aside)

    def _fps_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        batches = self._synthetic_batches() if self.setting.data_root is None else self._real_batches()
        autocast = _autocast(self.device, self.setting.precision)

        def step() -> float:
            start = time.perf_counter()
            inputs, samples = next(batches)
            inputs = inputs.contiguous(memory_format=memory_format)
            _synchronise(self.device)
            aside = time.perf_counter() - start
            with torch.inference_mode(), autocast():
                self.model(inputs, samples, mode='predict')
            return aside

        return {'fps': step}

    def _synthetic_batches(self) -> Iterator[tuple[torch.Tensor, list[SegDataSample]]]:
        inputs = torch.randn(self.batch_size, 3, *self.shape, device=self.device)
        meta = dict(ori_shape=self.shape, img_shape=self.shape, pad_shape=self.shape)
        while True:
            yield inputs, [SegDataSample(metainfo=meta) for _ in range(self.batch_size)]

    def _real_batches(self) -> Iterator[tuple[torch.Tensor, list[SegDataSample]]]:
        set_data_root(self.cfg, self.setting.data_root)
        check_data(self.cfg, 'test')
        # In this process: preprocessing is outside the clock, and a daemon may not have workers.
        here = dict(batch_size=self.batch_size, num_workers=0, persistent_workers=False)
        loader = Runner.build_dataloader(dict(self.cfg.test_dataloader, **here))
        while True:
            for data in loader:
                batch = self.model.data_preprocessor(data, False)
                yield batch['inputs'], batch['data_samples']

    def _train_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        cfg = Config(dict(optim_wrapper=self.cfg.optim_wrapper.to_dict()))
        if self.setting.precision in ('bf16', 'fp16') and cfg.optim_wrapper.type == 'OptimWrapper':
            use_mixed_precision(cfg, bfloat16=self.setting.precision == 'bf16')
        optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        images = torch.randint(256, (self.batch_size, 3, *self.shape), dtype=torch.uint8)
        labels = torch.randint(self.model.num_classes, (self.batch_size, 1, *self.shape))
        meta = dict(ori_shape=self.shape, img_shape=self.shape, pad_shape=self.shape)
        samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label)) for label in labels]

        def step() -> None:
            data = dict(inputs=list(images), data_samples=samples)
            self.model.train_step(data, optim_wrapper)

        return {'fps': step}

    def _backbone_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        inputs = torch.randn(self.batch_size, 3, *self.shape, device=self.device).contiguous(
            memory_format=memory_format
        )
        backbone, autocast = self.model.backbone, _autocast(self.device, self.setting.precision)

        def forward() -> None:
            backbone.eval()
            with torch.inference_mode(), autocast():
                backbone(inputs)

        def forward_backward() -> None:
            backbone.train()
            with autocast():
                loss = sum(out.float().mean() for out in backbone(inputs))
            loss.backward()
            backbone.zero_grad(set_to_none=True)

        return {'fps': forward} if self.setting.fast else {'fps': forward, 'fps_forward_backward': forward_backward}


def _check(setting: Setting, configs: Sequence[str], checkpoints: Sequence[str]) -> None:
    if checkpoints and len(checkpoints) != len(configs):
        raise UserError(f'{len(checkpoints)} checkpoints for {len(configs)} configs: give one for each, or none')
    if setting.repeat < 1 or (setting.batch_size is not None and setting.batch_size < 1):
        raise UserError('--repeat and --batch-size must be at least 1')
    if setting.shape and min(setting.shape) < 32:
        raise UserError(f'--shape {setting.shape[0]} {setting.shape[1]}: no model takes less than 32 pixels a side')
    if setting.data_root is not None and setting.task != 'fps':
        raise UserError('--data-root goes with --task fps: other tasks measure synthetic input')
    if setting.fast and setting.task == 'train':
        raise UserError('--fast is for inference: it does not go with --task train')
    if setting.fast and setting.layout is not None:
        raise UserError('--fast chooses the layout: leave --layout out')
    needs_gpu = setting.precision == 'tf32' or (setting.precision, setting.task) == ('fp16', 'train')
    if needs_gpu and get_device() != 'cuda':
        raise UserError(f'--precision {setting.precision} needs a GPU: choose fp32 or bf16')


def _set_precision(precision: str) -> None:
    """TF32 is off unless asked for: torch's own default uses it for convolutions, so that fp32 would not be fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'


def _autocast(device: str, precision: str) -> Callable:
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(precision)
    return (lambda: torch.autocast(device, dtype)) if dtype else nullcontext


def _compile(model: nn.Module) -> None:
    """The three parts apart: what is around them depends on Python objects."""
    for part in ('backbone', 'neck', 'decode_head'):
        if hasattr(model, part):
            module = getattr(model, part)
            module.forward = torch.compile(module.forward)


def _synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _summary(contestant: Contestant, results: Sequence[dict], first: Sequence[dict]) -> Speed:
    setting = contestant.setting
    fps = [result['fps'] for result in results]
    ratios = [result['fps'] / reference['fps'] for result, reference in zip(results, first, strict=True)]
    both = [result['fps_forward_backward'] for result in results if 'fps_forward_backward' in result]
    return Speed(
        config=str(contestant.config),
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
        dtype=setting.precision,
        compiled=setting.compile,
        fast=setting.fast,
        **contestant.facts,
    )
