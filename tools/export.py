"""Export a trained segmentor to one file, ONNX or torch.export's, and compare what it computes."""

import argparse

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import ToolParser, add_trust_option, output_file, run
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.export.deepness import RESOLUTION, export_for_deepness
from mmseg_inceptionnext.export.export import TOLERANCES, export
from mmseg_inceptionnext.inference.onnx_model import DTYPES


def non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number')
    return int(text)


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
        '--input', dest='dtype', choices=DTYPES, default='uint8', help='type of the values from 0 to 255 (uint8)'
    )
    parser.add_argument('--precision', choices=TOLERANCES, default='fp32', help='dtype of weights and math (fp32)')
    parser.add_argument(
        '--verify', metavar='N', type=non_negative_int, default=3, help='compare on N random images (3)'
    )
    parser.add_argument('--images', nargs='+', metavar='FILE', default=(), help='compare on these, too')
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
    if args.program:
        for_program(args)
        return
    if args.resolution is not None:
        raise UserError(f'resolution={args.resolution:g} is for --for deepness: leave it out')

    with trusting_checkpoints(args.trust_checkpoint):
        verified = export(
            args.config, args.checkpoint, args.out, tuple(args.shape), args.dynamic, args.labels, args.dtype,
            args.precision, args.verify, args.images, args.classes, args.device,
        )  # fmt: skip
    if verified.shape and verified.shape != tuple(args.shape):
        (height, width), (h, w) = verified.shape, args.shape
        print(f'The test pipeline resizes images of {w}×{h} to {width}×{height}: that is the size that the file takes')
    logits = '' if args.labels else f'its logits are within {verified.error:.1e} of the largest, and '
    print(
        f'{args.out}: {args.out.stat().st_size / 2**20:.0f} MiB. On {verified.images} images {logits}'
        f'{verified.differing:.2%} of the labels differ (ties)'
    )


def for_program(args: argparse.Namespace) -> None:
    if args.labels or args.dynamic or args.precision != 'fp32':
        raise UserError(
            '--for deepness takes tiles of one size and returns probabilities in fp32: drop the other options'
        )
    height, width = args.shape
    if height != width:
        raise UserError(f'shape={tuple(args.shape)}: --for deepness takes square tiles')
    resolution = args.resolution or RESOLUTION
    with trusting_checkpoints(args.trust_checkpoint):
        verified = export_for_deepness(
            args.config, args.checkpoint, args.out, height, resolution, args.verify, args.images, args.classes
        )
    print(
        f'{args.out}: {args.out.stat().st_size / 2**20:.0f} MiB, for tiles of {height}×{width} pixels of '
        f'{resolution:g} cm{"" if args.resolution else " (the default of GeoDeep: --resolution sets it)"}. On '
        f'{verified.images} images its probabilities are within {verified.error:.1e}, and {verified.differing:.2%} of '
        'the labels differ (ties)'
    )


if __name__ == '__main__':
    run(main)
