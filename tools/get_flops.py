"""Count parameters and MACs of segmentors and ImageNet models, as the paper does."""

import dataclasses
import json

from mmseg_inceptionnext.command_line import ToolParser, exit_if_any_failed, output_file, run, run_each
from mmseg_inceptionnext.files import write_text
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.measure.tables import complexity_table


def main() -> None:
    parser = ToolParser('get_flops', __doc__)
    parser.add_argument(
        'config', nargs='+', help='config files; or archs of MetaNeXt, such as convnext_tiny_k3, and models of timm'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image (512 2048 for UperNet, 224 224 for ImageNet models, else 512 512)',
    )
    parser.add_argument('--paper', action='store_true', help="add the paper's figures and the difference")
    parser.add_argument('--json', metavar='FILE', type=output_file, help='write the results')
    args = parser.parse_args()

    rows, failures = run_each(args.config, lambda config: measure_complexity(config, args.shape))
    if args.json:
        keys = ('config', 'params_m', 'params_m_without_aux', 'gmacs', 'gmacs_executed', 'shape')
        figures = [{key: dataclasses.asdict(row)[key] for key in keys} for row in rows]
        write_text(args.json, json.dumps(figures, indent=2) + '\n')
    if rows:
        print(complexity_table(rows, args.paper))
    exit_if_any_failed(failures)


if __name__ == '__main__':
    run(main)
