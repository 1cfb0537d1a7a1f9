"""Make a table or figure of the paper, as far as it can be counted, beside the printed one."""

from mmseg_inceptionnext.command_line import ToolParser, output_file, run
from mmseg_inceptionnext.measure.paper_tables import paper_table, plot_figure_3


def main() -> None:
    parser = ToolParser('paper', __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--table', type=int, choices=range(1, 11), help='number of the table')
    what.add_argument('--figure', type=int, choices=(3,), help='number of the figure')
    parser.add_argument('--out', type=output_file, metavar='FILE', help='picture of the figure (figure_N.png)')
    args = parser.parse_args()

    if args.table is not None:
        if args.out is not None:
            parser.error('--out is for --figure: a table is printed')
        print(paper_table(args.table))
    else:
        path = args.out or output_file(f'figure_{args.figure}.png')
        plot_figure_3(path)
        print(path)


if __name__ == '__main__':
    run(main)
