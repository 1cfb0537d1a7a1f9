"""The exceptions that stand for a mistake their reader can mend, and what to say of them."""

from __future__ import annotations

import difflib
import re
import traceback

from mmengine.registry import Registry
from mmseg import registry


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line.

    The command-line tools print what :func:`mistake` says, without a traceback, and exit with code 2; every other
    exception is a bug and keeps its traceback.
    """


class BadSample(UserError):
    """A file of the data set that cannot be used."""


class UnreadableFile(BadSample):
    """An image or an annotation that is damaged, missing, or none."""


def one_line(error: UserError) -> str:
    """What to print of an error.

    A data-loading worker hands it over wrapped in a traceback, at whose end it stands. What names and files contribute
    may hold line breaks and escape codes, which do not reach the terminal.
    """
    text = str(error)
    for kind in (UserError, BadSample, UnreadableFile):
        text = text.rpartition(f'{kind.__name__}: ')[2]
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text.strip())


def summary(error: BaseException) -> str:
    """The first sentence of an error: libraries put advice after it that does not apply here."""
    return re.split(r'\.\s|\n', str(error).strip())[0]


def mistake(error: Exception) -> str:
    """What to say, in one line, of the user's mistake that an exception is; '' where it may be a bug."""
    return one_line(error) if isinstance(error, UserError) else _mistake_in_config(error)


def _mistake_in_config(error: Exception) -> str:
    """What to say of an exception of mmengine's where the config is to blame; '' where it may be a bug.

    These are a ``type`` that nothing is registered under, and an argument that the class it names does not have.
    """
    text = str(error.args[0]) if error.args else ''
    if isinstance(error, KeyError) and (match := re.match(r'(\S+) is not in the (?:\w+::)?(.+?) registry', text)):
        name, kind = match.groups()
        registries = [r for r in vars(registry).values() if isinstance(r, Registry) and r.name == kind]
        known = [other for r in registries for other in (*r.module_dict, *r.parent.module_dict)]
        meant = ''.join(f'; {close} is' for close in difflib.get_close_matches(name, known, n=1))
        return (
            f'type={name!r} in the config is not the name of a {kind}{meant}: mend it, or let custom_imports import '
            'the module that registers it'
        )
    unexpected = r"(.+?)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'"
    if isinstance(error, TypeError) and (match := re.match(unexpected, text)):
        what, argument = match.groups()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # What mmengine builds an object from; an argument that is not among them was not the config's.
            given = {'build_from_cfg': 'args', 'build_dataloader': 'dataloader_cfg'}.get(frame.f_code.co_name)
            if argument in frame.f_locals.get(given, ()):
                return f'{argument} in the config is not an argument of {what}: mend its name'
    return ''
