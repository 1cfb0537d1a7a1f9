"""Read checkpoints without running what is in them, also where mmengine does the reading.

The pickle inside a checkpoint is a program. Here it may call what builds tensors and what mmengine writes into its
checkpoints, and nothing else; a file that wants more is refused by the name of what it wants. See SECURITY.md.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BufferedIOBase, BytesIO
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmseg_inceptionnext.errors import UserError, summary
from mmseg_inceptionnext.pickle_check import HISTORY_METHODS, check_archive_pickle, check_legacy_pickles

NO_NETWORK = (
    'download it elsewhere and pass the file (init_cfg checkpoint, or --weights FILE), or train from scratch '
    '(init_cfg=None, or --weights none)'
)

_trusted = False


@contextmanager
def trusting_checkpoints(trusted: bool = True) -> Iterator[None]:
    """Inside, checkpoints may run any code when they are read: for files whose maker one knows (--trust-checkpoint)."""
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
        UserError: no such file, truncated, damaged, of another format, larger inside than outside, or with a pickled
            global that is not allowed (named; :func:`trusting_checkpoints` overrules that).
    """
    path = _existing_file(path)
    try:
        if path.suffix == '.safetensors':
            checkpoint = safetensors.torch.load_file(path)
        elif _trusted:
            checkpoint = torch.load(path, map_location='cpu', weights_only=False)
        else:
            _check(path)
            with torch.serialization.safe_globals(_mmengine_globals()), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of what an error says, too
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
        if forbidden is None:
            raise UserError(f'{path} is damaged or not a checkpoint: its pickle cannot be read') from error
        raise _refused(path, f'it wants to run {forbidden[1].rstrip(".")}') from error
    except PermissionError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # readers raise anything on damage: of zip, pickle, torch, numpy and safetensors
        reason = f'{type(error).__name__}: {summary(error)}'.removesuffix(': ')
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
        raise UserError(f'{str(path)[:200]} names no checkpoint: {summary(error)}') from error
    if path.exists():
        raise UserError(f'{path.absolute()} is a directory, a pipe or a device: name a checkpoint')
    raise UserError(f'no checkpoint at {path.absolute()}: check the path')


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f'{path} is refused: {why}, which a file of weights has no need of. Get the weights as .safetensors or as a '
        'plain state dict; if you know who made the file and trust them, pass --trust-checkpoint'
    )


def _check(path: Path) -> None:
    """What torch does not look at: the arguments of what is called, how much memory that takes, and checksums.

    torch writes a checksum of every tensor and does not compare it: one bit that has flipped is another weight.

    Raises:
        UserError: it is not as torch writes it.
        Exception: of any other kind where it is damaged.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        begin = file.read(16)
        is_zip = begin[:4] == b'PK\x03\x04'  # as torch tells its two formats apart
        file.seek(0)
        if not is_zip:
            if begin[:1] not in (b'', pickle.PROTO):  # a page that a server sent instead, or a pointer of Git LFS
                raise ValueError(f'it begins with {begin}')
            check_legacy_pickles(file, size)
            return
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            folder = entries[0].filename.split('/')[0]
            sizes = {entry.filename.removeprefix(f'{folder}/'): entry.file_size for entry in entries}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _refused(path, 'it has compressed entries')
            if sum(sizes.values()) > size or len({name.casefold() for name in sizes}) < len(entries):
                raise _refused(path, 'its entries are larger than the file')
            if 'constants.pkl' in sizes:
                raise _refused(path, 'it is a program (TorchScript)')
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f'the checksum of {damaged} does not hold')
            storages = {name.removeprefix('data/'): n for name, n in sizes.items() if name.startswith('data/')}
            check_archive_pickle(BytesIO(archive.read(f'{folder}/data.pkl')), size, storages)


def _check_directory(file: BufferedIOBase, size: int) -> None:
    """Python and torch find an archive's directory in different ways, which have to lead to the same one.

    Raises:
        zipfile.BadZipFile: they might not.
    """
    file.seek(max(size - 98, 0))
    tail = file.read()
    end, large, locator = tail[-22:], tail[:56], tail[56:76]
    where = size - 22
    _, _, _, _, _, length, start, comment = struct.unpack('<4s4H2LH', end)
    if locator[:4] == b'PK\x06\x07' and large[:4] == b'PK\x06\x06':  # of an archive beyond 4 GB, or as torch writes any
        where = size - 98
        if struct.unpack('<L', locator[4:8])[0] or struct.unpack('<Q', locator[8:16])[0] != where:
            raise zipfile.BadZipFile('its end points elsewhere')
        length, start = struct.unpack('<2Q', large[40:56])
    elif b'PK\x06\x07' in tail:
        raise zipfile.BadZipFile('its end points elsewhere')
    if end[:4] != b'PK\x05\x06' or comment or start + length != where:
        raise zipfile.BadZipFile('its directory is not at its end')


def download(url: str) -> Path:
    """The local copy of a file on the web, in torch's cache.

    Raises:
        UserError: another scheme than https, no name of a file, or no way to get it.
    """
    if not url.startswith('https://'):
        raise UserError(f'{url}: weights are fetched over https:// only')
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f'{url} names no file')
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f'could not download {url} ({summary(error)}): {NO_NETWORK}') from error
    return path


def first_process_first(fetch: Callable[[str], Path], source: str) -> Path:
    """Fetch a file in the first process of a run, then in the others, which find it there unless they are elsewhere."""
    path = fetch(source) if get_rank() == 0 else None
    barrier()
    return path or fetch(source)


# What mmengine reads (`init_cfg` of other backbones, `load_from`, its Runner and its tools) goes through the same
# door: its own readers fall back to running the pickle as it is.


@CheckpointLoader.register_scheme(prefixes='', force=True)
def _read_file(filename: str, map_location=None) -> dict:
    """For mmengine, which looks for tensors on the CPU wherever they are needed.

    The configs in it are left out, unless it is trusted: resuming, mmengine's Runner executes ``meta.config``, and its
    inferencer the others.
    """
    checkpoint = read_checkpoint(filename)
    if not _trusted:
        meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
        info = hub.get('runtime_info') if isinstance(hub, dict) else None
        for holder, keys in ((meta, ('config', 'cfg')), (info, ('cfg',))):
            for key in keys if isinstance(holder, dict) else ():
                holder.pop(key, None)
    return checkpoint


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def _read_url(filename: str, map_location=None) -> dict:
    return _read_file(str(first_process_first(download, filename)))


@CheckpointLoader.register_scheme(prefixes=('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), force=True)
def _refuse_storage(filename: str, map_location=None) -> dict:
    raise UserError(f'{filename}: checkpoints are read from files and over https:// only: copy it to a file')


@CheckpointLoader.register_scheme(
    prefixes=('modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://'), force=True
)
def _read_named(filename: str, map_location=None) -> dict:
    """Of the zoos whose URLs mmengine knows."""
    zoo, name = filename.split('://')
    if zoo in ('modelzoo', 'torchvision'):
        urls = mmengine_checkpoint.get_torchvision_models()
    elif zoo == 'mmcls':
        urls = mmengine_checkpoint.get_mmcls_models()
    else:
        urls = mmengine_checkpoint.get_external_models()
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in urls:
        raise UserError(f'{filename}: mmengine knows no model of this name')
    content = _read_url(urls[name])
    return mmengine_checkpoint._process_mmcls_checkpoint(content) if zoo == 'mmcls' else content


def _mmengine_globals() -> list:
    """What the pickle inside a checkpoint of mmengine may name, under the names that numpy 1 and 2 write."""
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
    """``getattr`` as far as a pickled HistoryBuffer needs it: one of its statistics, of nothing else."""
    if owner is not HistoryBuffer or name not in HISTORY_METHODS:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r} and {name!r} is not allowed')
    return getattr(owner, name)
