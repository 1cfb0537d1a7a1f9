"""Compare two reports of tools/test.py --report: what improved and what got worse, class by class."""

from mmseg_inceptionnext.command_line import ToolParser, run
from mmseg_inceptionnext.evaluation.compare_reports import compare_reports, comparison_text, read_report


def main() -> None:
    parser = ToolParser('compare_reports', __doc__)
    parser.add_argument('a', help='folder of a report, or its report.json')
    parser.add_argument('b', help='folder of the report to compare with it')
    args = parser.parse_args()

    print(comparison_text(compare_reports(read_report(args.a), read_report(args.b))))


if __name__ == '__main__':
    run(main)
