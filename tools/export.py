"""Export a trained segmentor to one file, ONNX or torch.export's, and compare what it computes."""

import argparse

from mmengine.config import Config

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import ToolParser, add_trust_option, non_negative_int, output_file, run
from mmseg_inceptionnext.config import override, read_config
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.export.deepness import RESOLUTION, export_for_deepness
from mmseg_inceptionnext.export.export import PRECISIONS, export
from mmseg_inceptionnext.export.quantize import NUMBER, calibration_of_config, calibration_of_folder
from mmseg_inceptionnext.inference.onnx_model import DTYPES
from mmseg_inceptionnext.inference.runtimes import RUNTIMES


def main() -> None:
    parser = ToolParser('export', __doc__)
    parser.add_argument('config', help='config file, or the name of a shipped one')
    parser.add_argument('checkpoint', help='checkpoint of a segmentor trained with it')
    parser.add_argument('--out', metavar='FILE', type=output_file, required=True, help='.onnx or .pt2')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        default=(512, 512),
        help='size of the images, before the test pipeline (512 512)',
    )
    parser.add_argument('--dynamic', action='store_true', help='any size from 32 pixels on, any number of images')
    result = parser.add_mutually_exclusive_group()
    result.add_argument('--labels', action='store_true', help='return the index of the class of each pixel')
    result.add_argument(
        '--logits', dest='labels', action='store_false', help='return the logits of all classes (default)'
    )
    parser.add_argument(
        '--confidence', action='store_true', help='return the probability of the label of each pixel as well'
    )
    parser.add_argument(
        '--input', dest='dtype', choices=DTYPES, default='uint8', help='type of the values from 0 to 255 (uint8)'
    )
    parser.add_argument(
        '--runtime', choices=RUNTIMES, help='what a .onnx is made fastest for, and compared in (onnxruntime)'
    )
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='what it computes in (fp32); bf16 and int8: .onnx; auto: bf16 where the runtime and this machine have it',
    )
    parser.add_argument(
        '--verify', metavar='N', type=non_negative_int, default=3, help='compare on N random images (3)'
    )
    parser.add_argument(
        '--images',
        nargs='+',
        metavar=('FILE|N', 'FILE'),
        default=(),
        help='compare on these, too; int8: number of images to calibrate on, and of others to compare on (100)',
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--calibrate', metavar='DIR', help='int8: images to calibrate and to compare on, without masks')
    source.add_argument(
        '--data', metavar='FILE', help='data file to fit the config to; int8: to calibrate and to compare on'
    )
    parser.add_argument(
        '--max-drop', metavar='P', type=float,
        help='int8: write nothing if it loses more points of mIoU (0.5), or with --calibrate percent of the labels (5)',
    )  # fmt: skip
    parser.add_argument(
        '--classes', metavar='ade20k|FILE', help='if the checkpoint has no names: FILE holds NAME or NAME #RRGGBB lines'
    )
    parser.add_argument('--device', default='cpu', help='device that a .pt2 is made for, and compared on (cpu)')
    parser.add_argument(
        '--for', dest='program', choices=('deepness',), help='a file for the QGIS plugin Deepness and for GeoDeep'
    )
    parser.add_argument(
        '--resolution', metavar='CM', type=float, help=f'of --for: centimetres a pixel in training ({RESOLUTION:g})'
    )
    add_trust_option(parser)
    args = parser.parse_args()
    if args.resolution is not None and not args.program:
        parser.error(f'--resolution {args.resolution:g} is for --for deepness: leave it out')
    config, images, calibration = args.config, args.images, None
    if args.precision == 'int8' and args.images:
        if len(images) > 1 or not images[0].isdecimal() or int(images[0]) < 1:
            parser.error(f'--images {" ".join(images)}: with --precision int8, it is the number of images')
        number, images = int(images[0]), ()
    else:
        number = NUMBER
    if args.data:
        config = read_config(args.config)
        override(config, data=args.data)
    if args.program:
        for_program(args, config)
        return
    if args.calibrate:
        calibration = calibration_of_folder(args.calibrate, number, args.max_drop)
    elif args.data and args.precision == 'int8':
        calibration = calibration_of_config(config, number, args.max_drop)
    elif args.max_drop is not None and args.precision != 'int8':
        parser.error('--max-drop goes with --precision int8')

    with trusting_checkpoints(args.trust_checkpoint):
        verified = export(
            config, args.checkpoint, args.out, tuple(args.shape), args.dynamic, args.labels, args.dtype,
            args.precision, args.verify, images, args.classes, args.device, args.runtime, calibration, args.confidence,
        )  # fmt: skip
    if verified.shape and verified.shape != tuple(args.shape):
        (height, width), (h, w) = verified.shape, args.shape
        print(f'The test pipeline resizes images of {w}×{h} to {width}×{height}: that is the size that the file takes')
    size = f'{args.out}: {args.out.stat().st_size / 2**20:.0f} MiB, {verified.precision}.'
    if found := verified.quantization:
        miou = f'mIoU {found.miou_int8:.2f} instead of {found.miou:.2f}, and ' if found.miou is not None else ''
        print(
            f'{size} Calibrated on {found.calibrated} images. On {found.compared} others: {miou}{found.differing:.2%} '
            'of the labels differ'
        )
        return
    logits = '' if args.labels else f'its logits are within {verified.error:.1e} of the largest, and '
    if args.confidence:
        logits += f'the confidence is within {verified.confidence_error:.1e}, and '
    print(f'{size} On {verified.images} images {logits}{verified.differing:.2%} of the labels differ (ties)')


def for_program(args: argparse.Namespace, config: str | Config) -> None:
    others = (
        args.labels,
        args.confidence,
        args.dynamic,
        args.precision != 'fp32',
        args.runtime,
        args.calibrate,
        args.max_drop is not None,
    )
    if any(others):
        raise UserError(
            '--for deepness takes tiles of one size and returns probabilities in fp32: drop the other options'
        )
    height, width = args.shape
    if height != width:
        raise UserError(f'shape={tuple(args.shape)}: --for deepness takes square tiles')
    resolution = RESOLUTION if args.resolution is None else args.resolution
    with trusting_checkpoints(args.trust_checkpoint):
        verified = export_for_deepness(
            config, args.checkpoint, args.out, height, resolution, args.verify, args.images, args.classes
        )
    print(
        f'{args.out}: {args.out.stat().st_size / 2**20:.0f} MiB, for tiles of {height}×{width} pixels of '
        f'{resolution:g} cm{" (the default of GeoDeep: --resolution sets it)" * (args.resolution is None)}. On '
        f'{verified.images} images its probabilities are within {verified.error:.1e}, and {verified.differing:.2%} of '
        'the labels differ (ties)'
    )


if __name__ == '__main__':
    run(main)
