"""Write files atomically: the old content, or the whole new one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


_made: list[Path] = []


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, unless they are there; see :func:`remove_empty_folders`.

    Raises:
        OSError: It cannot be made.
    """
    missing = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    _made.extend(folder.absolute() for folder in reversed(missing))


def remove_empty_folders() -> None:
    """Remove what :func:`make_folder` has made in this process, where nothing has come into it: a run has failed."""
    while _made:
        folder = _made.pop()
        for inside in sorted((p for p in folder.rglob('*') if p.is_dir()), reverse=True):
            with suppress(OSError):
                inside.rmdir()
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; on success it is renamed to ``path``.

    Args:
        path: Path of the file, which keeps its old content until the new one is complete.
        durable: Wait until the disk has the file (fsync), so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{secrets.token_hex(4)}.part{path.suffix}')
    try:
        yield partial
        if durable:
            fsync(partial)
        os.replace(partial, path)
        if durable:
            fsync(path.parent)  # the name is the folder's content
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_write` that a killed process has left in a folder."""
    for partial in folder.glob('.????????.part*'):
        with suppress(FileNotFoundError):
            partial.unlink()


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems, such as some on networks, cannot
            raise
    finally:
        os.close(descriptor)
