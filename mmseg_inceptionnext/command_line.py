"""What all tools share: options, argument types, tables, and one-line errors."""

from __future__ import annotations

import argparse
import ast
import gc
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction

from mmseg_inceptionnext.config import user_error_message
from mmseg_inceptionnext.console import lost_output, protect_screen
from mmseg_inceptionnext.device import memory_fault, raise_open_file_limit
from mmseg_inceptionnext.errors import printable
from mmseg_inceptionnext.files import make_folder, remove_empty_folders, system_fault
from mmseg_inceptionnext.inference.precision import PRECISIONS

# What `python -m mmseg_inceptionnext` calls those tools that it does not call by the name of their file.
SHORT_NAMES = {
    'check_dataset': 'check',
    'compare_reports': 'compare',
    'get_flops': 'flops',
    'make_mini_ade20k': 'mini-ade20k',
}


def command(tool: str) -> str:
    """Return the shell command of another tool, as a script or a module like the running one.

    Args:
        tool: Name of the tool's file, without the suffix.
    """
    if 'mmseg_inceptionnext' in sys.orig_argv:
        return f'python -m mmseg_inceptionnext {SHORT_NAMES.get(tool, tool)}'
    return shlex.join(['python', str(Path(sys.argv[0]).absolute().with_name(f'{tool}.py'))])


_WITH_COMMAS = ('bands',)  # arguments whose flags take values with commas between them
# Flag of each argument of the running tool, by the argument's name.
_flags: dict[str, str] = {}


class ToolParser(argparse.ArgumentParser):
    """An ArgumentParser for a tool; it also lets errors of the library name the tool's flags.

    Args:
        tool: Name of the tool's file, without the suffix.
        description: Docstring of the tool.
    """

    def __init__(self, tool: str, description: str, **kwargs):
        super().__init__(prog=command(tool), description=description, **kwargs)

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        _flags.clear()
        _flags.update({action.dest: action.option_strings[0] for action in self._actions if action.option_strings})
        return super().parse_args(*args, **kwargs)


def name_flags(message: str, flags: dict[str, str]) -> str:
    """Replace each Python argument in a message by the flag that sets it: ``device='gpu'`` by ``--device gpu``.

    Args:
        message: Message of a library function's error.
        flags: Flag of each argument's name; other names stay as they are.
    """

    def flag(match: re.Match) -> str:
        name, text = match.groups()
        if name not in flags:
            return match[0]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # FILE, N and the like
            value = text
        if value is True:
            return flags[name]
        if isinstance(value, dict):
            value = [f'{key}={item}' for key, item in value.items()]
        values = map(str, value if isinstance(value, (tuple, list)) else [value])
        if name in _WITH_COMMAS:
            values = [','.join(values)]
        return ' '.join([flags[name], *map(printable, values)])

    # Not within a path such as runs/seed=5/iter_3.pth.
    value = r"""'[^']*'|"[^"]*"|\([^()]*\)|\{[^{}]*\}|True|None|-?\d+(?:\.\d+)?|[A-Z]+"""
    return re.sub(rf'(?<![^\s(])(\w+)=({value})(?![\w/=-]|[.,]\w)', flag, message)


class CfgOptions(DictAction):
    """mmengine's DictAction, with a usage error for what is not KEY=VALUE, or has a value that it cannot read."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if odd := [value for value in values if '=' not in value]:
            parser.error(f'argument --cfg-options: {odd[0]!r} is not of the form KEY=VALUE')
        for value in values:
            is_read = '{' not in value  # of a dict, mmengine makes texts
            try:
                super().__call__(parser, argparse.Namespace(), [value], option_string)
            except (AssertionError, RecursionError):  # at a bracket without a partner, and at dict(a=1, b=2)
                is_read = False
            if not is_read:
                parser.error(
                    f'argument --cfg-options: {value!r} cannot be read: a value is a number, a text or a list [a,b], '
                    'and what is longer, such as a dict, belongs into a config that inherits'
                )
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`mmseg_inceptionnext.config.load_config` takes."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (work_dirs/<folder>/<name of the config>)')
    parser.add_argument(
        '--data', metavar='FILE', help='data file (YAML) of a data set of your own, to which the config is fitted'
    )
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


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add the option whose value :func:`mmseg_inceptionnext.device.use_device` takes."""
    parser.add_argument('--device', help='cpu, cuda, cuda:1 … (a GPU if there is one)')


def add_precision_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option whose values are :data:`mmseg_inceptionnext.inference.precision.PRECISIONS`."""
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default=default,
        help=f'what PyTorch models compute in; auto: the faster, by a race of a second ({default})',
    )


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that gives mmengine's screen back, see :func:`mmseg_inceptionnext.console.quiet_screen`."""
    parser.add_argument('--verbose', action='store_true', help='show all that mmengine says, as the log file has it')


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that opens :func:`mmseg_inceptionnext.trusting_checkpoints`."""
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='let checkpoints run any code: only for files that you trust'
    )


def output_file(text: str) -> Path:
    """Parse the path of an output file; fail now if it cannot be written, not after hours."""
    path = Path(text)
    try:
        make_folder(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'cannot write {path}: {error.strerror}') from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'cannot write {path}')
    return path


def output_folder(text: str) -> Path:
    """Parse the path of a folder that can be written into; make it if it is missing."""
    path = Path(text)
    try:
        make_folder(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f'cannot write into {path}: {error.strerror}') from error
    if not text or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f'cannot write into {text!r}')
    return path


def positive_int(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive whole number')
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse an integer from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number')
    return int(text)


def run(main: Callable[[], None]) -> None:
    """Call a tool's main function; a user's mistake ends in one line on stderr and exit code 2.

    However it fails, folders that it has made and that are still empty are removed.
    """
    protect_screen()
    raise_open_file_limit()
    try:
        _run(main)
        if reason := lost_output():
            print(f'error: a part of the output is lost ({reason}): free space, and run it again', file=sys.stderr)
            sys.exit(2)
    except BaseException as end:
        if not (isinstance(end, SystemExit) and end.code in (None, 0)):
            remove_empty_folders()
        raise


def _run(main: Callable[[], None]) -> None:
    # The recipes keep mmseg's default, which averages the loss over ignored pixels, too; mmseg warns in every run.
    warnings.filterwarnings('ignore', message='Default ``avg_non_ignore`` is False')
    warnings.filterwarnings('ignore', message='``build_loss`` would be deprecated')  # mmseg 1.2.2 warns about itself
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback for each of its lines
    try:
        main()
        _leave_process_group()
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = _fault(error)
        if not message:
            raise
        print(f'error: {message}', file=sys.stderr)
        sys.exit(2)


def _fault(error: Exception) -> str:
    """Return what the user or the system has done wrong, as one line; '' for a bug."""
    return name_flags(user_error_message(error), _flags) or system_fault(error) or memory_fault(error)


def _leave_process_group() -> None:
    """End the threads of gloo before Python exits: freeing a tensor later would abort the process."""
    if torch.distributed.is_initialized():
        gc.collect()  # a runner's model wrapper would keep the group
        torch.distributed.destroy_process_group()


def run_each(configs: Sequence[str], measure: Callable) -> tuple[list, dict[str, str]]:
    """Apply a function to every config; one that fails does not stop the others.

    Returns:
        The results, and why the others failed: ``{config: message}``, a traceback where it is a bug.
    """
    results, failures = [], {}
    for config in configs:
        try:
            results.append(measure(config))
        except Exception as error:
            failures[config] = _fault(error) or traceback.format_exc()
    return results, failures


def exit_if_any_failed(failures: dict[str, str]) -> None:
    """Print a line for each config that failed, if any, and exit: with code 2, or 1 if one failed by a bug."""
    for config, message in failures.items():
        print(f'error: {config}: {name_flags(message.strip(), _flags)}', file=sys.stderr)
    if failures:
        sys.exit(1 if any('Traceback' in message for message in failures.values()) else 2)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with its columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return '| ' + ' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + ' |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return '\n'.join(map(line, (header, rule, *rows)))
