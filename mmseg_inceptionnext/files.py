"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder and with the same ending; it becomes ``path`` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{secrets.token_hex(4)}.part{path.suffix}')
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
