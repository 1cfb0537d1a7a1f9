"""Stop a run whose loss is NaN or infinite, before the optimizer step ruins the weights."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmseg_inceptionnext.distributed import any_rank
from mmseg_inceptionnext.errors import UserError


@HOOKS.register_module()
class StopOnNonFiniteLossHook(Hook):
    """Checks every loss between the forward and the backward pass.

    It is a forward hook of the model, so that the weights are still those of the previous iteration. Running
    statistics, which the batch has already changed, are restored. When the run stops, that state is saved, except
    under FSDP, where no rank has all weights.

    Args:
        in_a_row: Number of consecutive iterations with a non-finite loss after which the run stops; until then, only
            their optimizer steps are skipped. Default: 1, and 5 in float16, whose range ends at 65504. Overflowing
            gradients do not count there: the loss scale handles them.

    Raises:
        UserError: The loss is not finite; the message names iteration, losses, images and checkpoint.
    """

    def __init__(self, in_a_row: int | None = None):
        self.in_a_row = in_a_row

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wrapper = runner.optim_wrapper
        if self.in_a_row is None:
            self.in_a_row = 5 if isinstance(wrapper, AmpOptimWrapper) and wrapper.cast_dtype != torch.bfloat16 else 1
        self._buffers = list(model.buffers())
        self._seen, self._bad = 0, False
        self._handles = [
            model.register_forward_hook(partial(self._check, runner)),
            wrapper.optimizer.register_step_pre_hook(self._skip_step),
        ]

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._bad = False
        self._images = [sample.img_path for sample in data_batch['data_samples']]
        self._before = [buffer.clone() for buffer in self._buffers]

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self._bad:
            self._restore_buffers()  # after the backward pass, which needs them as they were in the forward pass
        else:
            self._seen = 0

    def _check(self, runner, model: nn.Module, inputs: tuple, losses: dict) -> None:
        if not model.training:
            return
        bad = {
            name: value
            for name, values in losses.items()
            for value in (values if isinstance(values, (list, tuple)) else [values])
            if 'loss' in name and not torch.isfinite(value).all()
        }
        # All ranks together, so that rank 0 saves the weights, and none waits for another.
        if not any_rank(bool(bad)):
            return
        self._seen += not self._bad  # an iteration can have several forward passes, for parts of its batch
        self._bad = True
        if self._seen >= self.in_a_row:
            self._stop(runner, model, bad)
        runner.logger.warning(
            f'The loss is not finite at iteration {runner.iter + 1} ({_named(bad)}), on {", ".join(self._images)}; '
            f'its step is skipped ({self._seen} in a row, {self.in_a_row} stop the run)'
        )

    def _skip_step(self, optimizer, *_) -> None:
        """Remove the gradients: without one, a parameter and its moments stay as they are, weight decay included."""
        if self._bad:
            optimizer.zero_grad(set_to_none=True)

    def _restore_buffers(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def _stop(self, runner, model: nn.Module, bad: dict[str, Tensor]) -> None:
        everywhere = all_gather_object((_named(bad), self._images) if bad else None)
        losses, images = zip(*filter(None, everywhere), strict=True)
        self._restore_buffers()
        # Under FSDP no rank has all weights until the backward pass is over.
        whole = not isinstance(runner.model, FullyShardedDataParallel)
        sound = whole and all(torch.isfinite(value).all() for value in model.state_dict().values())
        kept = runner.save_now(runner.iter) if sound else runner.last_checkpoint
        times = f', {self._seen} times in a row' if self._seen > 1 else ''
        raise UserError(
            f'the loss is not finite at iteration {runner.iter + 1}{times} ({", ".join(losses)}), on '
            f'{", ".join(image for process in images for image in process)}; {kept}. '
            'Lower the learning rate, drop amp=True, or look for a broken sample, then start again with resume=True'
        )


def _named(losses: dict[str, Tensor]) -> str:
    return ', '.join(f'{name}={value.mean().item()}' for name, value in losses.items())
