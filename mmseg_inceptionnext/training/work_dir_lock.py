"""Keep a second training out of a work dir."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NAME = '.lock'


@contextmanager
def locked(work_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a work dir: two trainings would replace each other's checkpoints. All ranks call this together.

    It is a record lock on a file. The system releases it when the process ends, however it ends, so that no lock is
    ever stale; and it holds on file systems that machines share, if these have locks.

    Raises:
        UserError: Another training has it; the error says which.
    """
    found = _lock(Path(work_dir)) if is_main_process() else -1
    fault = [found if isinstance(found, str) else '']
    broadcast_object_list(fault)
    if fault[0]:
        raise UserError(fault[0])
    try:
        yield
    finally:
        _release(Path(work_dir), found)


def holder(work_dir: str | Path) -> str:
    """Say which training has the lock of a work dir; '' if none has."""
    folder = Path(work_dir)
    if not (folder / _NAME).exists():
        return ''
    found = _lock(folder)
    if isinstance(found, str):
        return found
    _release(folder, found)
    return ''


def _lock(folder: Path) -> int | str:
    """Return the descriptor of the locked file, -1 where the file system has no locks, or who has the lock."""
    if fcntl is None:
        return -1
    path = folder / _NAME
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            content = os.read(descriptor, 4096)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return _in_use(folder, content)
            say(f'{folder} cannot be locked ({error.strerror}): take care that no other training uses it',
                logging.WARNING)  # fmt: skip
            return -1
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)  # its holder has removed it in between
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
    return descriptor


def _release(folder: Path, descriptor: int) -> None:
    if descriptor >= 0:
        with suppress(OSError):  # while it is held, so that nobody else's is removed
            (folder / _NAME).unlink()
        with suppress(OSError):
            os.close(descriptor)


def _this_process() -> dict:
    return dict(
        host=platform.node(),
        pid=os.getpid(),
        time=datetime.now().astimezone().isoformat(' ', 'seconds'),
        command=shlex.join(['python', *sys.orig_argv[1:]]),
    )


def _in_use(folder: Path, content: bytes) -> str:
    who = 'another training'
    with suppress(ValueError, KeyError, TypeError):  # it is about to be written
        facts = json.loads(content)
        who = f'process {facts["pid"]} on {facts["host"]}, since {facts["time"]} ({facts["command"]})'
    return f'{folder} is in use by {who}: wait until it ends, or choose another work_dir=DIR'
