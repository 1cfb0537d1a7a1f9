"""Hooks that draw what a model predicts during a test or a validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from PIL import Image

from mmseg_inceptionnext.drawing import draw_comparison
from mmseg_inceptionnext.images import local_or_content, read_image


@HOOKS.register_module()
class OverlayHook(Hook):
    """Writes a comparison of every tested image into a folder, as ``<name of the image>.png``."""

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def before_test(self, runner) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        for sample in outputs:
            picture = comparison_of_sample(sample, runner.test_dataloader.dataset.metainfo)
            picture.save(self.out_dir / f'{Path(sample.img_path).stem}.png')


@HOOKS.register_module()
class ValidationSamplesHook(Hook):
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

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if batch_idx in self.chosen and is_main_process():
            sample = outputs[0]
            picture = comparison_of_sample(sample, runner.val_dataloader.dataset.metainfo)
            runner.visualizer.add_image(f'val_{Path(sample.img_path).stem}', np.asarray(picture), runner.iter)


def comparison_of_sample(sample: SegDataSample, meta: dict) -> Image.Image:
    """Draw the comparison of a predicted sample, with the classes and palette of its data set's ``meta``."""
    image = read_image(local_or_content(sample.img_path))  # turned by EXIF as in the pipeline
    truth, prediction = (
        sample.get(key).data.squeeze(0).cpu().numpy() if key in sample else None
        for key in ('gt_sem_seg', 'pred_sem_seg')
    )
    return draw_comparison(image, truth, prediction, meta['classes'], meta['palette'])
