"""Write files atomically: the old content, or the whole new one; and say in words why the system refuses a file."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmseg_inceptionnext.errors import UserError

# What the system, not a bug, makes of a file, and what can be done about it.
_ADVICE = {
    errno.ENOSPC: 'free space',
    errno.EDQUOT: 'free space',
    errno.EFBIG: 'raise the limit of file sizes (ulimit -f)',
    errno.ENOENT: 'it was moved or deleted, or its disk is not mounted',
    errno.EACCES: 'change its permissions, or choose another place',
    errno.EPERM: 'change its permissions, or choose another place',
    errno.EROFS: 'choose another place',
    errno.EISDIR: 'choose another name',
    errno.ENOTDIR: 'one of its folders is a file: choose another place',
    errno.ENAMETOOLONG: 'choose a shorter name',
    errno.ELOOP: 'its links lead to each other: remove one',
    errno.EMFILE: 'raise the limit of open files (ulimit -n), or use fewer workers',
    errno.ENFILE: 'the machine has too many open files: end other programs, or use fewer workers',
    errno.EIO: 'its disk, or the connection to it, fails',
    errno.ESTALE: 'its disk, or the connection to it, fails',
    errno.ENOTCONN: 'its disk, or the connection to it, fails',
    errno.EHOSTDOWN: 'its disk, or the connection to it, fails',
    errno.ETIMEDOUT: 'its disk, or the connection to it, fails',
    errno.ENODEV: 'its disk, or the connection to it, fails',
    errno.ENXIO: 'its disk, or the connection to it, fails',
    errno.EBUSY: 'another program uses it',
    errno.ETXTBSY: 'another program uses it',
}


def system_fault(error: BaseException) -> str:
    """Return why the system refuses a file, and what to do, as one phrase; '' for an error of any other kind."""
    if not isinstance(error, OSError) or error.errno not in _ADVICE:
        return ''
    if error.errno == errno.ENOENT and error.filename is None:  # says nothing: a bug's traceback does
        return ''
    what = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else 'a file'
    return f'{what}: {error.strerror}: {_ADVICE[error.errno]}'


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

    Raises:
        OSError: It cannot be written; the error names ``path``.
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
    except UserError:  # of what is read meanwhile
        raise
    except OSError as error:
        if error.filename in (None, str(partial)):  # None: while bytes were written
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 whatever the locale; bytes of file names that are none are escaped.

    Raises:
        OSError: It cannot be written.
    """
    with atomic_write(Path(path)) as partial:
        partial.write_text(text, encoding='utf-8', errors='backslashreplace')


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what :func:`atomic_write` has left of checkpoints, and of ``last_checkpoint``, in a killed run."""
    for pattern in ('.????????.part.pth', '.????????.part'):
        for partial in folder.glob(pattern):
            with suppress(FileNotFoundError):
                partial.unlink()


def remove_partial_files(folder: Path) -> None:
    """Remove what :func:`atomic_write` has left of files in a folder, at any depth, in killed runs."""
    for partial in folder.rglob('.????????.part*'):
        with suppress(FileNotFoundError):
            partial.unlink()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while content := file.read(2**20):
            digest.update(content)
    return digest.hexdigest()


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
