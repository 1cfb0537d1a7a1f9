"""Make up for the validation that a resumed run has missed."""

from __future__ import annotations

from mmengine.hooks import Hook


class RepeatValidationHook(Hook):
    """Validates before the first iteration of a resumed run, if the checkpoint was saved just before a validation.

    The checkpoint of an iteration is written before its validation, whose best score and count for early stopping it
    therefore lacks; and a signal or a kill may have cut that validation short. mmengine goes on with training.
    """

    priority = 'VERY_LOW'

    def before_train_epoch(self, runner) -> None:
        loop, done = runner.train_loop, runner.iter
        if not runner.resumed_from or runner.val_loop is None or done == 0 or not hasattr(loop, 'val_interval'):
            return
        loop._decide_current_val_interval()
        is_due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == loop.max_iters)
        if is_due and runner.message_hub.get_info('validated_iteration') != done:
            runner.val_loop.run()

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if metrics:
            runner.message_hub.update_info('validated_iteration', runner.iter)
