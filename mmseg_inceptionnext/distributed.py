"""Start the process group of a distributed run, and let its ranks agree."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size, init_dist
from mmengine.dist import is_main_process as is_main_process  # tools import our package first, which explains a failure
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mmseg_inceptionnext.errors import UserError, first_sentence

# The program behind each launcher, and the environment variables that it sets: rank, world size, and what mmengine
# reads besides.
_LAUNCHERS = {
    'pytorch': ('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('srun', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': ('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR'),
}


def check_launcher(launcher: str) -> None:
    """Check that this process was started by the launcher that is named.

    Raises:
        UserError: It was not, or it was started by another one.
    """
    if launcher in _LAUNCHERS:
        program, *variables = _LAUNCHERS[launcher]
        if lacking := [name for name in variables if name not in os.environ]:
            raise UserError(f'launcher={launcher!r} needs its processes started by {program}: {lacking[0]} is not set')
    elif 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ['WORLD_SIZE']) > 1:
        raise UserError(f"torchrun has started {os.environ['WORLD_SIZE']} processes: add launcher='pytorch'")


def world_size(launcher: str) -> int:
    """Return the number of processes of a run, even before its process group exists."""
    return 1 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][2]])


def rank(launcher: str) -> int:
    """Return the rank of this process, even before its process group exists."""
    return 0 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][1]])


def init_process_group(launcher: str, dist_cfg: dict | None = None) -> None:
    """Start the process group of processes that torchrun has started; mmengine starts those of SLURM and MPI.

    On CPUs the backend is gloo, which mmengine's own ``init_dist`` does not choose.

    Args:
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.
        dist_cfg: Arguments of mmengine's ``init_dist``, from the config's ``env_cfg``.

    Raises:
        UserError: The processes do not find each other, or there is no GPU for a launcher other than torchrun.
    """
    on_cpu = get_device() == 'cpu'
    if launcher in ('slurm', 'mpi') and on_cpu:
        raise UserError(f'launcher={launcher!r} needs a GPU in each process, and there is none: on CPUs use torchrun')
    if launcher != 'pytorch' or torch.distributed.is_initialized():
        return
    try:
        store, rank, size = next(rendezvous('env://'))
        group = dict(store=per_restart_store(store, rank, size), rank=rank, world_size=size)
        if on_cpu:
            torch.distributed.init_process_group('gloo', **group)
        else:
            init_dist(launcher, **(dist_cfg or {}), **group)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the processes of the run do not find each other: {first_sentence(error)}') from error


def per_restart_store(store: Store, rank: int, size: int) -> Store:
    """Return a view of the rendezvous store with a key prefix that is unique to this start or restart.

    torchrun keeps one store for all restarts, so that restarted processes read the addresses of dead ones: half of the
    restarts hang or fail to connect (https://github.com/pytorch/pytorch/issues/167288). torchrun's restart count
    cannot be the prefix: it differs between machines.

    Instead, rank 0 draws a random prefix and sends it to every id that another rank publishes. It waits for world
    size - 1 acknowledgements: an id may be that of a dead process, which never acknowledges.
    """
    me = uuid4().hex
    if rank:
        store.set(f'process {rank}', me)
        store.wait([me])
        attempt = store.get(me).decode()
        store.add(attempt, 1)
        return PrefixStore(attempt, store)
    answered = set()
    while store.add(me, 0) < size - 1:
        for key in (f'process {other}' for other in range(1, size)):
            if store.check([key]) and (name := store.get(key)) not in answered:
                store.set(name.decode(), me)
                answered.add(name)
        time.sleep(0.01)
    return PrefixStore(me, store)


def any_rank(condition: bool) -> bool:
    """Return whether a condition holds on any rank; all ranks must call this together."""
    if get_world_size() == 1:
        return condition
    anywhere = torch.tensor(float(condition), device=get_device())
    all_reduce(anywhere, 'max')
    return bool(anywhere)


def fetch_on_rank_zero_first(fetch: Callable[[str], Path], source: str) -> Path:
    """Fetch a file on rank 0, then on the others, which find it in the cache unless they are on another machine."""
    path = fetch(source) if get_rank() == 0 else None
    barrier()
    return path or fetch(source)
