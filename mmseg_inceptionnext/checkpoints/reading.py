"""Read checkpoints without running the code that they may hold.

The pickle inside a checkpoint is a program. Here it may only build tensors and what mmengine writes into its
checkpoints; a file that calls anything else is refused, and the error names the call. See SECURITY.md.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from mmseg_inceptionnext.checkpoints.archive_check import check_checkpoint_file, refusal
from mmseg_inceptionnext.checkpoints.pickle_check import METHODS
from mmseg_inceptionnext.errors import BadCheckpoint, MissingFile, NoPermission, UserError, first_sentence

MapLocation = Callable | torch.device | str | dict | None  # of torch.load

_trusted = False


def checkpoints_are_trusted() -> bool:
    """Return whether this is inside of :func:`trusting_checkpoints`."""
    return _trusted


@contextmanager
def trusting_checkpoints(trusted: bool = True) -> Iterator[None]:
    """Let checkpoints run any code while they are loaded inside this context: only for files that you trust."""
    global _trusted
    before, _trusted = _trusted, trusted
    try:
        yield
    finally:
        _trusted = before


def read_checkpoint(path: str | Path, map_location: MapLocation = 'cpu', mmap: bool = False) -> dict:
    """Read a .pth or .safetensors file without running code from it.

    Besides tensors of any kind and plain containers, only what mmengine writes into its checkpoints is unpickled: its
    ``HistoryBuffer``, numpy arrays, and functions of its schedulers. Reading takes about as much memory as the file is
    large.

    Args:
        path: Path of the file.
        map_location: Argument of ``torch.load``; .safetensors files go to the CPU, unless it is a device.
        mmap: Leave the tensors of a .pth file on the disk until they are used.

    Raises:
        UserError: There is no such file; it is truncated, damaged, of another format or a decompression bomb; or its
            pickle names a global that is not allowed, which :func:`trusting_checkpoints` overrules.
    """
    path = _existing_file(path)
    try:
        if path.suffix == '.safetensors':
            device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
            checkpoint = safetensors.torch.load_file(path, str(device))
        elif _trusted:
            checkpoint = torch.load(path, map_location, weights_only=False, mmap=mmap)
        else:
            checkpoint = _load_checked(path, map_location, mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
        if forbidden is None:
            raise BadCheckpoint(f'{path} is damaged or not a checkpoint: its pickle cannot be read') from error
        raise refusal(path, f'it wants to run {forbidden[1].rstrip(".")}') from error
    except PermissionError as error:
        raise NoPermission(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # zip, pickle, torch, numpy and safetensors raise anything
        reason = f'{type(error).__name__}: {first_sentence(error)}'.removesuffix(': ')
        raise BadCheckpoint(f'{path} is truncated, damaged or not a checkpoint ({reason})') from error
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f'{path} holds a {type(checkpoint).__name__} where a state dict was expected')
    return checkpoint


def _existing_file(path: str | Path) -> Path:
    try:
        path = Path(path).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name that is too long, a null byte
        raise MissingFile(f'{str(path)[:200]} is not a valid path: {first_sentence(error)}') from error
    if path.exists():
        raise MissingFile(f'{path.absolute()} is a directory, a pipe or a device: name a checkpoint')
    raise MissingFile(f'no checkpoint at {path.absolute()}: check the path')


def _load_checked(path: Path, map_location: MapLocation, mmap: bool) -> dict:
    statistics = check_checkpoint_file(path)
    allowed = [*_mmengine_globals(), *((_unloaded_statistic, name) for name in statistics)]
    registered = dict(HistoryBuffer._statistics_methods)
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # they come with errors, which say the same
            return torch.load(path, map_location, weights_only=True, mmap=mmap)
    finally:
        # A history registers the statistics of its file in its class, for the whole process.
        HistoryBuffer._statistics_methods.clear()
        HistoryBuffer._statistics_methods.update(registered)


def _mmengine_globals() -> list:
    """Return the globals that a checkpoint of mmengine may name, under the names that numpy 1 and 2 write."""
    array = np.array(0)
    reconstruct, scalar = array.__reduce__()[0], np.int64(0).__reduce__()[0]
    return [
        HistoryBuffer,
        OneCycleParamScheduler,
        (_method, 'builtins.getattr'),
        (_empty_bytes, 'builtins.bytes'),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDUS'},
        *((reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    ]


def _method(owner: type, name: str) -> Callable:
    """Stand in for ``getattr``, by which pickle finds the functions in :data:`METHODS`; refuse anything else."""
    if name not in METHODS.get(f'{owner.__module__}.{owner.__qualname__}', ()):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r} and {name!r} is not allowed')
    return getattr(owner, name)


def _empty_bytes() -> bytes:
    return b''


def _unloaded_statistic(*_) -> None:
    """Stand in for a statistic that a user has registered, which is code."""
    raise NotImplementedError('statistics of a HistoryBuffer are not loaded from a checkpoint: register them')
