"""List the files of a folder; what cannot be a file of it is named, not left out in silence."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from functools import cache

from mmengine.fileio import LocalBackend, register_backend

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.errors import UserError


def find_files(folder: str | os.PathLike, suffixes: str | tuple[str, ...] = '') -> list[str]:
    """List the files under a folder by suffix, in any case, sorted; links are followed, hidden ones are left out.

    Links that lead nowhere are listed: whoever opens such a file says that it is missing. A link back to a folder that
    it lies in, and a pipe, socket, device or folder with such a suffix are left out, with a warning.

    Args:
        folder: Folder to search, at any depth.
        suffixes: What names end in, in lower case.

    Returns:
        Paths relative to the folder.

    Raises:
        OSError: A folder cannot be read.
    """
    found = (os.path.relpath(path, folder) for path in _walk(os.fspath(folder), suffixes, ()))
    return sorted(found, key=lambda path: path.split(os.sep))  # as pathlib sorts


def _walk(folder: str, suffixes: str | tuple[str, ...], above: tuple[os.stat_result, ...]) -> Iterator[str]:
    above = (*above, os.stat(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            is_named = entry.name.lower().endswith(suffixes)
            try:
                # Without a system call for most files: their kind comes with their name.
                status = entry.stat() if entry.is_symlink() or not entry.is_file() else None
            except FileNotFoundError:
                status = None  # a link that leads nowhere
            except OSError:  # links that lead to each other
                _leave_out(entry.path, 'its links lead to each other')
                continue
            if status is None or stat.S_ISREG(status.st_mode):
                if is_named:
                    yield entry.path
            elif not stat.S_ISDIR(status.st_mode):
                if is_named:
                    _leave_out(entry.path, 'a pipe, a socket or a device')
            elif any(os.path.samestat(status, other) for other in above):
                _leave_out(entry.path, 'a link to a folder that it lies in')
            else:
                if is_named and suffixes:
                    _leave_out(entry.path, 'a folder; the files inside are taken')
                yield from _walk(entry.path, suffixes, above)


@cache  # once: a run lists its folders several times
def _leave_out(path: str, what: str) -> None:
    say(f'{path} is left out: {what}', logging.WARNING)


def check_links(paths: list[str]) -> None:
    """Check that no path is a link that leads nowhere, as links into a disk that is not mounted do.

    Raises:
        UserError: Some do.
    """
    dangling = [path for path in paths if os.path.islink(path) and not os.path.exists(path)]
    if dangling:
        raise UserError(
            f'{len(dangling)} of {len(paths)} files are links that lead nowhere, the first {dangling[0]} to '
            f'{os.readlink(dangling[0])}: mount its disk, or remove the links'
        )


@register_backend('local', prefixes='', force=True)
class ListingBackend(LocalBackend):
    """mmengine's backend of local files, through which mmseg lists its data sets.

    mmengine's own follows a loop of links until the system refuses, and leaves out links that lead nowhere in silence.
    """

    def list_dir_or_file(self, dir_path, list_dir=True, list_file=True, suffix=None, recursive=False) -> Iterator[str]:
        if list_dir or not list_file or not recursive:
            return super().list_dir_or_file(dir_path, list_dir, list_file, suffix, recursive)
        suffixes = (suffix or '',) if suffix is None or isinstance(suffix, str) else suffix
        found = find_files(dir_path, tuple(s.lower() for s in suffixes))
        return (path for path in found if path.endswith(suffixes))
