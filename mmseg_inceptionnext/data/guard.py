"""Guard data loading: name the file that a worker was reading, and stop at files that cannot be read, or skip them."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from mmseg_inceptionnext.data.transforms import vanishing_fault
from mmseg_inceptionnext.errors import UnreadableFile, UserError, one_line
from mmseg_inceptionnext.files import system_fault
from mmseg_inceptionnext.images import check_is_file, why_unreadable

# What Pillow and OpenCV raise on damaged files, and on images that are too thin to be resized.
_DAMAGE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError, cv2.error)

_MOST_IN_A_ROW = 50  # so many unreadable files in a row are no accident


_ROW = 4096  # bytes that a worker may note


class CurrentFiles:
    """The files that each data-loading worker is reading, in memory that the main process shares.

    Args:
        workers: Number of workers.
    """

    def __init__(self, workers: int):
        if multiprocessing.get_start_method() == 'fork' and workers:
            # Not in /dev/shm: where that is full, writing a note would kill the worker.
            self._rows = torch.frombuffer(mmap.mmap(-1, workers * _ROW), dtype=torch.uint8).view(workers, _ROW)
        else:
            self._rows = torch.zeros(workers, _ROW, dtype=torch.uint8).share_memory_()

    def note(self, files: str) -> None:
        """Note the files that this worker is about to open."""
        self._write('files', files)

    def note_failure(self, reason: str) -> None:
        """Note why this worker exits, if it is for another reason than a file."""
        self._write('reason', reason)

    def files_of(self, pid: int) -> str | None:
        """Return the files that the worker of a process id noted last; None if there is no such worker."""
        return self._last(pid, 'files')

    def failure_of(self, pid: int) -> str | None:
        """Return why the worker of a process id has exited; None if it has not said."""
        return self._last(pid, 'reason')

    def _write(self, kind: str, text: str) -> None:
        if worker := get_worker_info():
            content = f'{os.getpid()} {kind} {text}'.encode(errors='replace')[: self._rows.shape[1]]
            row = self._rows[worker.id].numpy()
            row[: len(content)] = np.frombuffer(content, np.uint8)
            row[len(content) :] = 0

    def _last(self, pid: int, kind: str) -> str | None:
        for row in self._rows.numpy():
            begin, _, text = row.tobytes().rstrip(b'\0').decode(errors='replace').partition(f' {kind} ')
            if begin == str(pid):
                return text
        return None


class GuardedPipeline(Compose):
    """A pipeline that names the files of a sample on which it fails.

    Args:
        pipeline: Pipeline to wrap.
        current: Record of the files that each worker reads.
        skipped: File that lists unreadable files, a line each time; mmengine's data sets then draw other samples.
            Default: an unreadable file is an error.

    Raises:
        UnreadableFile: An image or annotation cannot be read.
        RuntimeError: Any other failure, with its cause.
    """

    def __init__(self, pipeline: Compose, current: CurrentFiles, skipped: Path | None = None):
        super().__init__(pipeline.transforms)
        self.current, self.skipped, self.in_a_row = current, skipped, 0

    def __call__(self, results: dict) -> dict | None:
        files = [results[key] for key in ('img_path', 'seg_map_path') if results.get(key)]
        self.current.note(' and '.join(files))
        try:
            sample = super().__call__(results)
        except UnreadableFile as error:
            return self._skip(error)
        except UserError:
            raise
        except _DAMAGE as error:
            if 'ori_shape' in results and (fault := vanishing_fault(results['ori_shape'][::-1], results.get('scale'))):
                return self._skip(UnreadableFile(f'{results["img_path"]} {fault}'))
            reason = why_unreadable(error).strip().splitlines()[-1]
            return self._skip(UnreadableFile(f'{_culprit(files)} cannot be used: {reason}'))
        except Exception as error:
            raise RuntimeError(f'the pipeline failed on {" and ".join(files)}') from error
        self.in_a_row = 0
        return sample

    def _skip(self, error: UnreadableFile) -> None:
        self.in_a_row += 1
        if self.skipped is None:
            raise error
        if self.in_a_row == _MOST_IN_A_ROW:
            raise UnreadableFile(f'{_MOST_IN_A_ROW} files in a row cannot be read, the last: {error}') from error
        try:
            # One write, so that lines of several workers stay whole.
            with self.skipped.open('a', encoding='utf-8') as file:
                file.write(f'{one_line(error)}\n')
        except OSError as failure:
            if not system_fault(failure):
                raise


def guard_pipelines(dataset: Dataset, current: CurrentFiles, skipped: Path | None) -> None:
    """Put a :class:`GuardedPipeline` around the pipeline of a data set, in place, also inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for child in filter(None, inner):
        guard_pipelines(child, current, skipped)
    pipeline = getattr(dataset, 'pipeline', None)
    if isinstance(pipeline, Compose):
        dataset.pipeline = GuardedPipeline(pipeline, current, skipped)


def _culprit(files: list[str]) -> str:
    """Return the files of a sample that cannot be read alone; all if each can."""
    return ' and '.join([file for file in files if not _readable(file)] or files)


def _readable(file: str) -> bool:
    try:
        check_is_file(file)
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter('ignore')
            image.load()
    except _DAMAGE:
        return False
    return True
