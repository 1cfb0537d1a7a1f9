"""Pictures of label maps for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _GAP = (32, 32, 32), (255, 255, 255), 8


def draw_overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]],
                 opacity: float = 0.6) -> np.ndarray:  # fmt: skip
    """Lay the colours of a label map over an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) integers, indices into ``palette``; others (255, unlabelled) leave the image as it is.
        palette: RGB of each class, 0 … 255.
        opacity: Of the colours, from 0 to 1.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    known = (labels >= 0) & (labels < len(palette))
    colours = np.asarray(palette, dtype=np.float32)[np.where(known, labels, 0)]
    blended = image + opacity * (colours - image)
    return np.where(known[..., None], blended, image).round().astype(np.uint8)


def draw_comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str],
                    palette: Sequence[Sequence[int]]) -> Image.Image:  # fmt: skip
    """Image, truth and prediction side by side, over a legend of the classes that either of the two has.

    Args:
        image: (H, W, 3) uint8, RGB.
        truth, prediction: (H, W) integers, indices into ``classes``; 255 is unlabelled.
        classes, palette: Name and RGB of each class.
    """
    panels = {
        'image': image,
        'truth': draw_overlay(image, truth, palette),
        'prediction': draw_overlay(image, prediction, palette),
    }
    height, width = image.shape[:2]
    size = max(12, height // 20)
    font = ImageFont.load_default(size)
    line = size + _GAP
    total = 3 * width + 2 * _GAP

    present = [label for label in np.union1d(truth, prediction) if label < len(classes)]
    rows = _wrap([(label, size + 4 + font.getlength(classes[label].strip()) + 2 * _GAP) for label in present], total)
    canvas = Image.new('RGB', (total, line + height + _GAP + line * len(rows)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + _GAP)
        draw.text((left + 2, _GAP // 2), title, fill=_INK, font=font, anchor='la')
        canvas.paste(Image.fromarray(panel), (left, line))
    for row, entries in enumerate(rows):
        top = line + height + _GAP + row * line
        for label, left in entries:
            draw.rectangle((left, top, left + size, top + size), fill=tuple(palette[label]), outline=_INK)
            draw.text((left + size + 4, top + size / 2), classes[label].strip(), fill=_INK, font=font, anchor='lm')
    return canvas


def _wrap(entries: list[tuple[int, float]], width: int) -> list[list[tuple[int, int]]]:
    """Break (label, width) entries into rows that fit, giving each entry its left edge."""
    rows, left = [[]], 2.0
    for label, needed in entries:
        if rows[-1] and left + needed > width:
            rows.append([])
            left = 2.0
        rows[-1].append((label, round(left)))
        left += needed
    return rows


@HOOKS.register_module()
class OverlayHook(Hook):
    """Writes the comparison of every tested image into a folder, as ``<name of the image>.png``."""

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def before_test(self, runner) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        meta = runner.test_dataloader.dataset.metainfo
        for sample in outputs:
            image = mmcv.imread(sample.img_path, channel_order='rgb')  # turned by EXIF as in the pipeline
            truth, prediction = (
                data.data.squeeze(0).cpu().numpy() for data in (sample.gt_sem_seg, sample.pred_sem_seg)
            )
            picture = draw_comparison(image, truth, prediction, meta['classes'], meta['palette'])
            picture.save(self.out_dir / f'{Path(sample.img_path).stem}.png')
