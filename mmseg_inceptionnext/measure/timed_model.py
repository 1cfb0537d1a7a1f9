"""Set up one model for timing: what to measure, its inputs, and the steps that are timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import mmseg
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_inceptionnext.config import override, read_config, set_data_root
from mmseg_inceptionnext.config_files import require_segmentor
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.device import device_name, keep_freed_memory, peak_memory_mb
from mmseg_inceptionnext.inference.optimize import made_for, optimize_for_inference
from mmseg_inceptionnext.inference.precision import faster
from mmseg_inceptionnext.measure.imagenet import imagenet_config, is_imagenet_model
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.kernels import use_kernels
from mmseg_inceptionnext.training.faster_steps import speed_up_steps
from mmseg_inceptionnext.training.mixed_precision import amp_optim_wrapper

TASKS = ('fps', 'train', 'backbone')
PRECISIONS = ('auto', 'fp32', 'tf32', 'bf16', 'fp16')
LAYOUTS = ('nchw', 'channels_last', 'best')

_WARM_UP, _IMAGES = 5, 195  # as in mmseg's benchmark


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure, the same for every config.

    Attributes:
        task: 'fps': images/s of ``predict``, up-sampling and argmax included. 'train': images/s of forward, backward
            and optimizer step. 'backbone': images/s of the backbone alone, forward, and forward with backward.
        shape: Height and width. Default: 512×512 for 'fps' (the only size that the paper's FPS are consistent with),
            the config's crop for 'train', 224×224 for 'backbone' (Table 4).
        data_root: For 'fps', root of the data set to take test images from, instead of a synthetic one; mmseg's
            protocol: 5 images to warm up, 195 timed, preprocessing not timed.
        batch_size: Images a step. Default: 'fps' 1, 'train' the config's, 'backbone' the paper's 128 on a GPU, else 8.
        repeat: Number of rounds.
        precision: 'fp32'; 'tf32' (GPU only); 'bf16' or 'fp16', by autocast or, for ``fast`` and 'bf16', as
            ``optimize_for_inference`` makes it; for 'fps' also 'auto', the faster of 'fp32' and 'bf16'.
        compile: Run backbone, neck and head through ``torch.compile``.
        layout: 'nchw', 'channels_last', or 'best': the faster of the two for each config.
        fast: Measure what ``optimize_for_inference`` returns, in the layout that it chooses; for the backbone, the
            forward pass alone. For 'train', the steps of tools/train.py.
        data: Data file of a data set of one's own, to which every config is fitted.
        kernels: Compute by :mod:`mmseg_inceptionnext.models.kernels`, on a GPU; with or without ``fast``.
        round_seconds: A round repeats its step until it lasts about that long.
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
    data: str | None = None
    kernels: bool = False
    round_seconds: float = 0.5


class TimedModel:
    """One model, set up and warmed up; ``steps`` maps the name of a figure to the function that is timed for it."""

    def __init__(self, config: str, setting: Setting, checkpoint: str | None):
        self.cfg = imagenet_config(str(config)) if is_imagenet_model(config) else read_config(config)
        self.setting, self.device = setting, get_device()
        if setting.task != 'backbone':
            require_segmentor(self.cfg)
        override(self.cfg, data=setting.data)
        _set_precision(setting.precision)
        self.batch_size, self.shape = self._sizes()
        self.precision, self.model = setting.precision, self._build(checkpoint)
        if setting.precision == 'auto':
            self.precision, self.model = self._faster_precision()
        elif setting.fast and setting.task == 'train':
            speed_up_steps(self.model)
        elif setting.fast:
            self.model = self._optimized(setting.precision)
        elif setting.kernels:
            use_kernels(self.model)
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
            dtype=self.precision,
            layout=self.layout,
            versions=dict(torch=torch.__version__, mmseg=mmseg.__version__),
        )

    def run_round(self) -> dict[str, float]:
        """Return images/s by figure, and the peak memory so far."""
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
        if self.cfg.model.get('data_preprocessor', {}).get('size'):
            self.cfg.model.data_preprocessor.size = self.shape  # or training would pad to the config's crop
        return build_segmentor(self.cfg, checkpoint).to(self.device).train(self.setting.task == 'train')

    def _optimized(self, precision: str) -> nn.Module:
        kernels = self.setting.kernels
        if precision == 'bf16':
            return optimize_for_inference(self.model, self.shape, precision, kernels)
        with _autocast(self.device, precision)():
            return optimize_for_inference(self.model, self.shape, kernels=kernels)

    def _faster_precision(self) -> tuple[str, nn.Module]:
        inputs, samples = next(self._synthetic_batches())

        def make(precision: str) -> nn.Module:
            return self._optimized(precision) if self.setting.fast else made_for(self.model, precision, fast=False)

        def step(model: nn.Module) -> None:
            model(inputs, samples, mode='predict')

        return faster(make, step, self.device, self.batch_size)

    def _prepare(self, layout: str) -> None:
        """Convert model and inputs to a layout, and set up and warm up the steps."""
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
            self.repetitions[name] = max(1, round(self.setting.round_seconds / seconds))
            if self.setting.data_root is not None:
                self.repetitions[name] = max(1, _IMAGES // self.setting.repeat)

    def _faster_layout(self) -> str:
        def total_seconds(layout: str) -> float:
            self._prepare(layout)
            return sum(1 / max(self._images_per_second(name) for _ in range(2)) for name in self.steps)

        return min(('nchw', 'channels_last'), key=total_seconds)

    def _images_per_second(self, name: str) -> float:
        """Time the repetitions of a step, without the seconds that it returns: its input preparation."""
        step, number = self.steps[name], self.repetitions[name]
        _synchronise(self.device)
        start, aside = time.perf_counter(), 0.0
        for _ in range(number):
            aside += step() or 0.0
        _synchronise(self.device)
        return number * self.batch_size / (time.perf_counter() - start - aside)

    def _fps_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        batches = self._synthetic_batches() if self._has_no_images else self._real_batches()
        autocast = _autocast(self.device, self.precision)

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

    @property
    def _channels(self) -> int:
        return self.cfg.model.get('backbone', {}).get('in_channels', 3)

    @property
    def _has_no_images(self) -> bool:
        return self.setting.data_root is None and self.setting.data is None

    def _synthetic_batches(self) -> Iterator[tuple[torch.Tensor, list[SegDataSample]]]:
        inputs = torch.randn(self.batch_size, self._channels, *self.shape, device=self.device)
        meta = dict(ori_shape=self.shape, img_shape=self.shape, pad_shape=self.shape)
        while True:
            yield inputs, [SegDataSample(metainfo=meta) for _ in range(self.batch_size)]

    def _real_batches(self) -> Iterator[tuple[torch.Tensor, list[SegDataSample]]]:
        if self.setting.data_root is not None:
            set_data_root(self.cfg, self.setting.data_root)
        check_data(self.cfg, 'test')
        # No workers: preprocessing is not timed, and a daemonic process may not start any.
        here = dict(batch_size=self.batch_size, num_workers=0, persistent_workers=False)
        loader = Runner.build_dataloader(dict(self.cfg.test_dataloader, **here))
        while True:
            for data in loader:
                batch = self.model.data_preprocessor(data, False)
                yield batch['inputs'], batch['data_samples']

    def _train_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        if self.device == 'cpu':
            keep_freed_memory()  # as tools/train.py does
        cfg = Config(dict(optim_wrapper=self.cfg.optim_wrapper.to_dict()))
        if self.precision in ('bf16', 'fp16') and cfg.optim_wrapper.type == 'OptimWrapper':
            cfg.optim_wrapper.update(amp_optim_wrapper(bfloat16=self.precision == 'bf16'))
        optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        images = torch.randint(256, (self.batch_size, self._channels, *self.shape), dtype=torch.uint8)
        labels = torch.randint(self.model.num_classes, (self.batch_size, 1, *self.shape))
        meta = dict(ori_shape=self.shape, img_shape=self.shape, pad_shape=self.shape)
        samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label)) for label in labels]

        def step() -> None:
            data = dict(inputs=list(images), data_samples=samples)
            self.model.train_step(data, optim_wrapper)

        return {'fps': step}

    def _backbone_steps(self, memory_format: torch.memory_format) -> dict[str, Callable]:
        inputs = torch.randn(self.batch_size, self._channels, *self.shape, device=self.device).contiguous(
            memory_format=memory_format
        )
        backbone, autocast = self.model.backbone, _autocast(self.device, self.precision)

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


def _set_precision(precision: str) -> None:
    """Switch TF32 on or off: by default torch uses it for convolutions, so that fp32 would not be fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'


def _autocast(device: str, precision: str) -> Callable:
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(precision)
    return (lambda: torch.autocast(device, dtype)) if dtype else nullcontext


def _compile(model: nn.Module) -> None:
    """Compile backbone, neck and head, each by itself: the code around them depends on Python objects."""
    for part in ('backbone', 'neck', 'decode_head'):
        if hasattr(model, part):
            module = getattr(model, part)
            module.forward = torch.compile(module.forward)


def _synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()
