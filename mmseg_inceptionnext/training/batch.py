"""The effective batch of a run, which a recipe's learning rate is made for, and gradient accumulation that keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import LOOPS

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.processes import world_size


@dataclass(frozen=True)
class EffectiveBatch:
    """How many images an optimizer step sees.

    Attributes:
        processes: Of the run, a GPU each.
        per_process: Images that go through the network of a process at once.
        accumulation: How often they do before the optimizer steps.
        recipe: What the config is made for, if it says so.
    """

    processes: int
    per_process: int
    accumulation: int
    recipe: int | None

    @property
    def images(self) -> int:
        return self.processes * self.per_process * self.accumulation

    def __str__(self) -> str:
        return f'{self.images} = {self.processes} × {self.per_process} × {self.accumulation}'

    @property
    def warning(self) -> str | None:
        """What is wrong with it, and what helps; None where the recipe holds."""
        if self.recipe in (None, self.images):
            return None
        return (
            f'the effective batch is {self} (processes × images × accumulation), the recipe is made for {self.recipe}: '
            '--auto-batch keeps it by accumulating gradients'
        )


def effective_batch(cfg: Config) -> EffectiveBatch:
    """The batch that a run of a config will have; the recipe's stands in ``auto_scale_lr.base_batch_size``."""
    accumulation = cfg.optim_wrapper.get('accumulative_counts', 1)
    per_process = cfg.train_cfg.get('micro_batch_size') or cfg.train_dataloader.batch_size
    return EffectiveBatch(
        world_size(cfg), per_process, accumulation, (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    )


def use_auto_batch(cfg: Config) -> None:
    """Change a config, in place, so that an optimizer step sees the recipe's batch on the processes that there are.

    An iteration stays an optimizer step: ``max_iters``, warm-up and all intervals mean what they meant.

    Raises:
        UserError: the config does not say which batch it is made for, does without iterations, accumulates already, or
            its batch cannot be divided by the processes.
    """
    batch = effective_batch(cfg)
    if batch.recipe is None:
        raise UserError(
            '--auto-batch: the config does not say which batch it is made for: set auto_scale_lr.base_batch_size'
        )
    if cfg.train_cfg.get('type') != 'IterBasedTrainLoop' or batch.accumulation != 1:
        raise UserError(
            '--auto-batch needs train_cfg.type IterBasedTrainLoop and optim_wrapper.accumulative_counts 1, the config '
            f'has {cfg.train_cfg.get("type")} and {batch.accumulation}'
        )
    share, rest = divmod(batch.recipe, batch.processes)
    if rest or share < 1:
        raise UserError(
            f'--auto-batch: a batch of {batch.recipe} cannot be divided by {batch.processes} processes: use others'
        )
    per_process = min(batch.per_process, share)
    if share % per_process:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f'--auto-batch: {share} images of a process cannot be taken {per_process} at a time: '
            f'set train_dataloader.batch_size to one of {divisors}'
        )
    cfg.train_dataloader.batch_size = share
    cfg.optim_wrapper.accumulative_counts = share // per_process
    cfg.train_cfg.update(type='AccumulatingTrainLoop', micro_batch_size=per_process)


@LOOPS.register_module()
class AccumulatingTrainLoop(IterBasedTrainLoop):
    """mmengine's loop, whose iteration takes a whole batch through the network in parts and then steps.

    With ``optim_wrapper.accumulative_counts`` alone, mmengine counts the parts as iterations: schedules, warm-up and
    intervals would all shrink. Here the data loader yields the whole batch, in the order of a run without
    accumulation, so that resuming and :class:`~mmseg_inceptionnext.SeedAugmentation` work as ever.

    Args:
        micro_batch_size: Images of a part; the data loader's batch size is a multiple of it, and the quotient is
            ``optim_wrapper.accumulative_counts``.
    """

    def __init__(self, *args, micro_batch_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro_batch_size = micro_batch_size

    def run(self) -> torch.nn.Module:
        wrapper, parts = self.runner.optim_wrapper, self.dataloader.batch_size // self.micro_batch_size
        # The wrapper counts parts; the runner has told it iterations.
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
