"""How sure a label is: probabilities of the classes at full size, without holding those of all classes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference.tiles import Cell, Region, largest_class


@dataclass(frozen=True)
class ClassLogits:
    """The logits of every pixel, a class at a time.

    Attributes:
        channels: Number of classes.
        of: Returns the logits (height, width) of a class, by its index.
    """

    channels: int
    of: Callable[[int], Tensor]

    def label_map(self) -> Tensor:
        """Return the class of the largest logit of every pixel, (1, height, width), int64; of equal ones, the first."""
        return largest_class(self.channels, self.of)[None].long()

    def confidence_and_entropy(self, labels: Tensor, temperature: float = 1) -> tuple[Tensor, Tensor]:
        """Return the probability of the label of every pixel, and the entropy of all classes in nats.

        Both follow from running sums of exp(x - m) and (x - m) exp(x - m) over the logits x, where m is the largest so
        far: no sum overflows, and no class is held but the current one.

        Args:
            labels: (height, width), classes.
            temperature: Logits are divided by it.

        Returns:
            Two (height, width), float32.
        """
        largest = chosen = self.of(0) / temperature
        total, weighted = torch.ones_like(largest), torch.zeros_like(largest)
        for index in range(1, self.channels):
            logit = self.of(index) / temperature
            chosen = torch.where(labels == index, logit, chosen)
            larger = torch.maximum(largest, logit)
            shift, decay, new = largest - larger, (largest - larger).exp_(), (logit - larger).exp_()
            weighted = (weighted + total * shift) * decay + new * (logit - larger)
            total = total * decay + new
            largest = larger
        confidence = (chosen - largest).exp_() / total
        return confidence.float(), (total.log() - weighted / total).clamp_(min=0).float()

    def top(self, k: int, temperature: float = 1) -> tuple[Tensor, Tensor]:
        """Return the k most likely classes of every pixel, and their probabilities; of equal ones, the first is first.

        Returns:
            Labels (k, height, width), int16, and probabilities (k, height, width), float32.
        """
        logit = self.of(0) / temperature
        values = logit.new_full((k, *logit.shape), -math.inf)
        labels = torch.zeros(values.shape, dtype=torch.int16, device=values.device)
        total, largest = torch.zeros_like(logit), torch.full_like(logit, -math.inf)
        for index in range(self.channels):
            logit = self.of(index) / temperature
            larger = torch.maximum(largest, logit)
            total, largest = total * (largest - larger).exp_() + (logit - larger).exp_(), larger
            label = torch.full_like(labels[0], index)
            for place in range(k):  # it takes its place, and pushes the others down
                is_before = logit > values[place]
                down, label_down = values[place].clone(), labels[place].clone()
                values[place], labels[place] = (
                    torch.where(is_before, logit, down),
                    torch.where(is_before, label, labels[place]),
                )
                logit, label = torch.where(is_before, down, logit), torch.where(is_before, label_down, label)
        return labels, ((values - largest).exp_() / total).float()


def with_threshold(logit: Tensor) -> ClassLogits:
    """Return the logits of the two classes of a head with a single one, (height, width): that of class 1."""
    return ClassLogits(2, lambda index: logit if index else torch.zeros_like(logit))


def class_logits_of(sample: Mapping) -> ClassLogits | None:
    """Return the logits of a predicted sample, at the size of its labels; None where there are labels alone."""
    if 'class_logits' in sample:
        return sample['class_logits']
    if 'seg_logits' not in sample:
        return None
    logits = sample['seg_logits']['data']
    if len(logits) > 1:
        return ClassLogits(len(logits), lambda index: logits[index].float())
    tiny = torch.finfo(torch.float32).eps
    return with_threshold(logits[0].float().clamp(tiny, 1 - tiny).logit())  # mmseg has taken the sigmoid


def logits_of_cell(cell: Cell, threshold: float | None) -> ClassLogits:
    """Return the mean logits of a cell of tiles."""
    weight = cell.weight()
    if threshold is not None:
        return with_threshold(cell.total(0) / weight)
    return ClassLogits(cell.channels, lambda index: cell.total(index) / weight)


class Probabilities:
    """What a result keeps, to say how sure its labels are when it is asked.

    Args:
        parts: Yields parts of the image, and the logits of each; it may run the network again.
        channels: Number of classes.
        temperature: Logits are divided by it.
    """

    def __init__(self, parts: Callable[[], Iterator[tuple[Region, ClassLogits]]], channels: int, temperature: float):
        self._parts, self._channels, self._temperature = parts, channels, temperature

    @torch.inference_mode()
    def confidence_and_entropy(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return both for the labels (H, W) of the whole image: two (H, W) float32."""
        found = np.zeros((2, *labels.shape), np.float32)
        whole = Region(0, labels.shape[0], 0, labels.shape[1])
        for region, logits in self._parts():
            part = region.within(whole)
            own = torch.from_numpy(labels[part]).to(logits.of(0).device)
            for values, of_part in zip(found, logits.confidence_and_entropy(own, self._temperature), strict=True):
                values[part] = of_part.cpu().numpy()
        return found[0], found[1]

    @torch.inference_mode()
    def top(self, k: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the k most likely classes and their probabilities, (k, H, W) int16 and float32.

        Raises:
            UserError: There are not so many classes.
        """
        if not 1 <= k <= self._channels:
            raise UserError(f'top({k}): the model has {self._channels} classes')
        labels, values = np.zeros((k, *shape), np.int16), np.zeros((k, *shape), np.float32)
        for region, logits in self._parts():
            part = (slice(None), *region.within(Region(0, shape[0], 0, shape[1])))
            labels[part], values[part] = (x.cpu().numpy() for x in logits.top(k, self._temperature))
        return labels, values
