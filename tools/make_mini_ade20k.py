"""Make a small data set of procedural scenes in ADE20K's layout and label coding."""

from mmseg_inceptionnext.command_line import ToolParser, run
from mmseg_inceptionnext.data.mini_ade20k import make_mini_ade20k


def main() -> None:
    parser = ToolParser('make_mini_ade20k', __doc__)
    parser.add_argument('--out', required=True, metavar='D', help='folder that does not exist yet')
    parser.add_argument('--train', type=int, default=64, metavar='N', help='training pairs (64)')
    parser.add_argument('--val', type=int, default=16, metavar='N', help='validation pairs (16)')
    parser.add_argument('--size', type=int, default=256, metavar='N', help='height and width in pixels (256)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of the scenes (0)')
    args = parser.parse_args()

    make_mini_ade20k(args.out, args.train, args.val, args.size, args.seed)
    print(f'{args.train} training and {args.val} validation pairs in {args.out}')


if __name__ == '__main__':
    run(main)
