"""Train by kernels."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_inceptionnext.models.kernels import use_kernels


@HOOKS.register_module()
class UseKernelsHook(Hook):
    """Calls :func:`~mmseg_inceptionnext.models.kernels.use_kernels` before training; for a config's ``custom_hooks``.

    The config is in the checkpoint: a resumed run computes in the same way.
    """

    def before_train(self, runner: Runner) -> None:
        use_kernels(runner.model)
