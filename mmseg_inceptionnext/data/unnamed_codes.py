"""Ids and colours of masks that a data file does not name: how many, where, and what they look like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mmseg_inceptionnext.data.mask_coding import MaskCoding, colour_of
from mmseg_inceptionnext.drawing import draw_overlay, save_picture
from mmseg_inceptionnext.errors import UnreadableFile
from mmseg_inceptionnext.images import read_picture
from mmseg_inceptionnext.labels import Code

_MOST_NAMED = 5
_EXAMPLES = 2
_MARKED = (255, 0, 255)


class UnnamedCodes:
    """Counts the ids or colours of masks that a data file does not name.

    Attributes:
        pixels: Pixels of each.
        files: Image and mask of each file that holds it.
    """

    def __init__(self, coding: MaskCoding):
        self.coding, self.total_pixels, self.total_files = coding, 0, 0
        self.pixels: Counter[int] = Counter()
        self.class_pixels: Counter[int] = Counter()
        self.files: dict[int, list[tuple[str, str]]] = {}

    def add(self, image: str, mask: str, counts: dict[int, int]) -> None:
        """Add a mask and its image, given the pixels of each id or colour in the mask."""
        self.total_files += 1
        self.total_pixels += sum(counts.values())
        numbers = np.array(list(counts), np.int64)
        for number, label in zip(numbers.tolist(), self.coding.labels_of(numbers), strict=True):
            self.class_pixels[number] += counts[number]
            if label < 0:
                self.pixels[number] += counts[number]
                self.files.setdefault(number, []).append((image, mask))

    def codes(self) -> list[Code]:
        """Return what is not named: ids, or colours."""
        return [colour_of(number) if self.coding.is_colour else number for number in sorted(self.pixels)]

    @property
    def one_past(self) -> int | None:
        """The only id that is not named, if it is the next after one that is: 0 may then be the unlabelled one."""
        number = next(iter(self.pixels), 0)
        is_next = len(self.pixels) == 1 and number > 0 and self.coding.labels_of(np.array(number - 1)) >= 0
        return number if is_next and not self.coding.is_colour else None

    def faults(self) -> list[str]:
        """Say what each is, most pixels first; both readings, where one id lies just past the classes."""
        lines = []
        for number, pixels in self.pixels.most_common(_MOST_NAMED):
            files = self.files[number]
            line = (
                f'{self.coding.shown(number)} is on {self._share(pixels)} of the pixels, in {len(files)} of '
                f'{self.total_files} masks, such as {files[0][1]}, and the data file does not name it: '
            )
            code = list(colour_of(number)) if self.coding.is_colour else number
            if number == self.one_past:
                line += (
                    f'ignore it (`ignore_classes: [{code}]`)? Or is id 0, on {self._share(self.class_pixels[0])}, the '
                    'unlabelled one (`ignore_classes: [0]`, and classes from 1 on)?'
                )
            else:
                line += f'add it to classes, or `ignore_classes: [{code}]`'
            lines.append(line)
        if len(self.pixels) > _MOST_NAMED:
            lines.append(f'{len(self.pixels) - _MOST_NAMED} more are not named either')
        return lines

    def _share(self, pixels: int) -> str:
        return f'{pixels / self.total_pixels:.2%}'


def draw_unnamed(unnamed: UnnamedCodes, folder: Path) -> None:
    """Write pictures of two examples of each id or colour into a folder: the image, and where in it that is.

    Where 0 may be the unlabelled one instead, examples of 0 are written as well.
    """
    numbers = [number for number, _ in unnamed.pixels.most_common(_MOST_NAMED)]
    examples = {number: unnamed.files[number][:_EXAMPLES] for number in numbers}
    if unnamed.one_past is not None:
        examples[0] = unnamed.files[unnamed.one_past][:_EXAMPLES]
    for number, files in examples.items():
        name = '_'.join(map(str, colour_of(number))) if unnamed.coding.is_colour else number
        for image, mask in files:
            with Image.open(mask) as stored:
                marked = np.where(unnamed.coding.numbers(stored) == number, 0, -1)
            try:
                pixels = read_picture(image)
            except UnreadableFile:  # the check names it
                continue
            picture = np.hstack([pixels, draw_overlay(pixels, marked, [_MARKED], opacity=0.8)])
            kind = 'colour' if unnamed.coding.is_colour else 'id'
            save_picture(Image.fromarray(picture), folder / f'{kind}_{name}_{Path(image).stem}.png')
