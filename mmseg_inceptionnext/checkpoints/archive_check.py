"""Check the container of a checkpoint's pickle: a zip archive, or torch's format until 1.6."""

from __future__ import annotations

import pickle
import struct
import zipfile
from io import BufferedIOBase, BytesIO
from pathlib import Path

from mmseg_inceptionnext.checkpoints.pickle_check import check_archive_pickle, check_legacy_pickles
from mmseg_inceptionnext.errors import BadCheckpoint


def refusal(path: Path, why: str) -> BadCheckpoint:
    """Return the error for a checkpoint that holds more than weights."""
    return BadCheckpoint(
        f'{path} is refused: {why}, which weights do not need. Get the weights as .safetensors or as a '
        'plain state dict; if you know who made the file and trust them, pass trust_checkpoint=True '
        '(trusting_checkpoints() in Python)'
    )


def check_checkpoint_file(path: Path) -> set[str]:
    """Check what torch does not look at: arguments of the calls in the pickle, their memory, and checksums.

    torch writes a checksum of every tensor and does not compare it: one bit that has flipped is another weight.

    Returns:
        Names of statistics that a user has registered, see :func:`check_archive_pickle`.

    Raises:
        UserError: The file is not as torch writes it.
        Exception: Any other kind, where the file is damaged.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        begin = file.read(16)
        is_zip = begin[:4] == b'PK\x03\x04'  # as torch tells its two formats apart
        file.seek(0)
        if not is_zip:
            if begin[:1] not in (b'', pickle.PROTO):  # an HTML error page, or a Git LFS pointer
                raise ValueError(f'it begins with {begin}')
            return check_legacy_pickles(file, size)
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            folder = entries[0].filename.split('/')[0]
            sizes = {entry.filename.removeprefix(f'{folder}/'): entry.file_size for entry in entries}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise refusal(path, 'it has compressed entries')
            if sum(sizes.values()) > size or len({name.casefold() for name in sizes}) < len(entries):
                raise refusal(path, 'its entries are larger than the file')
            if 'constants.pkl' in sizes:
                raise refusal(path, 'it is a program (TorchScript)')
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
            storages = {name.removeprefix('data/'): n for name, n in sizes.items() if name.startswith('data/')}
            return check_archive_pickle(BytesIO(archive.read(f'{folder}/data.pkl')), size, storages)


def _check_directory(file: BufferedIOBase, size: int) -> None:
    """Check that Python and torch, which look for a zip's directory in different ways, find the same one.

    Raises:
        zipfile.BadZipFile: They might not.
    """
    file.seek(max(size - 98, 0))
    tail = file.read()
    end, large, locator = tail[-22:], tail[:56], tail[56:76]
    where = size - 22
    _, _, _, _, _, length, start, comment = struct.unpack('<4s4H2LH', end)
    if locator[:4] == b'PK\x06\x07' and large[:4] == b'PK\x06\x06':  # zip64: above 4 GB, and always by torch
        where = size - 98
        if struct.unpack('<L', locator[4:8])[0] or struct.unpack('<Q', locator[8:16])[0] != where:
            raise zipfile.BadZipFile('its end points elsewhere')
        length, start = struct.unpack('<2Q', large[40:56])
    elif b'PK\x06\x07' in tail:
        raise zipfile.BadZipFile('its end points elsewhere')
    if end[:4] != b'PK\x05\x06' or comment or start + length != where:
        raise zipfile.BadZipFile('its directory is not at its end')
