"""Refuse a batch of images of several sizes."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmseg_inceptionnext.errors import UserError


class SameSizeHook(Hook):
    """Checks that the images of a batch have one size in validation and test, where mmseg's preprocessor asserts it.

    Raises:
        UserError: They do not, and nothing pads them.
    """

    def before_val_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        _check(runner, data_batch, 'val')

    def before_test_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        _check(runner, data_batch, 'test')


def _check(runner, batch: dict, split: str) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    images = batch['inputs']
    # Views of a multi-scale test are lists, and go through the model one by one.
    if getattr(getattr(model, 'data_preprocessor', None), 'test_cfg', None) or not hasattr(images[0], 'shape'):
        return
    for image, sample in zip(images, batch['data_samples'], strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            (height, width), (h, w) = images[0].shape[1:], image.shape[1:]
            raise UserError(
                f'{batch["data_samples"][0].img_path} is {width}×{height} after the pipeline, but {sample.img_path} in '
                f'the same batch is {w}×{h}: set {split}_dataloader.batch_size=1, or let '
                'model.data_preprocessor.test_cfg=dict(size_divisor=32) pad them'
            )
