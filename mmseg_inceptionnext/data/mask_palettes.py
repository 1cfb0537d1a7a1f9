"""The colours in the palettes of masks that are read as indices: do the indices stand for the classes?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mmseg_inceptionnext.data.mask_coding import colour_of

_WHAT_TO_DO = 'if the colours stand for the classes, name them in a data file (`labels: [[r, g, b]]`) instead of ids'


class MaskPalettes:
    """Compares the palettes of a data set's masks with each other, and with the colours of the classes.

    Args:
        palette: RGB of each class.
    """

    def __init__(self, palette: Sequence[Sequence[int]]):
        self.classes = [tuple(map(int, colour)) for colour in palette]
        self.first: dict[int, tuple[int, str]] = {}
        self.labels: dict[int, int] = {}
        self.differing: tuple[int, int, str] | None = None
        self.differing_files = 0

    def add(self, mask: str, colours: Mapping[int, int], labels: Mapping[int, int]) -> None:
        """Add the colours (0xRRGGBB) and the labels of the indices that a mask holds."""
        others = [
            value for value in colours if self.first.setdefault(value, (colours[value], mask))[0] != colours[value]
        ]
        self.labels.update(labels)
        self.differing_files += bool(others)
        if others and self.differing is None:
            self.differing = others[0], colours[others[0]], mask

    def warnings(self) -> Iterator[str]:
        """Yield signs that an index is not the id of a class; none is certain."""
        if self.differing:
            value, colour, mask = self.differing
            first, other = self.first[value]
            yield (
                f'index {value} of the palettes is the colour {list(colour_of(first))} in {other}, but '
                f'{list(colour_of(colour))} in {mask} ({self.differing_files} masks differ so): {_WHAT_TO_DO}'
            )
            return
        shown = {value: colour_of(colour) for value, (colour, _) in sorted(self.first.items())
                 if 0 <= self.labels[value] < len(self.classes)}  # fmt: skip
        wrong = [value for value, colour in shown.items() if colour != self.classes[self.labels[value]]]
        if wrong and all(colour in self.classes for colour in shown.values()):
            value = wrong[0]
            yield (
                f'index {value} is the colour {list(shown[value])} in the palette of {self.first[value][1]}, which is '
                f'that of class {self.classes.index(shown[value])}, but is read as class {self.labels[value]}: '
                f'{_WHAT_TO_DO}'
            )
