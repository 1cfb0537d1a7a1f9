"""The machine that something was measured on."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """Which GPU 'cuda' is; other devices go by the name that torch gives them."""
    return torch.cuda.get_device_name() if device == 'cuda' else device


def peak_memory_mb(device: str) -> float:
    """The largest sum of what torch has allocated on a GPU, or on a CPU the largest resident size of this process.

    Linux's ``ru_maxrss`` begins with the size that the parent had when it started this process; /proc does not.
    """
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    if status.is_file() and (found := re.search(r'VmHWM:\s*(\d+) kB', status.read_text())):
        return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
