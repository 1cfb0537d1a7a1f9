"""Signals that ask a run to stop, and what data-loading workers do with them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.utils.data._utils import signal_handling

# SIGTERM and SIGUSR1 are what schedulers send before they kill; SIGINT is Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_SAME_SIGNAL = 1.0  # seconds in which a launcher may pass on the signal that it has received itself


class Interrupted(Exception):
    """A signal has asked to stop while data were awaited, which may never come."""


class StopSignal:
    """Context manager that records the first signal, so that it does not kill; a second SIGINT or SIGTERM kills.

    Attributes:
        received: The first signal, or None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._is_waiting = False
        self._first_time: dict[int, float] = {}

    def __enter__(self) -> StopSignal:
        # Only the main thread may handle signals; in others they do what they did.
        handled = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Inside the ``with`` block, a signal raises :class:`Interrupted` at once, also one that came just before."""
        self._is_waiting = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._is_waiting = False

    def _note(self, number: int, _) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and now - self._first_time.setdefault(number, now) > _SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or signal.Signals(number)
        hint = ''
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            hint = '; Ctrl-C again stops at once'
        line = f'{signal.Signals(number).name}: saving a checkpoint after this iteration{hint}\n'
        with suppress(OSError):  # to stderr, which may be closed; print may be what was interrupted
            os.write(2, line.encode())
        if self._is_waiting:
            self._is_waiting = False
            raise Interrupted


def disable_sigchld_handler() -> None:
    """Keep torch's SIGCHLD handler out of this process: a dead worker raises when data are fetched, not anywhere.

    Call this before torch starts workers: with the first ones of a process, and only then, it installs the handler.
    Here it does so at once, and the handler is taken away. If it were taken away after the start, it could raise
    before, even while another fault of the workers is put into words.
    """
    if threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def ignore_signals_in_worker() -> None:
    """Ignore signals in a data-loading worker: the main process needs its data until it stops.

    Terminals and schedulers send signals to all processes of a run. SIGTERM from the main process itself is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
