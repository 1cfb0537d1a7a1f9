"""Measure the speed and memory of segmentors side by side."""

import argparse
import dataclasses
import json

from rich.console import Console
from rich.progress import track

from mmseg_inceptionnext.command_line import ToolParser, exit_if_any_failed, output_file, run
from mmseg_inceptionnext.files import write_text
from mmseg_inceptionnext.measure.speed import measure_speed
from mmseg_inceptionnext.measure.tables import speed_table
from mmseg_inceptionnext.measure.timed_model import LAYOUTS, PRECISIONS, TASKS, Setting
from mmseg_inceptionnext.measure.tradeoff import plot_tradeoff


def main() -> None:
    parser = ToolParser('benchmark', __doc__)
    parser.add_argument(
        'config', nargs='+', help='config files; with --task backbone also archs of MetaNeXt and models of timm'
    )
    parser.add_argument('--checkpoint', nargs='+', default=(), metavar='C', help='one for each config (random weights)')
    parser.add_argument('--task', choices=TASKS, default='fps', help='predict, training step, or backbone alone (fps)')
    parser.add_argument(
        '--shape', nargs=2, type=int, metavar=('H', 'W'), help='size (512 512; train: the crop; backbone: 224 224)'
    )
    parser.add_argument(
        '--data', metavar='FILE', help='data file of a data set of your own, to which configs are fitted'
    )
    parser.add_argument('--data-root', metavar='D', help='time real test images from here instead of a synthetic one')
    parser.add_argument('--batch-size', type=int, metavar='N', help='(fps: 1; train: the config; backbone: 128 or 8)')
    parser.add_argument('--repeat', type=int, default=5, metavar='N', help='rounds over all configs (5)')
    parser.add_argument(
        '--precision', choices=PRECISIONS, default='fp32', help='dtype; auto: the faster of fp32 and bf16 (fp32)'
    )
    parser.add_argument('--compile', action='store_true', help='torch.compile')
    parser.add_argument('--layout', choices=LAYOUTS, help='memory layout (nchw; backbone: best)')
    parser.add_argument(
        '--fast',
        action=argparse.BooleanOptionalAction,
        default=False,
        help='fold and pack the models first, as tools/test.py does; train: take the steps of tools/train.py (off)',
    )
    parser.add_argument('--json', metavar='FILE', type=output_file, help='write the results')
    parser.add_argument(
        '--plot', metavar='FILE', type=output_file, help="draw speed against the paper's mIoU or accuracy"
    )
    args = parser.parse_args()

    setting = Setting(
        args.task, args.shape, args.data_root, args.batch_size, args.repeat, args.precision, args.compile, args.layout,
        args.fast, args.data,
    )  # fmt: skip
    bar = Console(stderr=True)
    rows, failures = measure_speed(
        args.config,
        setting,
        args.checkpoint,
        lambda rounds, total: track(rounds, description='measuring', total=total, console=bar),
    )
    if args.json:
        write_text(args.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + '\n')
    if args.plot and rows:
        plot_tradeoff(rows, args.plot)
    if rows:
        first = rows[0]
        print(
            f'{first.task} of {first.batch_size}×3×{first.shape[0]}×{first.shape[1]} in {first.dtype}, {first.rounds} '
            f'rounds, on {first.device} with {first.threads} threads, torch {first.versions["torch"]}\n'
        )
        print(speed_table(rows))
    exit_if_any_failed(failures)


if __name__ == '__main__':
    run(main)
