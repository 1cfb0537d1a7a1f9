"""Hooks that draw what a model predicts during a test or a validation.

A picture that cannot be drawn or written is a warning: it never costs a run its figures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from PIL import Image

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.drawing import draw_comparison, save_picture
from mmseg_inceptionnext.errors import printable
from mmseg_inceptionnext.images import local_or_content, read_picture
from mmseg_inceptionnext.labels import IGNORE_INDEX, label_array


class _Pictures(Hook):
    """Draws comparisons, and counts those that fail."""

    def _begin(self) -> None:
        self.failures: list[str] = []

    def _draw(self, sample: SegDataSample, meta: dict, evaluator: Evaluator,
              keep: Callable[[Image.Image], None]) -> None:  # fmt: skip
        try:
            keep(comparison_of_sample(sample, meta, _ignore_index(evaluator)))
        except Exception as error:  # of the disk, or of a backend, which may be a server
            self.failures.append(f'{sample.img_path}: {type(error).__name__}: {error}')

    def _end(self) -> None:
        if self.failures:
            say(f'{len(self.failures)} pictures are missing, the first of {self.failures[0]}', logging.WARNING)


@HOOKS.register_module()
class OverlayHook(_Pictures):
    """Writes a comparison of every tested image into a folder, as ``<name of the image>.png``."""

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def before_test(self, runner) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._begin()

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        for sample in outputs:
            path = self.out_dir / f'{Path(sample.img_path).stem}.png'
            meta = runner.test_dataloader.dataset.metainfo
            self._draw(sample, meta, runner.test_evaluator, lambda picture, path=path: save_picture(picture, path))

    def after_test(self, runner) -> None:
        self._end()


@HOOKS.register_module()
class ValidationSamplesHook(_Pictures):
    """Adds comparisons of a few validation images, always the same, to the visualizer at each validation.

    Its backends store them: as files under ``vis_data/vis_image`` of the work dir, and in TensorBoard.

    Args:
        num_images: Number of images, spread evenly over the validation set; in a distributed run, over rank 0's part.
    """

    def __init__(self, num_images: int = 4):
        self.num_images = num_images

    def before_val(self, runner) -> None:
        last = len(runner.val_dataloader) - 1
        self.chosen = set(np.linspace(0, last, self.num_images).round().astype(int))
        self._begin()

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if batch_idx not in self.chosen or not is_main_process():
            return
        sample = outputs[0]
        name = printable(f'val_{Path(sample.img_path).stem}')  # OpenCV, which writes it, crashes on others
        meta = runner.val_dataloader.dataset.metainfo
        self._draw(
            sample, meta, runner.val_evaluator,
            lambda picture: runner.visualizer.add_image(name, np.asarray(picture), runner.iter),
        )  # fmt: skip

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._end()


def comparison_of_sample(sample: SegDataSample, meta: dict, ignore_index: int = IGNORE_INDEX) -> Image.Image:
    """Draw the comparison of a predicted sample.

    Args:
        sample: The sample.
        meta: ``classes`` and ``palette`` of its data set.
        ignore_index: Label of the pixels that are not counted, which are drawn as unlabelled.
    """
    image = read_picture(local_or_content(sample.img_path))  # turned by EXIF as in the pipeline
    truth, prediction = (
        label_array(sample.get(key).data) if key in sample else None for key in ('gt_sem_seg', 'pred_sem_seg')
    )
    if truth is not None:
        truth[truth == ignore_index] = -1
    return draw_comparison(image, truth, prediction, meta['classes'], meta['palette'])


def _ignore_index(evaluator: Evaluator) -> int:
    return next((m.ignore_index for m in evaluator.metrics if hasattr(m, 'ignore_index')), IGNORE_INDEX)
