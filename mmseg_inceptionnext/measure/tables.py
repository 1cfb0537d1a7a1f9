"""Format measurements as Markdown tables that are readable as plain text."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from mmseg_inceptionnext.command_line import markdown_table
from mmseg_inceptionnext.config_files import recipe_names, shipped_folder
from mmseg_inceptionnext.measure.complexity import Complexity
from mmseg_inceptionnext.measure.paper import imagenet_row, paper_row
from mmseg_inceptionnext.measure.speed import Speed


def complexity_table(rows: Sequence[Complexity], paper: bool = False) -> str:
    """Format parameters (M) and MACs (G), by part; optionally beside the paper's figures, with the difference."""
    header = ['config', 'shape', 'params', 'without aux', 'GMACs', 'backbone', 'neck', 'head', 'executed']
    cells = []
    for row in rows:
        parts = [f'{row.gmacs_by_part[part]:.1f}' if part in row.gmacs_by_part else '–'
                 for part in ('backbone', 'neck', 'head')]  # fmt: skip
        executed = '=' if row.gmacs_executed == row.gmacs else f'{row.gmacs_executed:.1f}'
        cells.append([
            row.config, '×'.join(map(str, row.shape)), f'{row.params_m:.1f}', f'{row.params_m_without_aux:.1f}',
            f'{row.gmacs:.1f}', *parts, executed,
        ])  # fmt: skip
    if paper:
        header += ['paper: params', 'Δ', 'paper: GMACs', 'Δ']
        for row, line in zip(rows, cells, strict=True):
            printed = imagenet_row(row.config, row.shape) or paper_row(row.config)
            line += (
                [f'{printed.params}', _difference(row.params_m, float(printed.params)),
                 f'{printed.macs}', _difference(row.gmacs, float(printed.macs))] if printed else ['–'] * 4
            )  # fmt: skip
    return markdown_table(header, cells)


def speed_table(rows: Sequence[Speed]) -> str:
    """Format median, minimum and maximum, the ratio to the first config with its spread, and memory.

    The paper's FPS and their ratio to the first config's are added where 'fps' was measured and the paper has them; for
    ImageNet models, its throughput in inference and in training.
    """
    train = any(row.fps_forward_backward is not None for row in rows)
    printed = [paper_row(row.config) if row.task == 'fps' else None for row in rows]
    header = ['config', 'images/s', 'min', 'max', 'ratio', 'spread', 'peak MB', 'layout']
    header += ['fwd+bwd'] if train else []
    header += ['paper: FPS', 'ratio'] if any(printed) else []
    imagenet = [imagenet_row(row.config, row.shape) if row.task == 'backbone' else None for row in rows]
    header += ['paper: infer', 'ratio', 'paper: train', 'ratio'] if any(imagenet) else []
    cells = []
    for i, (row, paper) in enumerate(zip(rows, printed, strict=True)):
        line = [
            row.config, f'{row.fps:.2f}', f'{row.fps_min:.2f}', f'{row.fps_max:.2f}', f'{row.ratio_to_first:.2f}',
            f'{row.ratio_min:.2f} – {row.ratio_max:.2f}', f'{row.peak_memory_mb:.0f}', row.layout,
        ]  # fmt: skip
        if train:
            line.append('–' if row.fps_forward_backward is None else f'{row.fps_forward_backward:.2f}')
        if any(printed):
            fps, first = (row.fps if row else None for row in (paper, printed[0]))
            line += [f'{fps:.1f}' if fps else '–', f'{fps / first:.2f}' if fps and first else '–']
        if any(imagenet):
            for figure in ('infer', 'train'):
                value, first = (getattr(found, figure, None) for found in (imagenet[i], imagenet[0]))
                line += [f'{value}' if value else '–', f'{value / first:.2f}' if value and first else '–']
        cells.append(line)
    return markdown_table(header, cells)


def _difference(measured: float, printed: float) -> str:
    return f'{round(measured - printed, 1) + 0.0:+.1f}'  # + 0.0: no negative zero


def recipes_table() -> str:
    """List all shipped configs, with their parameters and the mIoU on ADE20K that the paper prints."""
    parameters = {}
    for file in shipped_folder('configs').rglob('metafile.yaml'):
        for model in yaml.safe_load(file.read_text(encoding='utf-8'))['Models']:
            parameters[model['Name']] = model['Metadata']['Parameters'] / 1e6
    rows = []
    for name in recipe_names():
        paper = paper_row(name)
        million = parameters.get(name, paper.params if paper else None)
        rows.append([name, '–' if million is None else f'{million:.0f}', f'{paper.miou}' if paper else '–'])
    return markdown_table(['config', 'parameters (M)', "paper's mIoU"], rows)
