"""The one exception that stands for a mistake its reader can mend."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line.

    The command-line tools print it without a traceback and exit with code 2; every other exception is a bug and keeps
    its traceback.
    """
