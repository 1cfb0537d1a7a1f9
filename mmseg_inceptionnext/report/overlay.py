"""Pictures of label maps for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
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
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity={opacity} must be from 0 to 1')
    known = (labels >= 0) & (labels < len(palette))
    colours = np.asarray(palette, dtype=np.float32)[np.where(known, labels, 0)]
    blended = image + opacity * (colours - image)
    return np.where(known[..., None], blended, image).round().astype(np.uint8)


def draw_comparison(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray, classes: Sequence[str],
                    palette: Sequence[Sequence[int]]) -> Image.Image:  # fmt: skip
    """Image, truth and prediction side by side, over a legend of the classes that either of the two has.

    Args:
        image: (H, W, 3) uint8, RGB.
        truth, prediction: (H, W) integers, indices into ``classes``; 255 is unlabelled. No truth, no picture of it.
        classes, palette: Name and RGB of each class.
    """
    maps = {'prediction': prediction} if truth is None else {'truth': truth, 'prediction': prediction}
    panels = {'image': image, **{title: draw_overlay(image, labels, palette) for title, labels in maps.items()}}
    height, width = image.shape[:2]
    total = len(panels) * (width + _GAP) - _GAP
    size = _text_size(height)
    font, line = ImageFont.load_default(size), size + _GAP
    present = [label for label in np.unique(np.stack([*maps.values()])) if label < len(classes)]
    picture = Image.new('RGB', (total, line + height), _PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + _GAP)
        draw.text((left + 2, _GAP // 2), title, fill=_INK, font=font, anchor='la')
        picture.paste(Image.fromarray(panel), (left, line))
    return under_legend(picture, present, classes, palette, size)


def under_legend(picture: Image.Image, present: Sequence[int], classes: Sequence[str],
                 palette: Sequence[Sequence[int]], size: int | None = None,
                 num_rows: int | None = None) -> Image.Image:  # fmt: skip
    """A picture on paper, with a legend below it.

    Args:
        picture: Stays as it is; where it is narrower than a name, the paper is wider.
        present: Labels to name, in this order.
        classes, palette: Name and RGB of each class.
        size: Of the text, in pixels. Default: a 20th of the height, at least 12.
        num_rows: Rows of the legend, whatever it holds: those of a video must not change. What does not fit is counted.
    """
    size = size or _text_size(picture.height)
    font, line = ImageFont.load_default(size), size + _GAP

    def width_of(text: str) -> int:
        return round(size + 4 + font.getlength(text) + 2 * _GAP)

    entries = [(classes[label].strip(), tuple(palette[label])) for label in present]
    width = picture.width
    if num_rows is None:
        width = max([width, *(width_of(name) for name, _ in entries)])
    rows = _wrap([(entry, width_of(entry[0])) for entry in entries], width)
    if num_rows is not None and len(rows) > num_rows:
        rows = rows[:num_rows]
        more = len(entries) - sum(map(len, rows))
        while rows[-1]:  # make room for the count
            text = f'+ {more} more'
            left = rows[-1][-1][1] + width_of(rows[-1][-1][0][0])
            if left + font.getlength(text) <= width or len(rows[-1]) == 1:
                break
            rows[-1].pop()
            more += 1
        rows[-1].append(((text, None), left))

    height = picture.height + _GAP + line * (len(rows) if num_rows is None else num_rows)
    canvas = Image.new('RGB', (width, height), _PAPER)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, line_entries in enumerate(rows):
        top = picture.height + _GAP + row * line
        for (name, colour), left in line_entries:
            if colour is not None:
                draw.rectangle((left, top, left + size, top + size), fill=colour, outline=_INK)
                left += size + 4
            draw.text((left, top + size / 2), name, fill=_INK, font=font, anchor='lm')
    return canvas


def _text_size(height: int) -> int:
    return max(12, height // 20)


def _wrap(entries: list[tuple[tuple, int]], width: int) -> list[list[tuple[tuple, int]]]:
    """Break (entry, width) pairs into rows that fit, giving each entry its left edge."""
    rows, left = [[]], 2
    for entry, needed in entries:
        if rows[-1] and left + needed > width:
            rows.append([])
            left = 2
        rows[-1].append((entry, left))
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
        for sample in outputs:
            picture = comparison_of(sample, runner.test_dataloader.dataset.metainfo)
            picture.save(self.out_dir / f'{Path(sample.img_path).stem}.png')


@HOOKS.register_module()
class ValidationSamplesHook(Hook):
    """Hands comparisons of some validation images, always the same, to the visualizer, at each validation.

    Its backends keep them: as files under ``vis_data/vis_image`` of the work dir, and in TensorBoard.

    Args:
        num_images: How many, spread evenly over the validation set; with several processes, over the first one's part.
    """

    def __init__(self, num_images: int = 4):
        self.num_images = num_images

    def before_val(self, runner) -> None:
        last = len(runner.val_dataloader) - 1
        self.chosen = set(np.linspace(0, last, self.num_images).round().astype(int))

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if batch_idx in self.chosen and is_main_process():
            sample = outputs[0]
            picture = comparison_of(sample, runner.val_dataloader.dataset.metainfo)
            runner.visualizer.add_image(f'val_{Path(sample.img_path).stem}', np.asarray(picture), runner.iter)


def comparison_of(sample: SegDataSample, meta: dict) -> Image.Image:
    """:func:`draw_comparison` of a predicted sample, with the classes and palette of its data set's ``meta``."""
    image = mmcv.imread(sample.img_path, channel_order='rgb')  # turned by EXIF as in the pipeline
    truth, prediction = (
        sample.get(key).data.squeeze(0).cpu().numpy() if key in sample else None
        for key in ('gt_sem_seg', 'pred_sem_seg')
    )
    return draw_comparison(image, truth, prediction, meta['classes'], meta['palette'])
