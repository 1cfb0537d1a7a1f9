"""Read the whole data set of a config and name what would stop a training run or make it worse."""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mmseg_inceptionnext.command_line import CfgOptions, ToolParser, output_file, output_folder, positive_int, run
from mmseg_inceptionnext.config import override, read_config
from mmseg_inceptionnext.console import quiet_screen
from mmseg_inceptionnext.data.draft import draft_data_file, ignoring
from mmseg_inceptionnext.data.inspection import grouped, inspect_data, inspection_text
from mmseg_inceptionnext.device import available_cores
from mmseg_inceptionnext.files import write_text

_RECIPE = 'fpn/inceptionnext_t'  # whose model does not matter here


def main() -> None:
    parser = ToolParser('check_dataset', __doc__)
    parser.add_argument(
        'config',
        nargs='?',
        default=_RECIPE,
        help='config file, name of a shipped one, or a folder to draft a data file of',
    )
    parser.add_argument('--data', metavar='FILE', help='data file (YAML) of a data set of your own')
    parser.add_argument('--data-root', metavar='D', help='root of the data set of every dataloader')
    parser.add_argument(
        '--workers', metavar='N', type=positive_int, default=available_cores(), help='processes (one a core)'
    )
    parser.add_argument('--sample', metavar='N', type=positive_int, help='read N pairs of each split (all)')
    parser.add_argument('--json', metavar='FILE', type=output_file, help='write the result')
    parser.add_argument(
        '--report', metavar='DIR', type=output_folder, help='write pictures of ids not named, and of masks with loss'
    )
    parser.add_argument('--write', metavar='FILE', type=output_file, help='write the data file that the check proposes')
    parser.add_argument(
        '--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help='override parts of the config'
    )
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does: no process is left behind
    if Path(args.config).is_dir():
        propose(draft_data_file(args.config), args.write)
        return
    with quiet_screen():
        check(args)


def check(args: argparse.Namespace) -> None:
    cfg = read_config(args.config)
    override(cfg, args.data_root, args.cfg_options, args.data)
    bar = Console(stderr=True)
    found = inspect_data(
        cfg, args.workers, args.sample,
        lambda pairs, total: track(pairs, 'checking', total, console=bar, disable=not bar.is_terminal),
        report=args.report,
    )  # fmt: skip
    if args.json:
        write_text(args.json, json.dumps(dataclasses.asdict(found), indent=2) + '\n')

    if found.ok:
        print(inspection_text(found))
        if args.write and args.data:
            propose(ignoring(args.data), args.write)
        return
    wrong = [entry for split in found.splits.values() for entry in split.wrong]
    for line in grouped(wrong):
        print(line)
    for problem in found.problems:
        print(problem)
    if args.data and found.unnamed:
        propose(ignoring(args.data, found.unnamed), args.write)
    sys.stdout.flush()
    for warning in found.warnings:
        print(f'warning: {warning}', file=sys.stderr)
    print(f'error: {len(wrong)} wrong files and {len(found.problems)} other problems', file=sys.stderr)
    sys.exit(1)


def propose(text: str, file: Path | None) -> None:
    """Print a data file, or write it."""
    if file:
        write_text(file, text)
        print(f'Data file: {file}')
    else:
        print(f'\nA data file that would do (--write FILE keeps it):\n\n{text}')


if __name__ == '__main__':
    run(main)
