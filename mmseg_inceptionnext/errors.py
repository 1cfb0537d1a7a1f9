"""The exceptions that stand for a mistake their reader can mend."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line.

    The command-line tools print it without a traceback and exit with code 2; every other exception is a bug and keeps
    its traceback.
    """


class BadSample(UserError):
    """A file of the data set that cannot be used."""


class UnreadableFile(BadSample):
    """An image or an annotation that is damaged, missing, or none."""


def one_line(error: UserError) -> str:
    """The line; a data-loading worker hands its error over wrapped in a traceback, at whose end it stands."""
    for kind in (UserError, BadSample, UnreadableFile):
        *_, text = str(error).rpartition(f'{kind.__name__}: ')
        error = text
    return text.strip()
