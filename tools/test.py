"""Evaluate a trained segmentor: mIoU, mAcc, aAcc and the figures of every class; or a classifier."""

import argparse
import json
from pathlib import Path

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import (
    ToolParser,
    add_config_options,
    add_device_option,
    add_precision_option,
    add_trust_option,
    add_verbose_option,
    output_file,
    output_folder,
    positive_int,
    run,
)
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.console import quiet_screen
from mmseg_inceptionnext.device import use_device
from mmseg_inceptionnext.distributed import is_main_process
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.files import write_text


def main() -> None:
    parser = ToolParser('test', __doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', help='checkpoint of a segmentor trained with it, or an .onnx file that was exported from one'
    )
    add_config_options(parser)
    parser.add_argument(
        '--out', metavar='DIR', type=output_folder, help='write predicted label maps, coded as the annotations are'
    )
    parser.add_argument(
        '--show-dir', metavar='DIR', type=output_folder, help='write pictures of image, truth and prediction'
    )
    parser.add_argument('--json', metavar='FILE', type=output_file, help='write the metrics')
    parser.add_argument(
        '--fast',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='fold and pack the model first, for the same predictions in less time (on)',
    )
    parser.add_argument(
        '--tta', action='store_true', help='multi-scale: six sizes of the test scale and their mirror images'
    )
    parser.add_argument('--report', metavar='DIR', type=output_folder, help='write index.html and report.json')
    parser.add_argument(
        '--report-images', metavar='N', type=positive_int, default=5,
        help='how many of the worst, median and best images the report shows (5)',
    )  # fmt: skip
    parser.add_argument(
        '--temperature', choices=('fit',), help='fit what logits are divided by on the validation set, and keep it'
    )
    add_precision_option(parser, 'fp32')
    add_device_option(parser)
    add_verbose_option(parser)
    add_trust_option(parser)
    args = parser.parse_args()
    with quiet_screen(not args.verbose), trusting_checkpoints(args.trust_checkpoint):
        execute(args)


def execute(args: argparse.Namespace) -> None:
    use_device(args.device, args.launcher)
    cfg = load_config(args.config, args.work_dir, args.data_root, args.launcher, args.cfg_options, args.data)
    pictures = [str(folder) for folder in (args.out, args.show_dir) if folder]
    figures = evaluate(
        cfg, args.checkpoint, out=args.out, show_dir=args.show_dir, fast=args.fast, tta=args.tta,
        report=args.report, report_images=args.report_images,
        need_figures=bool(args.json or args.report or not pictures), precision=args.precision,
        details=args.temperature is not None, temperature=args.temperature,
        on_figures=lambda figures: show(figures, args.json),
    )  # fmt: skip
    if not is_main_process():
        return
    if figures is None:
        print(f'The test data have no annotations, so there are no metrics. Predictions are in {", ".join(pictures)}')
    elif args.report:
        print(f'Report: {args.report / "index.html"}')


def show(figures: dict, file: Path | None) -> None:
    """Print the figures of a test, and write them as JSON."""
    print(', '.join(f'{key} {value}' for key, value in figures.items() if not isinstance(value, dict)), flush=True)
    if file:
        write_text(file, json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    run(main)
