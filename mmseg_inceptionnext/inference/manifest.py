"""The record of a prediction: which files are done, so that a run can be killed, repeated, and shared out.

``manifest.jsonl`` lies in the output folder. Its first line says what decides the results of the run; then comes a line
for each file. Each shard of a run appends to a manifest of its own, and whichever is done last merges all into one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import atomic_write, file_digest, remove_partial_files
from mmseg_inceptionnext.inference.sources import Source

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NAME = 'manifest.jsonl'
_SHARDS = 'manifest.*-of-*.jsonl'


class Manifest:
    """The manifest of an output folder, and the lock of the part that this process writes; a context manager.

    Args:
        folder: The output folder.
        shard: The part of the run that this process does, as ``i/n``; None for all.

    Attributes:
        run: What the folder's run has recorded about itself; None before :meth:`begin` in a new folder.

    Raises:
        UserError: The manifest is damaged, or another process writes it.
    """

    def __init__(self, folder: Path, shard: str | None = None):
        self._folder, self._main = folder, folder / _NAME
        self._path = folder / f'manifest.{shard.replace("/", "-of-")}.jsonl' if shard else self._main
        self._lock, self._file, self._start, self._added = threading.Lock(), None, 0, False
        self._entries: dict[str, dict] = {}
        self.run = None
        folder.mkdir(parents=True, exist_ok=True)
        for path in [self._main, *sorted(folder.glob(_SHARDS))]:
            with suppress(FileNotFoundError):  # a shard's, which is being merged
                self._take(path)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether a folder has a manifest."""
        return (folder / _NAME).exists()

    def _take(self, path: Path) -> None:
        for line in _lines(path):
            if 'run' not in line:
                self._entries[line['file']] = line
            elif self.run is None:
                self.run = line['run']
            elif self.run != line['run']:
                raise UserError(f'{path} is of another run than {self._main}: remove the wrong one of them')

    @property
    def has_results(self) -> bool:
        """Whether any file has been predicted."""
        return any('reason' not in entry for entry in self._entries.values())

    def restart(self) -> None:
        """Forget what is recorded.

        Raises:
            UserError: Another process writes it.
        """
        paths = [self._main, *self._folder.glob(_SHARDS)]
        if in_use := [path for path in paths if _is_in_use(path)]:
            raise _in_use_error(in_use[0])
        for path in paths:
            path.unlink(missing_ok=True)
        self._entries, self.run = {}, None

    def begin(self, run: Mapping) -> None:
        """Record what decides the results, unless the folder's run has done so, and get ready to add files.

        Args:
            run: Plain values by name. Afterwards :attr:`run` has those of whoever came first.

        Raises:
            UserError: Another process writes the same part.
        """
        self.run = _first(self._main, self.run or dict(run))
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = os.fdopen(descriptor, 'r+b', buffering=0)
        if not _locked(descriptor):
            self._file.close()
            self._file = None
            raise _in_use_error(self._path)
        self._start = _end(self._file)
        self._file.truncate(self._start)  # a line that a kill has cut
        self._file.seek(self._start)
        if not self._start:  # a shard's
            self._write(dict(run=self.run))

    def check(self, run: Mapping) -> None:
        """Check that the folder's run is this one.

        Raises:
            UserError: They differ; the error says in what.
        """
        run = json.loads(json.dumps(run))  # tuples become lists
        for key in [*self.run, *run]:
            was, now = (_short(values.get(key)) for values in (self.run, run))
            if self.run.get(key) != run.get(key):
                raise UserError(
                    f'{self._main} is of another run: its {key} was {was}, now it is {now}: choose another out=DIR, '
                    'or pass overwrite=True alone to begin anew'
                )

    def is_done(self, source: Source, outputs: Sequence[Path]) -> bool:
        """Return whether a file has been predicted as it is now, and its outputs are there."""
        entry = self._entries.get(str(source.path))
        if entry is None or 'reason' in entry or entry['output'] != str(source.name):
            return False
        try:
            status = source.path.stat()
            if status.st_size != entry['size']:
                return False
            is_same = status.st_mtime_ns == entry['modified'] or file_digest(source.path) == entry['hash']
        except OSError:
            return False
        return is_same and all(path.exists() for path in outputs)

    def check_outputs(self, source: Source, outputs: Sequence[Path], shared: Path | None = None) -> None:
        """Check that the outputs of a file, where they are there, were not made from another one.

        Args:
            source: The file.
            outputs: Its outputs.
            shared: The one of them that every file of the run has, if there is one.

        Raises:
            UserError: They were; the error names the other file.
        """
        there = [path for path in outputs if path.exists()]
        for entry in self._entries.values():
            if 'reason' in entry or entry['file'] == str(source.path):
                continue
            made = [path for path in there if path == shared or entry['output'] == str(source.name)]
            if made and entry['hash'] != self.facts(source).get('hash'):
                raise UserError(
                    f'{made[0]} was made from {entry["file"]}, not from {source.path}: choose another out=DIR, or pass '
                    'overwrite=True alone to begin anew'
                )

    def facts(self, source: Source) -> dict:
        """Return what is recorded about a file before it is predicted; it is read once for its hash."""
        facts = dict(file=str(source.path), output=str(source.name))
        with suppress(OSError):  # whoever opens it next says why
            status = source.path.stat()
            facts |= dict(size=status.st_size, modified=status.st_mtime_ns, hash=file_digest(source.path))
        return facts

    def add(self, facts: Mapping, seconds: float, **found) -> None:
        """Record a file whose outputs are written, or that cannot be read.

        Args:
            facts: What :meth:`facts` returned.
            seconds: What the file has taken, without waiting.
            found: ``classes``, the share of the pixels of each, or the ``reason`` why there are none.

        Raises:
            OSError: It cannot be written; no part of it is then.
        """
        entry = dict(facts, seconds=round(seconds, 4), **found)
        with self._lock:
            self._write(entry)
            self._entries[entry['file']] = entry
            self._added = True

    def _write(self, line: dict) -> None:
        start, content = self._file.tell(), _line(line)
        try:
            while content:  # a disk that fills takes a part first
                content = content[self._file.write(content) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)
            self._file.seek(start)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def finish(self, sources: Sequence[Source]) -> None:
        """Merge all parts into one manifest, sorted by file, once all files have a line; remove what killed runs left.

        Args:
            sources: All files of the run, those of other shards as well.
        """
        self._close()
        with _exclusive(self._main) as is_alone:
            parts = sorted(self._folder.glob(_SHARDS))
            if not is_alone or any(map(_is_in_use, parts)):
                return  # a shard that will be done later
            self._entries = {}
            for path in [self._main, *parts]:
                self._take(path)
            if any(str(source.path) not in self._entries for source in sources):
                return
            remove_partial_files(self._folder)
            with atomic_write(self._main) as partial, open(partial, 'wb') as file:
                file.write(_line(dict(run=self.run)))
                file.writelines(_line(self._entries[key]) for key in sorted(self._entries))
            for path in parts:
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            if self._path != self._main and not self._start and not self._added:  # nothing was left to do
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind and self._file is not None and self._path == self._main and not self._entries:
            self._main.unlink(missing_ok=True)
        self._close()


def _line(value: Mapping) -> bytes:
    return json.dumps(value).encode() + b'\n'


def _lines(path: Path) -> Iterator[dict]:
    """Yield the lines of a manifest, but for one that is cut at its end."""
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b'\n'):
                return
            try:
                value = json.loads(line)
                if not ('run' in value or {'file', 'output'} <= set(value)):
                    raise ValueError(f'it has only {set(value)}')
            except (ValueError, TypeError) as error:
                raise UserError(
                    f'{path}: line {number} is damaged: remove the line, and its file is predicted again'
                ) from error
            yield value


def _end(file) -> int:
    """Return where the last whole line of an open file ends."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b'\n'):
            break
        end += len(line)
    return end


def _first(path: Path, run: dict) -> dict:
    """Write the first line of a manifest, unless another process does so first; return what is there then."""
    partial = path.with_name(f'.{os.urandom(4).hex()}.part{path.suffix}')
    try:
        partial.write_bytes(_line(dict(run=run)))
        try:
            os.link(partial, path)  # which fails where there is a file; a rename would replace it
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK) or path.exists():
                raise
            os.replace(partial, path)  # a file system without hard links
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}') from error
    finally:
        partial.unlink(missing_ok=True)
    return next(_lines(path))['run']


def _short(value) -> str:
    text = str(value)
    return f'{text[:12]}…' if len(text) == 64 and isinstance(value, str) else text


def _locked(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        say(f'the manifest cannot be locked ({error.strerror}): take care that no other run writes into this folder',
            logging.WARNING)  # fmt: skip
    return True


def _in_use_error(path: Path) -> UserError:
    return UserError(f'{path} is being written by another run: wait until it ends')


def _is_in_use(path: Path) -> bool:
    try:
        with open(path, 'r+b') as file:
            return not _locked(file.fileno())
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Wait for the lock of a file that its holders replace; yield False where it is gone."""
    while True:
        try:
            file = open(path, 'r+b')  # noqa: SIM115  closed below
        except FileNotFoundError:
            yield False
            return
        with file:
            _locked(file.fileno(), wait=True)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    yield True
                    return
