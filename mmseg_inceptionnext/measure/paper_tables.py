"""Make the paper's tables, and its Figure 3, from what is here, beside what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg_inceptionnext.command_line import markdown_table
from mmseg_inceptionnext.config_files import read_config
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.measure.paper import (
    TABLE_1,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7,
    TABLE_8,
    TABLE_9,
    TABLE_9_CONFIGS,
    TABLE_10,
    ImageNetRow,
)
from mmseg_inceptionnext.measure.tables import complexity_table
from mmseg_inceptionnext.models.token_mixers import DWConv2d, InceptionDWConv2d

IMAGENET_IMAGES = 1281167  # for training
# The first stage of InceptionNeXt-T at 224×224, for which token mixers are counted.
CHANNELS, SIDE = 96, 56
# Table 2's convolutions by the size of their kernel.
CONVOLUTIONS = {
    'conventional': lambda k: nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2),
    'depthwise': lambda k: DWConv2d(CHANNELS, k),
    'Inception': lambda k: InceptionDWConv2d(CHANNELS, band_kernel_size=k),
}


def paper_table(number: int) -> str:
    """Return a table of the paper in Markdown, with our figures beside the printed ones.

    Raises:
        UserError: There is no such table, or mmpretrain, which reads the configs of Table 9, is not installed.
    """
    if number in (1, 3, 4, 5, 8):
        return imagenet_table({1: TABLE_1, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5, 8: TABLE_8}[number])
    if number == 2:
        return token_mixer_table()
    if number in (6, 7):
        rows = TABLE_6 if number == 6 else TABLE_7
        return complexity_table([measure_complexity(config) for config in rows], paper=True)
    if number == 10:
        return drop_path_table()
    if number == 9:
        return recipe_table()
    raise UserError(f'table={number} is not in the paper: it has Tables 1 to 10')


def imagenet_table(rows: Sequence[ImageNetRow]) -> str:
    """Count the parameters (M) and MACs (G) of ImageNet classifiers, with as many digits as the paper prints."""
    header = ['row', 'model', 'image', 'params', 'paper', 'GMACs', 'paper', 'paper: train', 'infer', 'top-1']
    cells = []
    for row in rows:
        params = macs = '–'
        if row.model is not None:
            counted = measure_complexity(row.model, (row.size, row.size))
            params, macs = _like(row.params, counted.params_m), _like(row.macs, counted.gmacs)
        printed = [f'{value}' if value else '–' for value in (row.train, row.infer, row.top1)]
        cells.append([row.name, row.model or '–', f'{row.size}²', params, row.params, macs, row.macs, *printed])
    return markdown_table(header, cells)


def token_mixer_table(kernel_sizes: Sequence[int] = (3, 5, 7, 9, 11, 13)) -> str:
    """Count the weights and the MFLOPs (2 a multiply-add) of Table 2's convolutions, of 96 channels at 56×56."""
    header = ['kernel size', *(f'{name}{what}' for name in CONVOLUTIONS for what in ('', ': MFLOPs'))]
    cells = []
    for k in kernel_sizes:
        costs = [convolution_cost(make(k)) for make in CONVOLUTIONS.values()]
        cells.append([f'{k}', *(text for weights, flops in costs for text in (f'{weights}', f'{flops / 1e6:.2f}'))])
    return markdown_table(header, cells)


def convolution_cost(module: nn.Module) -> tuple[int, int]:
    """Return the number of weights without biases, and of FLOPs for 96 channels at 56×56, two a multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.to('meta')(torch.empty(1, CHANNELS, SIDE, SIDE, device='meta'))
    weights = sum(p.numel() for name, p in module.named_parameters() if name.endswith('weight'))
    return weights, counter.get_total_flops()


def drop_path_table() -> str:
    """Set the configs' peak rates of stochastic depth beside Table 10."""
    cells = []
    for family, rates in TABLE_10.items():
        for size, printed in rates.items():
            name = f'{family}/inceptionnext_{size}'
            cells.append([name, f'{read_config(name).model.backbone.drop_path_rate}', f'{printed}'])
    return markdown_table(['config', 'drop_path_rate', 'paper'], cells)


def recipe_table() -> str:
    """Set the settings of the ImageNet configs beside Table 9.

    Raises:
        UserError: mmpretrain, which reads them, is not installed.
    """
    recipes = [_recipe(read_config(config)) for config in TABLE_9_CONFIGS]
    header = ['setting', *(text for config in TABLE_9_CONFIGS for text in (config.removeprefix('imagenet/'), 'paper'))]
    cells = []
    for name, printed in TABLE_9.items():
        pairs = zip(recipes, printed, strict=True)
        cells.append([name, *(text for recipe, paper in pairs for text in (str(recipe[name]), paper))])
    return markdown_table(header, cells)


def _recipe(cfg: Config) -> dict[str, object]:
    """Return the settings of an ImageNet config by their names in Table 9."""
    batch, optimizer, model = cfg.auto_scale_lr.base_batch_size, cfg.optim_wrapper.optimizer, cfg.model
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    augments = {augment.type: augment.alpha for augment in model.train_cfg.augments}
    probs = model.train_cfg.get('probs') or [1 / len(augments)] * len(augments)
    strength = steps['RandAugment']
    *warmups, decay = cfg.param_scheduler
    ema = [1 - hook.momentum for hook in cfg.custom_hooks if hook.type == 'EMAHook']

    def epochs(iterations: int) -> int:
        return round(iterations * batch / IMAGENET_IMAGES)

    return {
        'input resolution': f'{steps["RandomResizedCrop"].scale}²',
        'epochs': epochs(cfg.train_cfg.max_iters),
        'batch size': batch,
        'optimizer': optimizer.type,
        'Adam ε': optimizer.eps,
        'Adam (β1, β2)': tuple(optimizer.betas),
        'learning rate': optimizer.lr,
        'learning rate decay': decay.type.removesuffix('AnnealingLR'),
        'gradient clipping': cfg.optim_wrapper.get('clip_grad'),
        'warmup epochs': epochs(warmups[0].end) if warmups else None,
        'weight decay': optimizer.weight_decay,
        'random augment': f'{strength.magnitude_level}/{strength.magnitude_std}'.replace('inf', 'uniform'),
        'repeated augmentation': 'on' if 'Repeat' in cfg.train_dataloader.sampler.type else 'off',
        'cutmix': augments['CutMix'],
        'mixup': augments['Mixup'],
        'cutmix-mixup switch prob': probs[0],
        'random erasing prob': steps['RandomErasing'].erase_prob,
        'label smoothing': model.head.loss.label_smooth_val,
        'peak stochastic depth rate': model.backbone.drop_path_rate,
        'dropout in classifier': model.head.dropout,
        'LayerScale initialization': 'pre-trained' if model.get('init_cfg') else model.backbone.layer_scale_init_value,
        'EMA decay rate': ema[0] if ema else None,
    }


def plot_figure_3(path: str | Path, largest: int = 31) -> None:
    """Draw the FLOPs of depthwise convolution and Inception depthwise convolution against the size of the kernel.

    Args:
        path: Path of the picture; its suffix chooses the format.
        largest: Largest kernel.

    Raises:
        UserError: The format is unknown.
    """
    sizes = range(3, largest + 1, 2)
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name in ('depthwise', 'Inception'):
        axes.plot(sizes, [convolution_cost(CONVOLUTIONS[name](k))[1] / 1e6 for k in sizes], marker='o', label=name)
    axes.set_xlabel('kernel size')
    axes.set_ylabel(f'MFLOPs ({CHANNELS} channels, {SIDE}×{SIDE})')
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic_write(Path(path)) as partial:
            figure.savefig(partial, dpi=150)
    except ValueError as error:
        raise UserError(f'out={str(path)!r}: {error}') from error


def _like(printed: str, value: float) -> str:
    """Format a value with the digits of a printed one."""
    return f'{value:.{len(printed.partition(".")[2])}f}'
