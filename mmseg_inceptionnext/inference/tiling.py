"""Which images are predicted in tiles, in which, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.prefetch import map_ahead
from mmseg_inceptionnext.device import available_memory
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.images import swap_rgb
from mmseg_inceptionnext.inference.confidence import ClassLogits, logits_of_cell
from mmseg_inceptionnext.inference.label_map_segmentor import window_logits
from mmseg_inceptionnext.inference.tiles import Grid, Region, cells
from mmseg_inceptionnext.models.build import LARGEST_STRIDE, heads_of

AUTO_TILES = (1024, 768, 512, 256)  # of tile='auto': the largest that fits

_SHARE_FOR_IMAGE, _SHARE_FOR_TILE = 0.8, 0.25  # of the memory that is available
# At the size of an image: the largest logit, those of two classes in two sizes, labels of 2 and of 8 bytes.
_BYTES_PER_PIXEL = 4 + 4 * 4 + 2 + 8
_COPIES_OF_IMAGE = 4  # as read, as BGR, for the network, and with the overlay
_RESIZES = ('Resize', 'ResizeToMultiple')


@dataclass(frozen=True)
class Tiling:
    """Options of a prediction in tiles.

    Attributes:
        tile: Side of the tiles in pixels, or 'auto': :data:`AUTO_TILES` for images that would not fit into memory.
        overlap: Pixels that neighbours share; None for an eighth of the tile.
        blend: Weights that fall towards a tile's border instead of equal ones.

    Raises:
        UserError: The tile is shorter than the network's stride, or the overlap is not shorter than the tile.
    """

    tile: int | str
    overlap: int | None = None
    blend: bool = False
    _said: set = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self):
        if self.tile != 'auto' and not (isinstance(self.tile, int) and self.tile >= LARGEST_STRIDE):
            raise UserError(f"tile={self.tile!r} must be 'auto' or a side of {LARGEST_STRIDE} pixels or more")
        largest = min(AUTO_TILES) if self.tile == 'auto' else self.tile
        if self.overlap is not None and not 0 <= self.overlap < largest:
            raise UserError(f'overlap={self.overlap} must be from 0 to {largest - 1}, less than the tile of {largest}')

    def grid(self, size: tuple[int, int], tile: int) -> Grid:
        """Return the tiles of an image."""
        overlap = tile // 8 if self.overlap is None else self.overlap
        return Grid(size, (tile, tile), (tile - overlap, tile - overlap))

    def choose(self, size: tuple[int, int], whole: int, per_pixel: int, available: int) -> int | None:
        """Return the side of the tiles that an image is predicted in; None for as a whole. A new choice is said.

        Args:
            size: Height and width.
            whole: Bytes that the image takes as a whole.
            per_pixel: Bytes that the network takes for a pixel of its input.
            available: Bytes that there are.
        """
        if self.tile != 'auto':
            return self.tile
        choice, text = None, 'fit into memory: predicted as a whole'
        if whole > _SHARE_FOR_IMAGE * available:
            fitting = (tile for tile in AUTO_TILES if tile**2 * per_pixel <= _SHARE_FOR_TILE * available)
            choice = next(fitting, AUTO_TILES[-1])
            text = f'in tiles of {choice}, not resized: as a whole they take about {whole / 2**30:.1f} GiB, and '
            text += f'{available / 2**30:.1f} are free'
        if choice not in self._said:
            self._said.add(choice)
            say(f"tile='auto': {size[1]}×{size[0]} pixels {text}")
        return choice


def tiling_of(tile: int | str | None, overlap: int | None, blend: bool) -> Tiling | None:
    """Return the options of a prediction in tiles; None for whole images.

    Raises:
        UserError: There are options but no tile, or :class:`Tiling` refuses them.
    """
    if tile is not None:
        return Tiling(tile, overlap, blend)
    if overlap is not None or blend:
        given = f'overlap={overlap}' if overlap is not None else 'blend=True'
        raise UserError(f"{given} is for tiles: pass tile='auto', or the side of a tile, as well")
    return None


class TiledModel:
    """A segmentor's model that predicts images in tiles, at their own resolution.

    Args:
        model: A trained EncoderDecoder, or a model that runs an exported file, which has a ``contract``.
        tiling: The options.
        pipeline: The test pipeline for images in memory. Its resizing is left out.
        channels: Channels of the images.
        device: The device that the model runs on.

    Attributes:
        memory: Bytes that tile='auto' goes by; None for those that there are at each image.

    Raises:
        UserError: The model does not give logits of tiles, or the test pipeline does more than load, resize and pack.
    """

    def __init__(self, model, tiling: Tiling, pipeline: Compose, channels: int, device: torch.device):
        self._model, self._tiling, self._channels, self._device = model, tiling, channels, device
        self._contract = getattr(model, 'contract', None)
        name = f'tile={tiling.tile!r}'
        if self._contract is None:
            _check_model(model, name)
        elif self._contract.labels or tiling.tile == 'auto':
            raise UserError(
                f'{name}: {model.path} can be run in tiles of a given side, and if it returns logits, not labels: '
                'pass a number, or export it again'
            )
        kinds = [type(transform).__name__ for transform in pipeline.transforms]
        if others := [kind for kind in kinds if kind not in ('LoadImageFromNDArray', *_RESIZES, 'PackSegInputs')]:
            raise UserError(f'{name} leaves out {others[0]} of the test pipeline: remove it, or predict without tiles')
        self._resizes = [each for each, kind in zip(pipeline.transforms, kinds, strict=True) if kind in _RESIZES]
        self.memory = None
        if tiling.tile == 'auto':
            self._bytes_per_pixel = bytes_per_pixel(model, torch.zeros(1, channels, 256, 256, device=device))
        elif self._resizes:
            say(f"{name}: images are not resized as in the config's test pipeline: tiles have their own resolution")

    def fix_memory(self, memory: int | None = None) -> None:
        """Let tile='auto' go by so many bytes from now on, by default those that there are now."""
        if self._tiling.tile == 'auto':
            self.memory = memory or self.memory or available_memory(self._device)

    def tile_of(self, size: tuple[int, int]) -> int | None:
        """Return the side of the tiles that an image is predicted in; None for as a whole, in the test pipeline.

        Args:
            size: Height and width of the image.

        Raises:
            UserError: A side is too short for the network, or for an exported file that takes one size.
        """
        tile = self._tiling.tile
        if tile == 'auto':
            seen = _size_after(self._resizes, size)
            whole = _bytes_of_whole(size, seen, self._channels, self._bytes_per_pixel)
            tile = self._tiling.choose(
                size, whole, self._bytes_per_pixel, self.memory or available_memory(self._device)
            )
        if tile is not None and min(size) < LARGEST_STRIDE:
            raise UserError(f'{size[1]}×{size[0]} pixels are too thin: no side may be shorter than {LARGEST_STRIDE}')
        taken, seen = self._contract and self._contract.shape, tuple(min(side, tile or side) for side in size)
        if taken and taken != seen:
            raise UserError(
                f'{self._model.path} takes images of {taken[1]}×{taken[0]}, not of {seen[1]}×{seen[0]}, as the tiles '
                f'of {size[1]}×{size[0]} pixels are: export it with dynamic=True'
            )
        return tile

    def labels(self, image: np.ndarray, tile: int, batch_size: int = 1,
               temperature: float | None = None) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
        """Return the labels (H, W), int16, of an image (H, W, channels), uint8 or float32, RGB.

        Args:
            image: The image.
            tile: Side of the tiles.
            batch_size: Tiles in one forward pass.
            temperature: Return the labels' probabilities (H, W), float32, as well; logits are divided by it.
        """
        size = image.shape[:2]
        labels = np.empty(size, np.int16)
        confidence = None if temperature is None else np.empty(size, np.float32)
        for strip in self.strips(size, _reader(image), tile, batch_size, temperature):
            rows = slice(strip.top, strip.top + len(strip.labels))
            labels[rows] = strip.labels
            if confidence is not None:
                confidence[rows] = strip.confidence
        return labels, confidence

    def parts(self, image: np.ndarray, tile: int, batch_size: int = 1) -> Iterator[tuple[Region, ClassLogits]]:
        """Run the network on an image as :meth:`labels` does, and yield parts of it and their logits."""
        grid = self._tiling.grid(image.shape[:2], tile)
        with ThreadPoolExecutor(1) as reader:
            tiles = (pixels for _, (pixels, _) in map_ahead(reader, _reader(image), grid.windows(), 2 * batch_size))

            def logits() -> Iterator[Tensor]:
                while batch := list(islice(tiles, batch_size)):
                    yield from self._logits(batch)

            for cell in cells(grid, logits(), self._align_corners, self._tiling.blend):
                yield cell.region, logits_of_cell(cell, self._threshold)

    def strips(self, size: tuple[int, int], read: Callable[[Region], tuple[np.ndarray, np.ndarray | None]],
               tile: int, batch_size: int = 1, temperature: float | None = None) -> Iterator[Strip]:  # fmt: skip
        """Predict an image in tiles, a strip of its width at a time, from the top. Tiles are read ahead.

        Args:
            size: Height and width of the image.
            read: Returns the pixels of a region, (h, w, channels) uint8 or float32, RGB, and where they are valid,
                (h, w) bool, or None for everywhere. It is called in another thread, one region after the other. Tiles
                without a valid pixel are not computed.
            tile: Side of the tiles.
            batch_size: Tiles in one forward pass.
            temperature: Strips have the labels' probabilities as well; logits are divided by it.

        Raises:
            UserError: A logit is not finite.
        """
        grid = self._tiling.grid(size, tile)
        return _label_strips(
            grid, read, self._logits, self._align_corners, self._threshold, self._tiling.blend, batch_size, temperature
        )

    @property
    def _threshold(self) -> float | None:
        if self._contract is not None:
            return self._contract.threshold
        return heads_of(self._model)[-1].threshold if self._model.out_channels == 1 else None

    @property
    def _align_corners(self) -> bool:
        return (self._contract or self._model).align_corners

    @torch.inference_mode()
    def _logits(self, pixels: list[np.ndarray]) -> Tensor:
        """Return the logits (N, classes, h, w) of tiles (h, w, channels), RGB."""
        if self._contract is not None:
            logits = torch.from_numpy(self._model.run(np.stack(pixels).transpose(0, 3, 1, 2)))
        else:
            inputs = [torch.from_numpy(swap_rgb(tile)).permute(2, 0, 1) for tile in pixels]  # as PackSegInputs does
            logits = window_logits(self._model, self._model.data_preprocessor(dict(inputs=inputs), False)['inputs'])
        if not logits.isfinite().all():
            raise UserError('the model returns logits that are not finite numbers: train or export it again')
        return logits


def _check_model(model: nn.Module, name: str) -> None:
    if not isinstance(model, EncoderDecoder):
        raise UserError(f'{name} is for an EncoderDecoder, the model is a {type(model).__name__}: leave it out')
    if model.data_preprocessor.test_cfg:
        raise UserError(f'{name}: a data_preprocessor.test_cfg pads images, which tiles do not need: leave it out')


def _size_after(resizes: Sequence[BaseTransform], size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width that transforms resize an image to, but for rounding to a multiple."""
    for transform in resizes:
        if scale := getattr(transform, 'scale', None):
            width, height = mmcv.rescale_size(size[::-1], scale) if transform.keep_ratio else scale
            size = height, width
    return size


def _bytes_of_whole(size: tuple[int, int], seen: tuple[int, int], channels: int, per_pixel: int) -> int:
    """Estimate the bytes that the prediction of a whole image takes, of which the network sees another size."""
    image = size[0] * size[1] * (_COPIES_OF_IMAGE * channels + _BYTES_PER_PIXEL)
    return image + seen[0] * seen[1] * (per_pixel + 4 * channels)


def bytes_per_pixel(model: nn.Module, inputs: Tensor) -> int:
    """Estimate the bytes that a network takes for a pixel of its input: twice what its widest layer reads and writes.

    Args:
        model: The network.
        inputs: (N, C, H, W), what to run it on.
    """
    largest = 0

    def measure(module: nn.Module, args: tuple, output) -> None:
        nonlocal largest
        tensors = [*_tensors(args), *_tensors(output)]
        largest = max(largest, sum(tensor.nbytes for tensor in tensors))

    hooks = [module.register_forward_hook(measure) for module in model.modules()]
    try:
        with torch.inference_mode():
            model(inputs, mode='tensor')
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * largest // (inputs.shape[0] * inputs.shape[2] * inputs.shape[3])


def _tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


@dataclass(frozen=True)
class Strip:
    """The labels of some rows of an image.

    Attributes:
        top: The first row.
        labels: (rows, width) int16.
        valid: (rows, width) bool: where the image has values; None for everywhere.
        confidence: (rows, width) float32: probabilities of the labels, where they are asked for.
    """

    top: int
    labels: np.ndarray
    valid: np.ndarray | None = None
    confidence: np.ndarray | None = None


def _reader(image: np.ndarray) -> Callable[[Region], tuple[np.ndarray, None]]:
    whole = Region(0, image.shape[0], 0, image.shape[1])
    return lambda region: (image[region.within(whole)], None)


def _label_strips(
    grid: Grid,
    read: Callable[[Region], tuple[np.ndarray, np.ndarray | None]],
    logits: Callable[[list[np.ndarray]], Tensor],
    align_corners: bool,
    threshold: float | None = None,
    blend: bool = False,
    batch_size: int = 1,
    temperature: float | None = None,
) -> Iterator[Strip]:
    """See :meth:`TiledModel.strips`; ``logits`` returns those of some tiles, (N, classes, h, w)."""
    valid: list[np.ndarray | None] = []  # of the tiles whose cells are to come

    def batched(tiles: Iterator[tuple[Region, tuple]]) -> Iterator[Tensor | None]:
        while batch := list(islice(tiles, batch_size)):
            batch = [tile for _, tile in batch]
            valid.extend(mask for _, mask in batch)
            wanted = [pixels for pixels, mask in batch if mask is None or mask.any()]
            found = iter(logits(wanted) if wanted else ())
            for _, mask in batch:
                yield next(found) if mask is None or mask.any() else None

    with ThreadPoolExecutor(1) as reader:
        tiles = map_ahead(reader, read, grid.windows(), 2 * batch_size)
        labels = masks = confidence = None
        for cell in cells(grid, batched(tiles), align_corners, blend):
            region, mask = getattr(cell, 'region', cell), valid.pop(0)
            if labels is None:
                strip = Region(region.top, region.bottom, 0, grid.size[1])
                labels, masks = np.zeros(strip.shape, np.int16), np.ones(strip.shape, bool)
                confidence = None if temperature is None else np.zeros(strip.shape, np.float32)
            part = region.within(strip)
            if mask is not None:
                masks[part] = mask[: region.bottom - region.top, : region.right - region.left]
            if cell is not region and masks[part].any():
                found = cell.labels(threshold)
                labels[part] = found.cpu().numpy()
                if confidence is not None:
                    sure, _ = logits_of_cell(cell, threshold).confidence_and_entropy(found, temperature)
                    confidence[part] = sure.cpu().numpy()
            if region.right == grid.size[1]:
                yield Strip(region.top, labels, None if masks.all() else masks, confidence)
                labels = None
