"""Choose a few of many files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar('Item')


def evenly_spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return ``number`` of the items, evenly spread and in order; all if there are not more."""
    at = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[i] for i in at]
