"""Signals that ask a run to end: it ends between two iterations, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook

# SIGTERM and SIGUSR1 are what schedulers send before they kill; SIGINT is Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Inside, the first signal is noted instead of killing the process; a second SIGINT ends it at once.

    Attributes:
        received: The first signal, or None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        # Only the main thread may; elsewhere, signals do what they did.
        here = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in here}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.received = self.received or signal.Signals(number)
        hint = ''
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            hint = '; Ctrl-C again stops at once'
        line = f'{signal.Signals(number).name}: saving a checkpoint after this iteration{hint}\n'
        os.write(2, line.encode())  # to stderr; print may be what was interrupted


class StopOnSignalHook(Hook):
    """Lets a run end after the iteration in which one of its processes has received a signal.

    A data-loading worker that has died is noticed when data are fetched, see :func:`notice_dead_workers_later`.
    """

    priority = 'LOWEST'  # after the checkpoint of an interval

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        notice_dead_workers_later()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        runner.stop_if_asked(runner.iter + 1)


def notice_dead_workers_later() -> None:
    """When data are fetched: torch, once it has started workers, would raise in the middle of whatever is done."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def any_process(here: bool) -> bool:
    """Whether something holds in any process of a run; all of them ask together."""
    if get_world_size() == 1:
        return here
    somewhere = torch.tensor(float(here), device=get_device())
    all_reduce(somewhere, 'max')
    return bool(somewhere)


def outlive_signals() -> None:
    """In a data-loading worker: leave signals to the main process, which wants its data until it stops.

    Terminals and schedulers send them to all processes of a run. Of SIGTERM, the main process's own is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
