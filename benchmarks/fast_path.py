"""Measure the fast path against what users would run otherwise: the tables of docs/speed.md.

All contestants of a table are measured in turn, each in a process of its own; ratios are taken round by round.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_inceptionnext.command_line import exit_if_any_failed, markdown_table, run
from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.data.pipeline import TTA_RATIOS
from mmseg_inceptionnext.device import keep_freed_memory
from mmseg_inceptionnext.inference.label_map_segmentor import label_map
from mmseg_inceptionnext.inference.multi_scale_segmentor import multi_scale_label_map
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.measure.speed import interleave, measure_speed
from mmseg_inceptionnext.measure.timed_model import Setting
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.up_sampled_cross_entropy import use_up_sampled_cross_entropy

HERE = Path(__file__).parent
CONFIGS = HERE.parent / 'configs'
STOCK = {'UperNet': HERE / 'stock_upernet_t.py', 'FPN': HERE / 'stock_fpn_t.py'}
PLAIN_HEAD = HERE / 'plain_head_upernet_t.py'
OURS = {'UperNet': CONFIGS / 'upernet/inceptionnext_t.py', 'FPN': CONFIGS / 'fpn/inceptionnext_t.py'}

BF16 = dict(precision='bf16', layout='channels_last')  # in which autocast is faster on a CPU


def whole_model(name: str, shape: tuple[int, int], repeat: int) -> None:
    plain = Setting(shape=shape, repeat=repeat)
    contestants = {
        'mmseg + timm': (STOCK[name], plain),
        'mmseg + timm, torch.compile': (STOCK[name], dataclasses.replace(plain, compile=True)),
        'mmseg + timm, bf16': (STOCK[name], dataclasses.replace(plain, **BF16)),
        'ours, --no-fast': (OURS[name], plain),
        'ours': (OURS[name], dataclasses.replace(plain, fast=True)),
        'ours, bf16': (OURS[name], dataclasses.replace(plain, fast=True, precision='bf16')),
    }
    gmacs = {config: measure_complexity(config, shape).gmacs_executed for config in (STOCK[name], OURS[name])}
    print(f'\n{name} T, predict, 1×3×{shape[0]}×{shape[1]}\n')
    compare(contestants, gmacs)


def backbones(repeat: int) -> None:
    best = Setting('backbone', (512, 512), batch_size=1, repeat=repeat, layout='best')
    print('\nBackbone alone, forward, 1×3×512×512, each in its faster layout\n')
    compare(
        {
            'timm inception_next_tiny': (STOCK['UperNet'], best),
            'timm convnext_tiny': (CONFIGS / 'baselines/upernet/convnext_t.py', best),
            'ours': (OURS['UperNet'], dataclasses.replace(best, layout=None, fast=True)),
        }
    )


def training_step(repeat: int) -> None:
    setting = Setting('train', (256, 256), batch_size=2, repeat=repeat)
    print('\nUperNet T, training step, 2×3×256×256\n')
    compare({
        "ours with mmseg's UPerHead": (PLAIN_HEAD, setting),
        'mmseg + timm': (STOCK['UperNet'], setting),
        'mmseg + timm, bf16': (STOCK['UperNet'], dataclasses.replace(setting, **BF16)),
        'ours': (OURS['UperNet'], dataclasses.replace(setting, fast=True)),
        'ours, --amp': (OURS['UperNet'], dataclasses.replace(setting, fast=True, precision='bf16')),
    })  # fmt: skip


def compare(contestants: dict[str, tuple[Path, Setting]], gmacs: dict[Path, float] | None = None) -> None:
    """Print a table."""
    rows, failures = measure_speed([str(c) for c, _ in contestants.values()], [s for _, s in contestants.values()])
    header = ['', 'images/s', 'min', 'max', 'ratio to the first', 'spread', 'peak MB', 'layout']
    header += ['GMACs', 'GMAC/s'] if gmacs else []
    cells = []
    for name, row in zip(contestants, rows, strict=False):
        cells.append([
            name, f'{row.fps:.3f}', f'{row.fps_min:.3f}', f'{row.fps_max:.3f}', f'{row.ratio_to_first:.2f}',
            f'{row.ratio_min:.2f} – {row.ratio_max:.2f}', f'{row.peak_memory_mb:.0f}', row.layout,
        ])  # fmt: skip
        if gmacs:
            executed = gmacs[contestants[name][0]]
            cells[-1] += [f'{executed:.0f}', f'{executed * row.fps:.0f}']
    print(markdown_table(header, cells))
    exit_if_any_failed(failures)


def head(shape: tuple[int, int], repeat: int) -> None:
    """The decode head alone; mmseg's in both layouts."""
    steps = {}
    for name, kind, layout in (
        ("mmseg's UPerHead, NCHW", 'UPerHead', torch.contiguous_format),
        ("mmseg's UPerHead, channels_last", 'UPerHead', torch.channels_last),
        ('LateUpsampleUPerHead, NCHW', 'LateUpsampleUPerHead', torch.contiguous_format),
    ):
        cfg = read_config(OURS['UperNet'])
        cfg.model.decode_head.type = kind
        module = build_segmentor(cfg).decode_head.eval().to(memory_format=layout)
        features = [
            torch.randn(1, c, shape[0] // s, shape[1] // s).contiguous(memory_format=layout)
            for c, s in zip(module.in_channels, (4, 8, 16, 32), strict=True)
        ]
        steps[name] = lambda module=module, features=features: module(features)
    print(f'\nHead of UperNet T, features of {shape[0]}×{shape[1]}\n')
    time_steps(steps, repeat)


def tail(repeat: int) -> None:
    """From the logits of a head to the label map."""
    logits = F.interpolate(torch.randn(1, 150, 16, 21), (128, 171), mode='bicubic')
    meta = dict(ori_shape=(512, 683), img_shape=(512, 683))
    model = segmentor()

    def mmseg() -> None:
        up_sampled = model.decode_head.predict_by_feat(logits, [meta])
        EncoderDecoder.postprocess_result(model, up_sampled, [SegDataSample(metainfo=meta)])

    print('\nFrom logits to the label map, 150 classes, 512×683\n')
    time_steps({"mmseg's predict_by_feat, postprocess_result": mmseg,
                'LabelMapSegmentor': lambda: label_map(logits[0], (512, 683), meta, False)}, repeat)  # fmt: skip


def tail_of_multi_scale(repeat: int) -> None:
    """From the logits of a head for the twelve views of --tta to the label map."""
    views, metas = [], []
    for ratio in TTA_RATIOS:
        height, width = round(128 * ratio), round(171 * ratio)
        for flip in (False, True):
            views.append(F.interpolate(torch.randn(1, 150, 16, 21), (height, width), mode='bicubic'))
            metas.append(dict(ori_shape=(512, 683), img_shape=(4 * height, 4 * width), flip=flip,
                              flip_direction='horizontal', img_path=''))  # fmt: skip
    model = segmentor()
    tta = SegTTAModel(model)

    def mmseg() -> None:
        samples = []
        for view, meta in zip(views, metas, strict=True):
            up_sampled = model.decode_head.predict_by_feat(view, [meta])
            samples += EncoderDecoder.postprocess_result(model, up_sampled, [SegDataSample(metainfo=meta)])
        tta.merge_preds([samples])

    print('\nFrom the logits of twelve views to the label map, 150 classes, 512×683\n')
    time_steps({'mmseg, SegTTAModel': mmseg,
                'MultiScaleSegmentor': lambda: multi_scale_label_map([view[0] for view in views], metas, False)},
               repeat)  # fmt: skip


def loss(repeat: int) -> None:
    """From the logits of a head to loss and gradient, of a batch at the recipe's crop."""
    keep_freed_memory()  # as in a training, for both
    logits = F.interpolate(torch.randn(2, 150, 16, 16), (128, 128), mode='bicubic').requires_grad_()
    labels = torch.randint(150, (2, 1, 512, 512))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]

    @torch.inference_mode(False)
    def step(head: nn.Module) -> None:
        torch.autograd.grad(head.loss_by_feat(logits, samples)['loss_ce'], logits)

    stock, ours = segmentor().decode_head, use_up_sampled_cross_entropy(segmentor()).decode_head
    print('\nFrom logits to loss and gradient, 150 classes, 2×512×512\n')
    time_steps({"mmseg's loss_by_feat": lambda: step(stock), 'up_sampled_cross_entropy': lambda: step(ours)}, repeat)


def segmentor() -> EncoderDecoder:
    return build_segmentor(read_config(OURS['UperNet']))


def machine(repeat: int) -> None:
    """The rate of one large 3×3 convolution, 512 channels at 128×128, to hold the others against."""
    x = torch.randn(1, 512, 128, 128).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3).contiguous(memory_format=torch.channels_last)
    gmacs = 512 * 512 * 9 * 128 * 128 / 1e9
    rounds = interleave([timed(lambda: F.conv2d(x, weight, padding=1))], repeat)
    rate = statistics.median(gmacs / results[0]['seconds'] for results in rounds)
    print(f'\nOne 3×3 convolution of 512 channels at 128×128: {rate:.0f} GMAC/s, {torch.get_num_threads()} threads')


def time_steps(steps: dict[str, Callable], repeat: int) -> None:
    with torch.inference_mode():
        for step in steps.values():
            step()
        rounds = interleave([timed(step) for step in steps.values()], repeat)
    cells = []
    for i, name in enumerate(steps):
        seconds = [results[i]['seconds'] for results in rounds]
        ratios = [results[0]['seconds'] / results[i]['seconds'] for results in rounds]
        cells.append([name, f'{1000 * statistics.median(seconds):.0f}', f'{statistics.median(ratios):.2f}',
                      f'{min(ratios):.2f} – {max(ratios):.2f}'])  # fmt: skip
    print(markdown_table(['', 'ms', 'ratio to the first', 'spread'], cells))


def timed(step: Callable) -> Callable[[], dict]:
    def measure() -> dict:
        start = time.perf_counter()
        step()
        return {'seconds': time.perf_counter() - start}

    return measure


TABLES = {
    'machine': machine,
    'upernet': lambda repeat: whole_model('UperNet', (512, 512), repeat),
    'upernet-wide': lambda repeat: whole_model('UperNet', (512, 2048), repeat),
    'fpn': lambda repeat: whole_model('FPN', (512, 512), repeat),
    'backbone': backbones,
    'head': lambda repeat: head((512, 512), repeat),
    'head-wide': lambda repeat: head((512, 2048), repeat),
    'train': training_step,
    'tail': tail,
    'tail-tta': tail_of_multi_scale,
    'loss': loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('table', nargs='*', help=f'of {", ".join(TABLES)} (all)')
    parser.add_argument('--repeat', type=int, default=5, metavar='N', help='rounds (5)')
    args = parser.parse_args()
    if unknown := sorted(set(args.table) - set(TABLES)):
        parser.error(f'no table {unknown[0]!r}: choose from {", ".join(TABLES)}')
    for table in args.table or TABLES:
        TABLES[table](args.repeat)


if __name__ == '__main__':
    run(main)
