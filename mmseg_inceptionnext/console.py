"""What reaches the screen."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger

_PACKAGE = Path(__file__).parent
_is_quiet = False


def say(message: str, level: int = logging.INFO) -> None:
    """Log a message for the user: it reaches the screen also where other libraries' do not."""
    MMLogger.get_current_instance().log(level, message)


@contextmanager
def quiet_screen(quiet: bool = True) -> Iterator[None]:
    """Inside the ``with`` block, keep the messages of other libraries from the screen; log files have all of them.

    What this package says, and every error, is shown.

    Args:
        quiet: False leaves mmengine's screen as it is.
    """
    global _is_quiet
    logger = MMLogger.get_current_instance()
    before, show, handlers = _is_quiet, warnings.showwarning, logger.handlers
    _is_quiet = quiet
    if quiet:
        quieten(logger)
        warnings.showwarning = _log_warning
    try:
        yield
    finally:
        _is_quiet, warnings.showwarning, logger.handlers = before, show, handlers


def is_quiet() -> bool:
    """Return whether :func:`quiet_screen` is in force."""
    return _is_quiet


def quieten(logger: MMLogger) -> None:
    """Let a logger show what this package says, and errors; in a line without date and names."""
    logger.handlers = [h for h in logger.handlers if type(h) is not logging.StreamHandler] + [_ScreenHandler()]


class _ScreenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        path = Path(record.pathname)
        if record.levelno < logging.ERROR and not (_PACKAGE in path.parents and is_main_process()):
            return
        level = '' if record.levelno <= logging.INFO else f'{record.levelname.lower()}: '
        try:
            print(f'{level}{record.getMessage().rstrip()}', flush=True)  # to sys.stdout, which a progress bar replaces
        except (OSError, ValueError):  # a pipe that is closed, letters that the terminal does not have
            self.handleError(record)


class _ScreenFile(io.FileIO):
    """A standard stream that drops what cannot be written: a closed pipe or a full disk behind it ends no run."""

    failure: OSError | None = None

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:  # a reader that has gone, such as `head`, wants no more
                self.failure = error
            return len(data)


def protect_screen() -> None:
    """Let nothing that is printed fail: letters that the terminal cannot show are escaped, see also _ScreenFile.

    This replaces ``sys.stdout`` and ``sys.stderr``, unless somebody else has done so.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would be taken for the screen
            os.open(os.devnull, os.O_RDWR)
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f'__{name}__') or isinstance(_raw(stream), _ScreenFile):
            continue
        stream.flush()
        raw = _ScreenFile(stream.fileno(), 'wb', closefd=False)
        text = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # write_through: PYTHONUNBUFFERED
            stream.encoding,
            'backslashreplace',
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, text)
        setattr(sys, f'__{name}__', text)


def lost_output() -> str:
    """Return why a part of the output is lost since :func:`protect_screen`; '' if it is not, or nobody reads it."""
    if sys.stdout is None:
        return ''
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    return raw.failure.strerror if isinstance(raw, _ScreenFile) and raw.failure else ''


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, 'buffer', None)
    return getattr(buffer, 'raw', buffer)


def _log_warning(message, category, filename, lineno, *_) -> None:
    logger = MMLogger.get_current_instance()
    logger.handle(logger.makeRecord(logger.name, logging.WARNING, filename, lineno, f'{message}', (), None))
