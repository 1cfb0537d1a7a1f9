"""Exceptions for mistakes that the user can correct, and how to print them."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do, in one line.

    The command-line tools print it without a traceback and exit with code 2. Every other exception is a bug and keeps
    its traceback.
    """


# Each of these stands for one of Python's exceptions and derives from it, for other libraries that call our functions.


class MissingFile(UserError, FileNotFoundError):
    """A file that does not exist."""


class NoPermission(UserError, PermissionError):
    """A file that this user may not read."""


class MissingPackage(UserError, ImportError):
    """A package that is not installed."""


class BadCheckpoint(UserError, pickle.UnpicklingError, RuntimeError):
    """A checkpoint that is damaged, or refused; torch raises one of the others for it."""


class BadSample(UserError):
    """A file of the data set that cannot be used."""


class UnreadableFile(BadSample, OSError):
    """An image or an annotation that is damaged, missing, or no image at all."""


class MissingImage(UnreadableFile, FileNotFoundError):
    """An image that does not exist."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return advice about a name that is not known: the closest of those that are, or other advice."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'did you mean {close[0]!r}?' if close else otherwise


def one_line(error: UserError) -> str:
    """Return the message of an error as one printable line.

    A data-loading worker hands its error over inside a traceback, which ends with the message. File names can hold line
    breaks and escape codes; they are escaped, so that they do not reach the terminal.
    """
    text = str(error)
    for kind in (UserError, *UserError.__subclasses__(), UnreadableFile, MissingImage):
        text = text.rpartition(f'{kind.__name__}: ')[2]
    return printable(text.strip())


def printable(text: str) -> str:
    """Escape what cannot be printed: line breaks, escape codes, and bytes of file names that are no UTF-8."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's error; the advice after it rarely applies here."""
    return re.split(r'\.\s|\n', str(error).strip())[0]
