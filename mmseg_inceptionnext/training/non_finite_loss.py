"""Stop a run whose loss is no longer a number, before the optimizer spoils the weights with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmseg.registry import HOOKS
from torch import nn

from mmseg_inceptionnext.errors import UserError


@HOOKS.register_module()
class StopOnNonFiniteLossHook(Hook):
    """Check every loss between the forward and the backward pass.

    The hook sits on the model's forward, the last place where the weights are still those of the iteration before.
    They are saved as a checkpoint, unless a NaN has reached the running statistics, which have seen the batch by then.

    Raises:
        UserError: naming the iteration, the losses and the checkpoint to resume from.
    """

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._handle = model.register_forward_hook(partial(self._check, runner))

    def after_train(self, runner) -> None:
        self._handle.remove()

    def _check(self, runner, model: nn.Module, inputs: tuple, losses: dict) -> None:
        if not model.training:
            return
        bad = {
            name: value
            for name, values in losses.items()
            for value in (values if isinstance(values, (list, tuple)) else [values])
            if 'loss' in name and not torch.isfinite(value).all()
        }
        # Together, so that the first process saves the weights, and none is left waiting for another.
        somewhere = torch.tensor(float(bool(bad)), device=next(model.parameters()).device)
        all_reduce(somewhere, 'max')
        if somewhere:
            named = ', '.join(f'{name}={value.mean().item()}' for name, value in bad.items())
            raise UserError(
                f'the loss is not finite at iteration {runner.iter + 1} ({named or "on another process"}); '
                f'{self._keep_checkpoint(runner, model)}. '
                'Lower the learning rate, train without --amp, or look for a broken sample, then --resume'
            )

    def _keep_checkpoint(self, runner, model: nn.Module) -> str:
        """Save the weights that led to this iteration if they are sound; say which checkpoint this run has."""
        last = runner.message_hub.get_info('last_ckpt')  # of CheckpointHook
        path = Path(runner.work_dir, f'iter_{runner.iter}.pth')
        sound = all(torch.isfinite(value).all() for value in model.state_dict().values())
        if sound and runner.iter > 0 and Path(last or '').name != path.name:
            meta = dict(iter=runner.iter, epoch=runner.epoch)
            runner.save_checkpoint(runner.work_dir, path.name, by_epoch=False, meta=meta)
            if is_main_process():
                Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
            last = str(path)
        return f'the last checkpoint is {last}' if last else 'there is no checkpoint of this run yet'
