"""A validation that fails, or is interrupted, without taking the run with it."""

from __future__ import annotations

import traceback

from mmengine.dist import get_world_size
from mmengine.runner import ValLoop
from mmseg.registry import LOOPS

from mmseg_inceptionnext.errors import UserError, one_line
from mmseg_inceptionnext.training.stop_signal import any_process


@LOOPS.register_module()
class TolerantValLoop(ValLoop):
    """mmengine's ValLoop; where it fails, on one bad image say, the run says so and trains on.

    That validation has no figures then: none are computed of a part of the images. A signal ends it in the same way.
    Losses, which mmseg's segmentors do not return in validation, are not reported.

    Attributes:
        failures (dict[int, str]): Why, by iteration of the run.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.failures: dict[int, str] = {}

    def run(self) -> dict:
        runner = self.runner
        runner.call_hook('before_val')
        runner.call_hook('before_val_epoch')
        runner.model.eval()
        reason = self._failure()
        # Together, so that none waits for the results of another.
        if any_process(bool(reason)):
            self._give_up(reason or 'it failed in another process')
            return {}
        try:
            metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        except Exception:
            if get_world_size() > 1:  # the others are waiting for the first's figures
                raise
            self._give_up(traceback.format_exc())
            return {}
        runner.call_hook('after_val_epoch', metrics=metrics)
        runner.call_hook('after_val')
        return metrics

    def _failure(self) -> str:
        """Predict all images; what went wrong, or an empty string."""
        try:
            with self.runner.naming_files_of_dead_workers():
                for index, batch in enumerate(self.dataloader):
                    if signal := self.runner.stop_signal.received:
                        return signal.name
                    self.run_iter(index, batch)
        except UserError as error:
            return one_line(error)
        except Exception:
            return traceback.format_exc()
        return ''

    def _give_up(self, reason: str) -> None:
        self.failures[self.runner.iter] = reason
        self.runner.logger.error(f'No validation at iteration {self.runner.iter}: {reason}')
        for metric in self.evaluator.metrics:
            metric.results.clear()
        self.dataloader._iterator = None  # of persistent workers, one of which may be dead
        self.runner.stop_if_asked(self.runner.iter)
