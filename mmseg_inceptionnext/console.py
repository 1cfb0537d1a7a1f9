"""What reaches the screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        except OSError:
            self.handleError(record)


def _log_warning(message, category, filename, lineno, *_) -> None:
    logger = MMLogger.get_current_instance()
    logger.handle(logger.makeRecord(logger.name, logging.WARNING, filename, lineno, f'{message}', (), None))
