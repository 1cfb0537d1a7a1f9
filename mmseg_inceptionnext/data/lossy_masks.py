"""Pictures of what a compression with loss did to masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg_inceptionnext.data.mask_coding import colour_of, mask_numbers
from mmseg_inceptionnext.drawing import add_legend, draw_panels, save_picture
from mmseg_inceptionnext.labels import distinct_colour

_STRAY = (0, 0, 0)  # beside pale colours
_FLAT = np.ones((9, 9))  # pixels: as wide as no noise is alike, because JPEG compresses blocks of 8
_MOST_NAMED = 12  # values in the legend
_ZOOMED = 48  # pixels of a side of the part that is enlarged
_LOWEST, _WIDEST = 384, 2048  # height and width up to which a small mask is enlarged


def draw_lossy(mask: str, path: Path) -> None:
    """Write a picture of a mask: values that fill an area in distinct colours, and all others in black.

    Beside the mask is the part of it with the most others, enlarged. Nearly all of them the compression has made.
    """
    with Image.open(mask) as stored:
        is_colour = len(stored.getbands()) > 1
        numbers = mask_numbers(stored.convert('RGB') if is_colour else stored, is_colour)
    values, first, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    exact = numbers.astype(np.float32)  # of 24 bits at most
    flat = cv2.erode(exact, _FLAT) == cv2.dilate(exact, _FLAT)
    in_areas = np.isin(values, numbers[flat])
    in_areas[counts.argmax()] = True
    ranked = sorted(np.flatnonzero(in_areas), key=lambda i: -counts[i])

    palette = np.full((len(values), 3), _STRAY, np.uint8)
    for place, i in enumerate(ranked):
        palette[i] = [(channel + 255) // 2 for channel in distinct_colour(place)]
    stray = ~in_areas[first.reshape(numbers.shape)]
    picture = palette[first.reshape(numbers.shape)]
    names = [f'{_shown(values[i], is_colour)}: {counts[i] / numbers.size:.1%}' for i in ranked[:_MOST_NAMED]]
    if len(ranked) > _MOST_NAMED:
        names[-1] += f', and {len(ranked) - _MOST_NAMED} more'
    names.append(f'{(~in_areas).sum()} others, which fill no area: {stray.mean():.1%}')
    colours = [*map(tuple, palette[ranked[:_MOST_NAMED]].tolist()), _STRAY]

    factor = max(1, min(-(-_LOWEST // picture.shape[0]), _WIDEST // picture.shape[1]))
    part = picture[_densest(stray)]
    whole = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    enlarged = cv2.resize(part, (len(whole) * part.shape[1] // len(part), len(whole)), interpolation=cv2.INTER_NEAREST)
    panels = draw_panels({Path(mask).name: whole, f'a part, {len(whole) / len(part):.0f} times as large': enlarged})
    save_picture(add_legend(panels, range(len(names)), names, colours), path)


def _shown(value: int, is_colour: bool) -> str:
    return f'colour {list(colour_of(int(value)))}' if is_colour else f'id {value}'


def _densest(marked: np.ndarray) -> tuple[slice, slice]:
    """Return rows and columns of the part of a map that has the most pixels marked."""
    sides = [min(_ZOOMED, side) for side in marked.shape]
    sums = cv2.boxFilter(marked.astype(np.float32), -1, sides[::-1], anchor=(0, 0), normalize=False)
    sums = sums[: marked.shape[0] - sides[0] + 1, : marked.shape[1] - sides[1] + 1]
    corner = np.unravel_index(sums.argmax(), sums.shape)
    return tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))
