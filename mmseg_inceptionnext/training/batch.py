"""The effective batch size of a run, which the learning rate depends on."""

from __future__ import annotations

from dataclasses import dataclass

from mmengine.config import Config

from mmseg_inceptionnext.distributed import world_size
from mmseg_inceptionnext.errors import UserError


@dataclass(frozen=True)
class EffectiveBatch:
    """How many images an optimizer step sees.

    Attributes:
        processes: World size of the run.
        per_process: Images in one forward pass of a process.
        accumulation: Forward passes before the optimizer steps.
        recipe: Batch size that the config is made for, or None.
        per_iteration: Images in an iteration: fewer, where a step takes several iterations, as mmengine accumulates.
    """

    processes: int
    per_process: int
    accumulation: int
    recipe: int | None
    per_iteration: int

    @property
    def images(self) -> int:
        return self.processes * self.per_process * self.accumulation

    def __str__(self) -> str:
        return f'{self.images} = {self.processes} × {self.per_process} × {self.accumulation}'

    @property
    def warning(self) -> str | None:
        """Warning if the batch size is not the recipe's, else None."""
        if self.recipe in (None, self.images):
            return None
        return (
            f'the effective batch is {self} (processes × images × accumulation), the recipe is made for {self.recipe}: '
            '--auto-batch keeps it by accumulating gradients'
        )


def effective_batch(cfg: Config) -> EffectiveBatch:
    """Return the effective batch of a config; the recipe's is ``auto_scale_lr.base_batch_size``."""
    accumulation = cfg.optim_wrapper.get('accumulative_counts', 1)
    per_process = cfg.train_cfg.get('micro_batch_size') or cfg.train_dataloader.batch_size
    recipe = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    processes = world_size(cfg.get('launcher', 'none'))
    per_iteration = processes * cfg.train_dataloader.batch_size
    return EffectiveBatch(processes, per_process, accumulation, recipe, per_iteration)


def split_recipe_batch(cfg: Config) -> tuple[int, int]:
    """Divide the recipe's batch among the processes, and each share into parts that fit into one forward pass.

    Returns:
        Images that a process loads for an optimizer step, and images in one forward pass.

    Raises:
        UserError: The config does not say which batch it is made for, does not count iterations, accumulates already,
            or its batch cannot be divided by the processes.
    """
    batch = effective_batch(cfg)
    if batch.recipe is None:
        raise UserError(
            'auto_batch=True: the config does not say which batch it is made for: set auto_scale_lr.base_batch_size'
        )
    if cfg.train_cfg.get('type') != 'IterBasedTrainLoop' or batch.accumulation != 1:
        raise UserError(
            'auto_batch=True needs train_cfg.type IterBasedTrainLoop and optim_wrapper.accumulative_counts 1, the '
            f'config has {cfg.train_cfg.get("type")} and {batch.accumulation}'
        )
    share, rest = divmod(batch.recipe, batch.processes)
    if rest or share < 1:
        raise UserError(
            f'auto_batch=True: a batch of {batch.recipe} cannot be divided by {batch.processes} processes: use others'
        )
    per_process = min(batch.per_process, share)
    if share % per_process:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f'auto_batch=True: {share} images of a process cannot be taken {per_process} at a time: '
            f'set train_dataloader.batch_size to one of {divisors}'
        )
    return share, per_process
