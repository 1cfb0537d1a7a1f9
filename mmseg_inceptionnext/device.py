"""Find a device, name it and measure its memory; and the limits of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mmengine.device.utils
import torch
from mmengine.device import get_device

from mmseg_inceptionnext.errors import UserError, first_sentence


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class SharedMemory:
    """The memory through which processes hand over tensors, in bytes; without a limit where the system names none."""

    place: str
    total: int = sys.maxsize
    free: int = sys.maxsize


def shared_memory() -> SharedMemory:
    """Return the size of the shared memory; containers often have 64 MiB."""
    try:
        status = os.statvfs('/dev/shm')
    except OSError:  # macOS has none
        return SharedMemory('shared memory')
    if not status.f_blocks:  # a file system without a limit
        return SharedMemory('/dev/shm')
    return SharedMemory('/dev/shm', status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


def open_file_limit() -> int:
    """Return how many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def raise_open_file_limit() -> None:
    """Raise the number of files that this process may have open as far as its user may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names no limit, and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files() -> int:
    """Return how many files this process has open; an estimate where the system does not say."""
    folder = Path('/proc/self/fd')
    return len(list(folder.iterdir())) if folder.is_dir() else 32


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, up to 2 GiB. Does nothing where the C library is not glibc.

    glibc gives blocks of 32 MiB and more back to the system at once, and the next ones are taken anew, page by page.
    The logits of a batch at full size are such blocks: a quarter of a training step on a CPU was spent on their pages.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def memory_fault(error: BaseException) -> str:
    """Return that memory is used up, and what to do; '' for any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f'the memory of the GPU is used up ({first_sentence(error)}): take a smaller batch, or smaller images'
    if not isinstance(error, MemoryError) and "can't allocate memory" not in text and 'std::bad_alloc' not in text:
        return ''
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    allowed = '' if limit == resource.RLIM_INFINITY else f' (this process may use {limit >> 20} MiB: ulimit -v)'
    return f'memory is used up{allowed}: take a smaller batch, smaller images or fewer workers'


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device with a name. Default: a GPU if there is one.

    Raises:
        UserError: The device cannot be used here.
    """
    try:
        device = torch.device(name if name is not None else get_device())
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # what torch raises for a wrong name or an absent device
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'device={str(name)!r} cannot be used here ({reason}): choose cpu, or leave it out') from error
    return device


def use_device(name: str | None, launcher: str = 'none') -> None:
    """Let mmengine's runners in this process use a device; by default they choose a GPU, if there is one.

    Args:
        name: Name of the device, such as 'cpu' or 'cuda:1'; None changes nothing.
        launcher: What started the processes of a distributed run, which gives each its own GPU.

    Raises:
        UserError: The device cannot be used here, or a launcher has to choose it.
    """
    if name is None:
        return
    device = find_device(name)
    if launcher != 'none' and device.type != 'cpu':
        raise UserError(f'device={name!r}: with launcher={launcher!r} each process has its own: leave it out')
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)
    mmengine.device.utils.DEVICE = device.type  # what get_device returns


def multiplies_bfloat16(device: str) -> bool:
    """Return whether a kind of device has instructions for products of bfloat16. Others emulate them, slowly."""
    if device == 'cuda':  # since torch 2.4 older GPUs "support" it by emulation
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ('x86_64', 'amd64'):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name(device: str) -> str:
    """Return the GPU's model name for 'cuda', any other name as it is."""
    return torch.cuda.get_device_name() if device == 'cuda' else device


def available_memory(device: torch.device) -> int:
    """Return how many bytes this process can still have on a device; on a CPU, what system and cgroups leave it."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if not (status := Path('/proc/meminfo')).is_file():  # macOS: half of the memory there is
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    found = [1024 * int(re.search(r'MemAvailable:\s*(\d+) kB', status.read_text())[1])]
    for folder, limit, used, reclaimable in _cgroup_folders():
        with suppress(OSError, ValueError, TypeError):  # not such a cgroup, or 'max'
            pages = re.search(rf'^{reclaimable} (\d+)', (folder / 'memory.stat').read_text(), re.MULTILINE)
            held = int((folder / used).read_text()) - int(pages[1])
            found.append(max(int((folder / limit).read_text()) - held, 0))
    return min(found)


def _cgroup_folders() -> list[tuple[Path, str, str, str]]:
    """List the cgroups of this process, of version 2 and 1: folder, file of limit and use, and the files' pages."""
    found = []
    with suppress(OSError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            kind = {'': ('', 'memory.max', 'memory.current', 'inactive_file')}
            kind['memory'] = ('memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
            if controllers in kind:
                mount, *names = kind[controllers]
                inside = Path('/sys/fs/cgroup', mount, path.lstrip('/'))
                root = Path('/sys/fs/cgroup', mount)
                found += [(folder, *names) for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return found


def peak_memory_mb(device: str) -> float:
    """Return the peak memory in MiB: allocated by torch on a GPU, resident in this process on a CPU.

    Linux's ``ru_maxrss`` starts with the size that the parent had when it started this process; /proc does not.
    """
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    if status.is_file() and (found := re.search(r'VmHWM:\s*(\d+) kB', status.read_text())):
        return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
