"""Download checkpoints over https."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch

from mmseg_inceptionnext.errors import UserError, first_sentence

NO_NETWORK = (
    'download it elsewhere and pass the file (init_cfg checkpoint, or weights=FILE), or train from scratch '
    "(init_cfg=None, or weights='none')"
)


def download(url: str) -> Path:
    """Download a file over https into torch's cache, unless it is there, and return its path.

    Raises:
        UserError: The URL has another scheme or names no file, or the download fails.
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
            raise UserError(f'could not download {url} ({first_sentence(error)}): {NO_NETWORK}') from error
    return path
