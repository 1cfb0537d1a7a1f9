"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Numbers of an OSError: no space is left, or none of the user's.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write to, in the same folder and with the same ending; it becomes ``path`` if all goes well.

    Args:
        path: The file, which keeps its old content until the new is complete.
        durable: Wait until the disk has it, so that it is whole after a power failure, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{secrets.token_hex(4)}.part{path.suffix}')
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)  # the name is the folder's content
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def remove_partial_files(folder: Path) -> None:
    """What :func:`whole_file` could not tidy up in a process that was killed."""
    for partial in folder.glob('.????????.part*'):
        with suppress(FileNotFoundError):
            partial.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, such as some on networks
            raise
    finally:
        os.close(descriptor)
