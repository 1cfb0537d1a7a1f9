"""The processes of a run: what starts them, and how they meet."""

from __future__ import annotations

import os
import time
from uuid import uuid4

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import init_dist
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mmseg_inceptionnext.errors import UserError, summary

# What starts the processes of a distributed run, and what it sets: the number of a process, how many there are, and
# what mmengine asks for besides.
_LAUNCHERS = {
    'pytorch': ('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('srun', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': ('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR'),
}


def check_launcher(launcher: str) -> None:
    """Make sure that the launcher which is named has started this process.

    Raises:
        UserError: it has not, or another one has.
    """
    if launcher in _LAUNCHERS:
        program, *variables = _LAUNCHERS[launcher]
        if lacking := [name for name in variables if name not in os.environ]:
            raise UserError(f'--launcher {launcher} needs its processes started by {program}: {lacking[0]} is not set')
    elif 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ['WORLD_SIZE']) > 1:
        raise UserError(f'torchrun has started {os.environ["WORLD_SIZE"]} processes: add --launcher pytorch')


def world_size(cfg: Config) -> int:
    """How many processes a run of this config has, also before they have met."""
    launcher = cfg.get('launcher', 'none')
    return 1 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][2]])


def process_number(launcher: str) -> int:
    """Which of a run's processes this is, from 0 on, also before they have met."""
    return 0 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][1]])


def meet(cfg: Config) -> None:
    """Let the processes that torchrun has started find each other; those of SLURM and MPI are left to mmengine.

    On CPUs over gloo, for which neither mmengine's own start nor its default model wrapper is made.

    Raises:
        UserError: they do not find each other, or there is no GPU for a launcher other than torchrun.
    """
    launcher, on_cpu = cfg.get('launcher', 'none'), get_device() == 'cpu'
    if launcher in ('slurm', 'mpi') and on_cpu:
        raise UserError(f'--launcher {launcher} needs a GPU in each process, and there is none: on CPUs use torchrun')
    if launcher != 'pytorch' or torch.distributed.is_initialized():
        return
    try:
        store, rank, size = next(rendezvous('env://'))
        group = dict(store=_of_this_start(store, rank, size), rank=rank, world_size=size)
        if on_cpu:
            torch.distributed.init_process_group('gloo', **group)
        else:
            init_dist(launcher, **cfg.get('env_cfg', {}).get('dist_cfg', {}), **group)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the processes of the run do not find each other: {summary(error)}') from error
    if on_cpu:
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


def _of_this_start(store: Store, rank: int, size: int) -> Store:
    """The part of a store that the processes of this start share with nobody.

    torchrun keeps one store for all its starts. Without a part of their own, processes that it has started again read
    where those before them were listening: half of the restarts hang, or are refused a connection
    (https://github.com/pytorch/pytorch/issues/167288). It does not tell which start it is, either: its count of them
    differs between machines.

    So process 0 makes up a name, and answers with it to the name that each other process has made up for itself.
    Whoever asked was started with it, if the answer is counted: a dead process's question is answered, but not counted.
    """
    me = uuid4().hex
    if rank:
        store.set(f'process {rank}', me)
        store.wait([me])
        start = store.get(me).decode()
        store.add(start, 1)
        return PrefixStore(start, store)
    answered = set()
    while store.add(me, 0) < size - 1:
        for key in (f'process {other}' for other in range(1, size)):
            if store.check([key]) and (name := store.get(key)) not in answered:
                store.set(name.decode(), me)
                answered.add(name)
        time.sleep(0.01)
    return PrefixStore(me, store)
