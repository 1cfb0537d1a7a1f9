"""Data-loading workers: what they need of the system, and what becomes of one that cannot hand over a batch."""

from __future__ import annotations

import errno
import multiprocessing.queues
import multiprocessing.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from mmseg_inceptionnext.data.guard import CurrentFiles
from mmseg_inceptionnext.device import open_file_limit, open_files, shared_memory
from mmseg_inceptionnext.errors import UserError

_TENSORS_OF_A_SAMPLE = 2  # an image and its annotation; each is handed over as an open file
_FILES_OF_A_WORKER = 10  # pipes and locks
_BYTES_OF_A_WORKER = 2**16  # of shared memory, for locks and notes
_FEWER = 'use fewer workers (num_workers of this dataloader, 1 or 0), or a smaller batch'


@dataclass(frozen=True)
class Workers:
    """The workers of a data loader.

    Attributes:
        number: How many there are.
        prefetched: Batches that each prepares ahead of their use.
        batch_size: Images in a batch.
    """

    number: int
    prefetched: int
    batch_size: int

    @classmethod
    def of(cls, loader: DataLoader) -> Workers:
        return cls(loader.num_workers, loader.prefetch_factor or 0, loader.batch_size or 1)

    def __str__(self) -> str:
        workers = _count(self.number, 'worker', 'workers')
        batches, images = _count(self.prefetched, 'batch', 'batches'), _count(self.batch_size, 'image', 'images')
        return f'{workers} × {batches} of {images}'

    def check_limits(self) -> None:
        """Check, before they start, that the system lets them run.

        Raises:
            UserError: There is too little shared memory for any worker, or too few files may be open.
        """
        if not self.number:
            return
        free = shared_memory().free
        if free < (self.number + 2) * _BYTES_OF_A_WORKER:
            raise UserError(self.full())
        # A worker keeps the files of a batch open until they are received, this process until the batch is used.
        of_a_worker = self.prefetched * self.batch_size * _TENSORS_OF_A_SAMPLE
        needed = open_files() + max(self.number * (of_a_worker + _FILES_OF_A_WORKER), 2 * of_a_worker)
        if open_file_limit() < needed:
            raise UserError(self._few_files(needed))

    def fault(self, error: BaseException, batch_bytes: int = 0) -> str:
        """Say in words why a batch cannot be handed over, and what to do; '' if it is for another reason.

        Args:
            error: What was raised in a worker, or in the process that waits for it.
            batch_bytes: Size of a batch, if it is known.
        """
        text, number = str(error), getattr(error, 'errno', None)
        if number == errno.EMFILE or 'Too many open files' in text:
            return self._few_files()
        if number == errno.ENOSPC or 'memory(shm)' in text or 'Bus error' in text:
            return self.full(batch_bytes)
        return ''

    def warning(self, batch: object) -> str:
        """Say that the batches which are prefetched will not fit into shared memory; '' if they do."""
        needed, there = self.number * self.prefetched * size_of(batch), shared_memory()
        if needed <= there.total:
            return ''
        return (
            f'{there.place} has {_shown(there.total)}, {self} need {_shown(needed)}: '
            f'{_more_memory(needed)}, or {_FEWER}'
        )

    def _few_files(self, needed: int | None = None) -> str:
        need = f'{self} need about {needed}' if needed else f'which is too few for {self}'
        return f'{open_file_limit()} files may be open in a process (ulimit -n), {need}: raise the limit, or {_FEWER}'

    def full(self, batch_bytes: int = 0) -> str:
        """Say that shared memory is full, and what to do; with what is needed, if the size of a batch is known."""
        there, needed = shared_memory(), self.number * self.prefetched * batch_bytes
        need = f'; {self} need {_shown(needed)}' if needed else ''
        return (
            f'{there.place}, through which data-loading workers hand over batches, is full (it has '
            f'{_shown(there.total)}{need}): {_more_memory(needed)}, or {_FEWER}'
        )


def exit_where_a_batch_is_lost(current: CurrentFiles, workers: Workers) -> None:
    """Let this worker exit where it cannot hand over a batch: a queue drops the batch, and the run waits for ever.

    Args:
        current: Where it notes why.
        workers: It and its like.
    """

    def leave(error: BaseException, message: object = None) -> None:
        try:
            batch = message[1] if isinstance(message, tuple) and len(message) == 2 else None
            current.note_failure(workers.fault(error, size_of(batch)) or f'{type(error).__name__}: {error}')
            for left in Path('/dev/shm').glob(f'torch_{os.getpid()}_*'):  # torch leaves what it cannot fill
                left.unlink(missing_ok=True)
        finally:
            os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(leave)
    sys.excepthook = lambda kind, error, trace: leave(error)  # of the thread that hands over open files


def share_temporary_folder() -> None:
    """Let the workers that this process starts meet in one folder, which is removed when it ends.

    Workers are killed at the end: they would leave folders of their own behind.
    """
    multiprocessing.util.get_temp_dir()


def size_of(batch: object) -> int:
    """Return the bytes of all tensors in a batch, also inside dicts, lists and mmengine's samples."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    if hasattr(batch, 'all_values'):  # a sample
        return sum(map(size_of, batch.all_values()))
    if isinstance(batch, dict):
        return sum(map(size_of, batch.values()))
    return sum(map(size_of, batch)) if isinstance(batch, (list, tuple)) else 0


def _count(number: int, one: str, many: str) -> str:
    return f'{number} {one if number == 1 else many}'


def _more_memory(needed: int) -> str:
    return f'give it more (docker run --shm-size {max(1, -(-2 * needed // 2**30))}g)'


def _shown(number: float) -> str:
    for unit in ('bytes', 'KB', 'MB'):
        if number < 1024:
            return f'{number:.0f} {unit}'
        number /= 1024
    return f'{number:.1f} GB'
