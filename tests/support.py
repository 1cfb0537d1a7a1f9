"""Helpers of the tests: small configs, comparisons, and what a user's mistake looks like."""

import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch.profiler import ProfilerActivity, profile

from mmseg_inceptionnext.models.build import build_segmentor

ROOT = Path(__file__).parents[1]
TINY_CONFIG = ROOT / 'tests' / 'configs' / 'fpn_tiny.py'
TINY_UPERNET = ROOT / 'tests' / 'configs' / 'upernet_tiny.py'

# The only tests that `make test-upstream` leaves out.
needs_onnx_exporter = pytest.mark.skipif(
    torch.__version__.startswith('2.6.'), reason="torch 2.6's ONNX exporter cannot write these segmentors"
)


def assert_user_error(process: subprocess.CompletedProcess, *parts: str) -> None:
    """Assert exit code 2 and, as the last line of stderr, one message with all of ``parts``; no traceback."""
    assert process.returncode == 2, process.stderr[-2000:]
    assert 'Traceback' not in process.stderr
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') or ': error: ' in line
    for part in parts:
        assert part in line, line


def variant(cfg: Config, work_dir: str | Path, **changes) -> Config:
    """Return a copy of a config with another work dir and some changes."""
    cfg = deepcopy(cfg)
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(changes)
    return cfg


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def peak_bytes(function) -> int:
    """Return the peak of what torch has allocated on the CPU while a function ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    total = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def save_segmentor(folder: Path, classes: int = 3, codes: tuple = (), base: Path = TINY_CONFIG, seed: int = 0,
                   **changes) -> tuple[Path, Path]:  # fmt: skip
    """Write a config whose test pipeline resizes nothing, and a checkpoint of random weights with names of classes."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg = dict(
        _base_=str(base), model=dict(decode_head=dict(num_classes=classes)),
        test_dataloader=dict(dataset=dict(pipeline=pipeline)), **changes,
    )  # fmt: skip
    config, checkpoint = folder / 'config.py', folder / 'model.pth'
    config.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    torch.manual_seed(seed)
    model = build_segmentor(Config.fromfile(config))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    palette = [(200, 40 * i % 256, 10 * i % 256) for i in range(classes)]
    meta = dict(classes=[f'class {i}' for i in range(classes)], palette=palette)
    if codes:
        meta['codes'] = codes
    torch.save(dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict()), checkpoint)
    return config, checkpoint


def segmentor_with_statistics(path: str | Path, **options) -> torch.nn.Module:
    """Build a segmentor in eval mode, with statistics, γ and biases that make a difference."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    model = build_segmentor(cfg).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(('gamma', 'running_var')):
                tensor.uniform_(0.2, 0.6)
            elif name.endswith(('bias', 'running_mean')):
                tensor.normal_(0, 0.1)
    return model
