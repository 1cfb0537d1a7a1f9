"""Stop a run between two iterations when a signal asks for it."""

from __future__ import annotations

from mmengine.hooks import Hook


class StopOnSignalHook(Hook):
    """Stops a run after the iteration in which one of its ranks has received a signal."""

    priority = 'LOWEST'  # after the checkpoint of an interval

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        runner.stop_if_asked(runner.iter + 1)
