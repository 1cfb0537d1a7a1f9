"""Read the whole data set of a config and name what would stop a training run or make it worse."""

import dataclasses
import json
import os
import signal
import sys

from rich.console import Console
from rich.progress import track

from mmseg_inceptionnext.command_line import CfgOptions, ToolParser, output_file, positive_int, run
from mmseg_inceptionnext.config import override, read_config
from mmseg_inceptionnext.data.inspection import inspect_data, inspection_text


def main() -> None:
    parser = ToolParser('check_dataset', __doc__)
    parser.add_argument('config', help='config file, or the name of a shipped one')
    parser.add_argument('--data-root', metavar='D', help='root of the data set of every dataloader')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parser.add_argument('--workers', metavar='N', type=positive_int, default=cores, help='processes (one a core)')
    parser.add_argument('--sample', metavar='N', type=positive_int, help='read N pairs of each split (all)')
    parser.add_argument('--json', metavar='FILE', type=output_file, help='write the result')
    parser.add_argument(
        '--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help='override parts of the config'
    )
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does: no process is left behind
    cfg = read_config(args.config)
    override(cfg, args.data_root, args.cfg_options)
    bar = Console(stderr=True)
    found = inspect_data(
        cfg, args.workers, args.sample,
        lambda pairs, total: track(pairs, 'checking', total, console=bar, disable=not bar.is_terminal),
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(found), indent=2) + '\n')

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly where the list goes to `head`
    sys.stdout.reconfigure(errors='surrogateescape')  # names of files are bytes
    if found.ok:
        print(inspection_text(found))
        return
    wrong = [entry for split in found.splits.values() for entry in split.wrong]
    for entry in wrong:
        print(f'{entry["file"]}: {entry["reason"]}')
    for problem in found.problems:
        print(problem)
    sys.stdout.flush()
    for warning in found.warnings:
        print(f'warning: {warning}', file=sys.stderr)
    print(f'error: {len(wrong)} wrong files and {len(found.problems)} other problems', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
    run(main)
