"""Stop a run that no longer improves, so that it can be resumed exactly."""

from __future__ import annotations

from mmengine.hooks import EarlyStoppingHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class ResumableEarlyStoppingHook(EarlyStoppingHook):
    """mmengine's EarlyStoppingHook, which keeps its count in the checkpoint: a resumed run stops where it would have.

    A validation that has failed does not count.
    """

    priority = 'LOW'  # before the hook that saves the best checkpoint, which then holds the count

    def before_train(self, runner) -> None:
        wait, best = (runner.message_hub.get_info(f'early_stopping_{key}') for key in ('wait', 'best'))
        if runner.resumed_from and isinstance(wait, int) and isinstance(best, float):
            self.wait_count, self.best_score = wait, best

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if not metrics:
            return
        super().after_val_epoch(runner, metrics)
        runner.message_hub.update_info('early_stopping_wait', int(self.wait_count))
        runner.message_hub.update_info('early_stopping_best', float(self.best_score))
        if runner.train_loop.stop_training:
            runner.logger.info(
                f'{self.monitor} has not improved in {self.wait_count} validations: stopping after iteration '
                f'{runner.iter}'
            )
