"""A validation that fails, or is interrupted, without taking the run with it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

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
        if reason := self._failure():
            self._give_up(reason)
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
        """Predict all images; what went wrong in one of the processes, or an empty string."""
        reasons: list[str] = []
        batches = None
        for index in range(len(self.dataloader)):
            with self._noting(reasons):
                batches = batches or iter(self.dataloader)
                batch = next(batches)
            if signal := self.runner.stop_signal.received:
                reasons.append(signal.name)
            # Before each forward pass, for which FSDP needs all processes.
            if any_process(bool(reasons)):
                break
            with self._noting(reasons):
                self.run_iter(index, batch)
        if any_process(bool(reasons)):
            return reasons[0] if reasons else 'it failed in another process'
        return ''

    @contextmanager
    def _noting(self, reasons: list[str]) -> Iterator[None]:
        try:
            with self.runner.naming_files_of_dead_workers():
                yield
        except UserError as error:
            reasons.append(one_line(error))
        except Exception:
            reasons.append(traceback.format_exc())

    def _give_up(self, reason: str) -> None:
        self.failures[self.runner.iter] = reason
        self.runner.logger.error(f'No validation at iteration {self.runner.iter}: {reason}')
        for metric in self.evaluator.metrics:
            metric.results.clear()
        self.dataloader._iterator = None  # of persistent workers, one of which may be dead
        self.runner.stop_if_asked(self.runner.iter)
