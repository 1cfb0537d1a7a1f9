"""Read checkpoints without running the code that they may hold.

The pickle inside a checkpoint is a program. Here it may call what builds tensors and what mmengine writes into its
checkpoints, and nothing else; a file that wants more is refused by the name of what it wants. See SECURITY.md.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer

from mmseg_inceptionnext.checkpoints.archive_check import check_checkpoint_file, refused
from mmseg_inceptionnext.checkpoints.pickle_check import HISTORY_METHODS
from mmseg_inceptionnext.errors import UserError, first_sentence

_trusted = False


def checkpoints_are_trusted() -> bool:
    """Return whether this is inside of :func:`trusting_checkpoints`."""
    return _trusted


@contextmanager
def trusting_checkpoints(trusted: bool = True) -> Iterator[None]:
    """Let checkpoints run any code while they are read inside of this context: for files whose maker you know."""
    global _trusted
    before, _trusted = _trusted, trusted
    try:
        yield
    finally:
        _trusted = before


def read_checkpoint(path: str | Path) -> dict:
    """Read a .pth or .safetensors file onto the CPU without running code from it.

    Besides tensors and plain containers, only what mmengine writes into its checkpoints is unpickled: its
    ``HistoryBuffer`` and the numpy arrays in it. Reading takes about as much memory as the file is large.

    Raises:
        UserError: There is no such file; it is truncated, damaged, of another format or a decompression bomb; or its
            pickle names a global that is not allowed, which :func:`trusting_checkpoints` overrules.
    """
    path = _existing_file(path)
    try:
        if path.suffix == '.safetensors':
            checkpoint = safetensors.torch.load_file(path)
        elif _trusted:
            checkpoint = torch.load(path, map_location='cpu', weights_only=False)
        else:
            check_checkpoint_file(path)
            with torch.serialization.safe_globals(_mmengine_globals()), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of what an error says, too
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
        if forbidden is None:
            raise UserError(f'{path} is damaged or not a checkpoint: its pickle cannot be read') from error
        raise refused(path, f'it wants to run {forbidden[1].rstrip(".")}') from error
    except PermissionError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # readers raise anything on damage: of zip, pickle, torch, numpy and safetensors
        reason = f'{type(error).__name__}: {first_sentence(error)}'.removesuffix(': ')
        raise UserError(f'{path} is truncated, damaged or not a checkpoint ({reason})') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__} where a state dict was expected')
    return checkpoint


def _existing_file(path: str | Path) -> Path:
    try:
        path = Path(path).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name that is too long, a null byte
        raise UserError(f'{str(path)[:200]} names no checkpoint: {first_sentence(error)}') from error
    if path.exists():
        raise UserError(f'{path.absolute()} is a directory, a pipe or a device: name a checkpoint')
    raise UserError(f'no checkpoint at {path.absolute()}: check the path')


def _mmengine_globals() -> list:
    """Return the globals that a checkpoint of mmengine may name, under the names that numpy 1 and 2 write."""
    array = np.array(0)
    reconstruct, scalar = array.__reduce__()[0], np.int64(0).__reduce__()[0]
    return [
        HistoryBuffer,
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(t)) for t in ('bool', 'uint8', 'int32', 'int64', 'float32', 'float64')},
        *((reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    ]


def _history_buffer_method(owner: type, name: str):
    """Stand in for ``getattr``, which a pickled HistoryBuffer calls for its statistics; refuse anything else."""
    if owner is not HistoryBuffer or name not in HISTORY_METHODS:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r} and {name!r} is not allowed')
    return getattr(owner, name)
