"""Random numbers that depend on the seed and on the iteration, and on nothing else.

A run that is interrupted and resumed then ends with the weights of one that was not, bit for bit on a CPU, whatever the
number of data-loading workers: nothing has to be saved or replayed, because no generator carries state from one
iteration to the next. mmengine alone restores neither the workers' generators nor the model's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS


class SampleDraw(int):
    """An index into a data set that also knows its position in the run's sequence of samples.

    It travels from the sampler through the worker's queue into ``results['sample_idx']`` of the pipeline.
    """

    def __new__(cls, index: int, seed: int, position: int) -> SampleDraw:
        draw = super().__new__(cls, index)
        draw.seed, draw.position = seed, position
        return draw

    # Wrappers such as RepeatDataset and ConcatDataset turn an index into one of the data set inside.

    def __mod__(self, length: int) -> SampleDraw:
        return SampleDraw(int(self) % length, self.seed, self.position)

    def __sub__(self, offset: int) -> SampleDraw:
        return SampleDraw(int(self) - offset, self.seed, self.position)

    def __getnewargs__(self) -> tuple[int, int, int]:
        return int(self), self.seed, self.position


@DATA_SAMPLERS.register_module()
class ReproducibleInfiniteSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, in the same order, which yields a :class:`SampleDraw` for each index.

    Positions are counted over all ranks, so that they do not depend on the world size.
    """

    def _infinite_indices(self) -> Iterator[SampleDraw]:
        for position, index in enumerate(super()._infinite_indices()):
            yield SampleDraw(index, self.seed, position)


@TRANSFORMS.register_module()
class SeedAugmentation(BaseTransform):
    """First transform of a training pipeline: seeds ``random`` and numpy by the sample's :class:`SampleDraw`.

    A sample that was not drawn by :class:`ReproducibleInfiniteSampler` (``dataset[0]``, say) leaves them as they are.
    """

    def transform(self, results: dict) -> dict:
        draw = results['sample_idx']
        if isinstance(draw, SampleDraw):
            seed = int(np.random.SeedSequence((draw.seed, draw.position)).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
        return results


@HOOKS.register_module()
class SeedIterationHook(Hook):
    """Seeds torch and numpy before each training iteration: dropout and stochastic depth on every device, mixup."""

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        sequence = np.random.SeedSequence((runner.seed, get_rank(), runner.iter))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        np.random.seed(sequence.generate_state(4))
