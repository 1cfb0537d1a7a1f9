"""Segment images and videos; write overlays and label maps."""

import argparse
import signal
import sys

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import (
    ToolParser,
    add_device_option,
    add_precision_option,
    add_trust_option,
    exit_if_any_failed,
    non_negative_int,
    output_file,
    output_folder,
    positive_int,
    run,
)
from mmseg_inceptionnext.config_files import is_classifier, read_config
from mmseg_inceptionnext.inference.cam import predict_cams
from mmseg_inceptionnext.inference.classifier import Classifier
from mmseg_inceptionnext.inference.onnx_model import is_onnx
from mmseg_inceptionnext.inference.predict import count_images, predict
from mmseg_inceptionnext.inference.runtimes import RUNTIMES
from mmseg_inceptionnext.inference.segmentor import Segmentor
from mmseg_inceptionnext.inference.sources import Output, find_sources

# Options that mean nothing for maps of a class.
OF_LABELS = (
    'opacity', 'legend', 'labels', 'confidence', 'min_confidence', 'batch_size', 'tile', 'overlap', 'blend', 'bands',
    'scale', 'polygons', 'min_area', 'skip_existing', 'shard', 'precision',
)  # fmt: skip


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return value


def number_or_auto(text: str) -> int | str:
    return text if text == 'auto' else positive_int(text)


def band_list(text: str) -> tuple[int, ...]:
    return tuple(positive_int(number.strip()) for number in text.split(','))


def main() -> None:
    parser = ToolParser(
        'predict',
        __doc__,
        usage='%(prog)s (CONFIG CHECKPOINT | MODEL.onnx) INPUT … --out DIR [options]',
    )
    parser.add_argument('config', help='config file, or the name of a shipped one')
    parser.add_argument('checkpoint', help='checkpoint of a segmentor trained with it')
    parser.add_argument(
        'inputs', nargs='*', metavar='input', help='images, videos, folders, globs; - reads a list from standard input'
    )
    parser.add_argument('--out', metavar='DIR', type=output_folder, required=True, help='where the overlays go')
    parser.add_argument('--opacity', type=share, default=0.5, help='opacity of the colours, 0 to 1 (0.5)')
    parser.add_argument('--legend', action='store_true', help='name the classes below the picture')
    parser.add_argument(
        '--labels', action='store_true', help='label maps, too, coded as annotations: in ADE20K label + 1, 0 unlabelled'
    )
    parser.add_argument(
        '--confidence', action='store_true', help="the labels' probabilities, too, 255 for 1; of a GeoTIFF a band"
    )
    parser.add_argument(
        '--min-confidence',
        metavar='P',
        type=share,
        default=0,
        help='hatch labels below, and code them as 255 or nodata',
    )
    parser.add_argument(
        '--batch-size', metavar='N|auto', type=number_or_auto, default=1, help='images or tiles at once (1)'
    )
    parser.add_argument(
        '--tile',
        metavar='N|auto',
        type=number_or_auto,
        help='predict in tiles of N pixels, unresized; auto: if needed',
    )
    parser.add_argument('--overlap', metavar='N', type=non_negative_int, help='pixels that tiles share (an eighth)')
    parser.add_argument('--blend', action='store_true', help="let tiles' weights fall towards their borders")
    parser.add_argument('--bands', metavar='4,3,2', type=band_list, help='bands of a TIFF: red, green and blue')
    parser.add_argument(
        '--scale', metavar=('LOW', 'HIGH'), nargs=2, type=float, help='values of a TIFF that become 0 and 255'
    )
    parser.add_argument(
        '--polygons', metavar='FILE', type=output_file, help="polygons of a TIFF's classes, .gpkg or .geojson"
    )
    parser.add_argument(
        '--min-area', metavar='N', type=non_negative_int, default=0, help='smallest polygon, in pixels (0)'
    )
    parser.add_argument('--cam', metavar='CLASS', help='where the model looks for a class (Grad-CAM), not overlays')
    parser.add_argument(
        '--cam-layer', metavar='NAME', help='module whose feature map that is (the last stage of the backbone)'
    )
    add_device_option(parser)
    parser.add_argument('--overwrite', action='store_true', help='replace what is in DIR already')
    parser.add_argument(
        '--skip-existing', action='store_true', help='leave out what DIR/manifest.jsonl has: go on after a stop'
    )
    parser.add_argument('--shard', metavar='I/N', help='predict the I-th of N parts, for N runs that share DIR')
    parser.add_argument(
        '--classes',
        metavar='ade20k|FILE',
        help='if the checkpoint has no names: FILE holds NAME or NAME #RRGGBB lines',
    )
    parser.add_argument(
        '--fast', action=argparse.BooleanOptionalAction, default=True, help='fold and pack the model first (on)'
    )
    add_precision_option(parser, 'auto')
    parser.add_argument(
        '--runtime', choices=RUNTIMES, help='what runs a .onnx file (what it was exported for, else onnxruntime)'
    )
    parser.add_argument('--threads', metavar='N', type=positive_int, help='threads of the CPU (one for each core)')
    add_trust_option(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if is_onnx(args.config):  # tools/export.py's, which stands for config and checkpoint
        args.checkpoint, args.inputs = None, [args.checkpoint, *args.inputs]
    if args.cam_layer is not None and args.cam is None:
        parser.error('--cam-layer goes with --cam')
    given = [name for name in OF_LABELS if getattr(args, name) != parser.get_default(name)]
    if given and args.cam is not None:
        parser.error(f'--{given[0].replace("_", "-")} does not go with --cam, which only draws maps of a class')
    classifies = not is_onnx(args.config) and is_classifier(read_config(args.config))
    if classifies and args.cam is None:
        parser.error(f'{args.config} is the config of a classifier: pass --cam CLASS to draw where it looks')
    if classifies and (given := [name for name in ('classes', 'runtime') if getattr(args, name)]):
        parser.error(f'--{given[0]} is for segmentors, {args.config} is the config of a classifier')
    if not args.inputs:
        parser.error('the following arguments are required: input')

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does: what is computed is written
    output = Output(args.out, args.opacity, args.legend, args.labels, args.polygons, args.min_area,
                    args.confidence, args.min_confidence)  # fmt: skip
    lines = ()
    if '-' in args.inputs and sys.stdin is not None:
        sys.stdin.reconfigure(errors='surrogateescape')  # names of files are bytes
        lines = sys.stdin
    sources = find_sources(args.inputs, args.out, lines)
    with trusting_checkpoints(args.trust_checkpoint):
        segmentor = Classifier(args.config, args.checkpoint, args.device) if classifies else Segmentor(
            args.config, args.checkpoint, args.device, args.classes, args.fast, args.precision, args.runtime,
            tile=args.tile, overlap=args.overlap, blend=args.blend,
        )  # fmt: skip
        columns = [
            BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn('{task.fields[rate]}'),
        ]  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task('', total=None, rate='')

            def advance(images: float) -> None:
                progress.advance(task, images)
                speed = progress.tasks[0].speed
                progress.update(task, rate=f'{speed:.2f} images/s' if speed else '')

            def expect(images: int) -> None:
                progress.update(task, total=images)

            if args.cam is None:
                failures = predict(
                    segmentor, sources, output, args.batch_size, args.overwrite, advance, args.bands, args.scale,
                    args.skip_existing, args.shard, expect,
                )  # fmt: skip
            else:
                expect(count_images(sources))
                failures = predict_cams(segmentor, sources, output, args.cam, args.cam_layer, args.overwrite, advance)
    print(f'{round(progress.tasks[0].completed)} images in {args.out}')
    exit_if_any_failed(failures)


if __name__ == '__main__':
    run(main)
