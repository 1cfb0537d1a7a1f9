"""Hooks and a model for runs in processes of their own: what a test wants to know of each of them, or do to them."""

import json
import os
import sys
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmseg.models import EncoderDecoder
from mmseg.registry import HOOKS, MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

_written: set[str] = set()


def _note(event: str, arguments: tuple) -> None:
    if event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _written.add(str(arguments[0]))
    elif event in ('os.rename', 'os.remove'):
        _written.update(str(path) for path in arguments if isinstance(path, (str, os.PathLike)))


sys.addaudithook(_note)


@MODELS.register_module()
class Float64EncoderDecoder(EncoderDecoder):
    """mmseg's, all of it in float64: of two trainings that should be the same, the rounding stays out of sight."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.double()

    def extract_feat(self, inputs: Tensor) -> list[Tensor]:
        return super().extract_feat(inputs.double())


@HOOKS.register_module()
class RecordingHook(Hook):
    """Writes ``<folder>/<rank>.json``: losses of a process, and the files that it opened to write, moved or removed.

    Batch norms are put into eval mode: their statistics are of the images of one process on CPUs, where there is no
    SyncBN, and would make the losses depend on the number of processes.
    """

    priority = 'LOWEST'

    def __init__(self, folder: str):
        self.path, self.losses = Path(folder), []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())

    def after_run(self, runner) -> None:
        self.path.mkdir(exist_ok=True)
        record = dict(losses=self.losses, written=sorted(_written))
        (self.path / f'{get_rank()}.json').write_text(json.dumps(record))


@HOOKS.register_module()
class SpoilLossHook(Hook):
    """Makes the losses of one process NaN from an iteration on, the first being 1."""

    def __init__(self, rank: int, iteration: int):
        self.rank, self.iteration = rank, iteration

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if get_rank() == self.rank and runner.iter + 1 == self.iteration:
            runner.model.module.decode_head.loss_decode.loss_weight = float('nan')
