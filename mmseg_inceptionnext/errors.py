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
    """What to print of an error.

    A data-loading worker hands it over wrapped in a traceback, at whose end it stands. What names and files contribute
    may hold line breaks and escape codes, which do not reach the terminal.
    """
    text = str(error)
    for kind in (UserError, BadSample, UnreadableFile):
        text = text.rpartition(f'{kind.__name__}: ')[2]
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text.strip())
