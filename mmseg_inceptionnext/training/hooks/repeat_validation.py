"""Make up for the validation that a resumed run has missed."""

from __future__ import annotations

from mmengine.hooks import Hook

from mmseg_inceptionnext.training.loops import validation_is_due


class RepeatValidationHook(Hook):
    """Validates before the first iteration of a resumed run, if the checkpoint was saved just before a validation.

    The checkpoint of an iteration is written before its validation, whose best score and count for early stopping it
    therefore lacks; and a signal or a kill may have cut that validation short. mmengine goes on with training.
    """

    priority = 'VERY_LOW'

    def before_train_epoch(self, runner) -> None:
        if has_missed_validation(runner):
            runner.val_loop.run()

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if metrics:
            runner.message_hub.update_info('validated_iteration', runner.iter)


def has_missed_validation(runner) -> bool:
    """Return whether a run that resumes has still to validate the iteration that it resumes from."""
    loop, done = runner.train_loop, runner.iter
    if not runner.resumed_from or runner.val_loop is None or done == 0 or not hasattr(loop, 'val_interval'):
        return False
    return validation_is_due(loop) and runner.message_hub.get_info('validated_iteration') != done
