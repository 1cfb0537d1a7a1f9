"""Loops: training that accumulates gradients, and a validation that may fail."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import ParamSchedulerHook
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, ValLoop

from mmseg_inceptionnext.distributed import any_rank
from mmseg_inceptionnext.errors import UserError, one_line
from mmseg_inceptionnext.training.signals import Interrupted


@LOOPS.register_module()
class AccumulatingTrainLoop(IterBasedTrainLoop):
    """mmengine's loop, whose iteration runs a whole batch in micro-batches before the optimizer step.

    With ``optim_wrapper.accumulative_counts`` alone, mmengine counts the parts as iterations: schedules, warm-up and
    intervals would all shrink. Here the data loader yields the whole batch, in the order of a run without
    accumulation, so that resuming and :class:`~mmseg_inceptionnext.SeedAugmentation` work as without it.

    Args:
        micro_batch_size: Images in one forward pass. The data loader's batch size is a multiple of it, the quotient is
            ``optim_wrapper.accumulative_counts``.
    """

    def __init__(self, *args, micro_batch_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro_batch_size = micro_batch_size

    def run(self) -> torch.nn.Module:
        wrapper, parts = self.runner.optim_wrapper, self.dataloader.batch_size // self.micro_batch_size
        # The wrapper counts micro-batches; the runner has told it iterations.
        wrapper.initialize_count_status(self.runner.model, self._iter * parts, self._max_iters * parts)
        return super().run()

    def run_iter(self, data_batch: dict[str, Sequence]) -> None:
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=data_batch)
        size, losses = self.micro_batch_size, []
        for start in range(0, len(data_batch['inputs']), size):
            part = {key: values[start : start + size] for key, values in data_batch.items()}
            losses.append(self.runner.model.train_step(part, optim_wrapper=self.runner.optim_wrapper))
        outputs = {key: sum(loss[key] for loss in losses) / len(losses) for key in losses[0]}
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1


def validation_is_due(loop: IterBasedTrainLoop) -> bool:
    """Return whether a training loop validates after the iteration that it has reached, by mmengine's rule."""
    loop._decide_current_val_interval()
    done = loop.iter
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == loop.max_iters)


def validations_left(loop: IterBasedTrainLoop) -> int:
    """Count the validations of the iterations that a training loop has still to do."""
    start, interval = loop.iter, loop.val_interval
    number = 0
    for done in range(start + 1, loop.max_iters + 1):
        loop._iter = done
        number += validation_is_due(loop)
    loop._iter, loop.val_interval = start, interval
    return number


@LOOPS.register_module()
class TolerantValLoop(ValLoop):
    """mmengine's ValLoop; if it fails, on a bad image for example, the run logs it and goes on training.

    Such a validation has no metrics: none are computed from a part of the images. A signal ends it in the same way.
    Losses, which mmseg's segmentors do not return in validation, are not reported.

    Attributes:
        failures (dict[int, str]): Reason of each failed validation, by iteration of the run.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.failures: dict[int, str] = {}

    def run(self) -> dict:
        runner = self.runner
        runner.call_hook('before_val')
        runner.call_hook('before_val_epoch')
        runner.model.eval()
        metrics: dict = {}
        try:
            reason = self._predict()
            if not reason:
                metrics, reason = self._evaluate()
        finally:
            # On every way out: EMAHook has swapped the weights, and swaps them back.
            self._end_epoch(metrics)
        if reason:
            self._give_up(reason)
            return {}
        runner.call_hook('after_val')
        return metrics

    def _evaluate(self) -> tuple[dict, str]:
        """Return the metrics, and what went wrong or an empty string."""
        try:
            return self.evaluator.evaluate(len(self.dataloader.dataset)), ''
        except Exception:
            if get_world_size() > 1:  # the others are waiting for the metrics of rank 0
                raise
            return {}, traceback.format_exc()

    def _end_epoch(self, metrics: dict) -> None:
        """Call ``after_val_epoch`` of every hook; without metrics, those that need them are passed over."""
        if metrics:
            self.runner.call_hook('after_val_epoch', metrics=metrics)
            return
        for hook in self.runner.hooks:
            try:
                if isinstance(hook, ParamSchedulerHook):
                    continue  # it would step a scheduler that waits for a metric
                hook.after_val_epoch(self.runner, metrics={})
            except Exception as error:
                self.runner.logger.warning(f'{type(hook).__name__} needs metrics ({type(error).__name__}: {error})')

    def _predict(self) -> str:
        """Predict all images; return what went wrong on one of the ranks, or an empty string."""
        reasons: list[str] = []
        batches = None
        for index in range(len(self.dataloader)):
            with self._collecting(reasons), suppress(Interrupted), self.runner.stop_signal.while_waiting():
                batches = batches or iter(self.dataloader)
                batch = next(batches)
            if signal := self.runner.stop_signal.received:
                reasons.append(signal.name)
            # Before each forward pass, for which FSDP needs all ranks.
            if any_rank(bool(reasons)):
                break
            with self._collecting(reasons):
                self.run_iter(index, batch)
        if any_rank(bool(reasons)):
            return reasons[0] if reasons else 'it failed in another process'
        return ''

    @contextmanager
    def _collecting(self, reasons: list[str]) -> Iterator[None]:
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
        self.dataloader._iterator = None  # persistent workers, one of which may be dead
        self.runner.stop_if_asked(self.runner.iter)
