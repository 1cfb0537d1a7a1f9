"""Stop a run between two iterations when a signal asks for it."""

from __future__ import annotations

from mmengine.hooks import Hook

from mmseg_inceptionnext.training.signals import disable_sigchld_handler


class StopOnSignalHook(Hook):
    """Stops a run after the iteration in which one of its ranks has received a signal.

    A dead data-loading worker raises when data are fetched, see
    :func:`~mmseg_inceptionnext.training.signals.disable_sigchld_handler`.
    """

    priority = 'LOWEST'  # after the checkpoint of an interval

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        disable_sigchld_handler()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        runner.stop_if_asked(runner.iter + 1)
