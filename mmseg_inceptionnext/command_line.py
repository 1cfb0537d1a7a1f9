"""What the tools share: options of the same name, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction

from mmseg_inceptionnext.errors import mistake
from mmseg_inceptionnext.files import FULL_DISK

# What `python -m mmseg_inceptionnext` calls those tools that it does not call by the name of their file.
SHORT_NAMES = {
    'check_dataset': 'check',
    'compare_reports': 'compare',
    'get_flops': 'flops',
    'make_mini_ade20k': 'mini-ade20k',
}


def command(tool: str) -> str:
    """What calls a tool the way that the running one was called, to be printed and copied.

    Args:
        tool: Name of its file, without the ending.
    """
    if 'mmseg_inceptionnext' in sys.orig_argv:
        return f'python -m mmseg_inceptionnext {SHORT_NAMES.get(tool, tool)}'
    return shlex.join(['python', str(Path(sys.argv[0]).absolute().with_name(f'{tool}.py'))])


class CfgOptions(DictAction):
    """mmengine's KEY=VALUE pairs; something else is an error of the command line, not a traceback."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if odd := [value for value in values if '=' not in value]:
            parser.error(f'argument --cfg-options: {odd[0]!r} is not of the form KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`mmseg_inceptionnext.config.load_config` takes."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (work_dirs/<folder>/<name of the config>)')
    parser.add_argument('--data-root', help='root of the data set of every dataloader')
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='what started the processes of a distributed run (none)',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help='override parts of the config'
    )


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """The option that opens :func:`mmseg_inceptionnext.checkpoints.trusting_checkpoints`."""
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='let checkpoints run any code: for files whose maker you know'
    )


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written, checked before hours are spent on what goes into it."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'cannot write {path}: {error.strerror}') from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'cannot write {path}')
    return path


def output_folder(text: str) -> Path:
    """An argparse type: a folder that can be written into; made if it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'cannot write into {path}: {error.strerror}') from error
    if not text or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f'cannot write into {text!r}')
    return path


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive whole number')
    return int(text)


def run(main: Callable[[], None]) -> None:
    """Call a tool's main function; a user's mistake ends in one line on stderr and exit code 2."""
    # The recipes average the loss as mmseg always did, over ignored pixels too, and mmseg advises against it each time.
    warnings.filterwarnings('ignore', message='Default ``avg_non_ignore`` is False')
    warnings.filterwarnings('ignore', message='``build_loss`` would be deprecated')  # mmseg 1.2.2, of itself
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback for each of its lines
    try:
        main()
        _leave_process_group()
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f'error: {error.filename or "a file"} cannot be written: {error.strerror}: make room', file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not (said := mistake(error)):
            raise
        print(f'error: {said}', file=sys.stderr)
        sys.exit(2)


def _leave_process_group() -> None:
    """End the threads of gloo before Python ends: one that lets go of a tensor later aborts the whole process."""
    if torch.distributed.is_initialized():
        gc.collect()  # of a runner, whose model wrapper would keep the group
        torch.distributed.destroy_process_group()


def each(configs: Sequence[str], measure: Callable) -> tuple[list, dict[str, str]]:
    """Apply a function to every config; one that fails does not stop the others.

    Returns:
        The results, and why the others failed: ``{config: message}``, a traceback where it is a bug.
    """
    results, failures = [], {}
    for config in configs:
        try:
            results.append(measure(config))
        except Exception as error:
            failures[config] = mistake(error) or traceback.format_exc()
    return results, failures


def fail(failures: dict[str, str]) -> None:
    """Say which configs failed, if any, after everything else: a line each and exit code 2, or 1 if one is a bug."""
    for config, message in failures.items():
        print(f'error: {config}: {message.strip()}', file=sys.stderr)
    if failures:
        sys.exit(1 if any('Traceback' in message for message in failures.values()) else 2)
