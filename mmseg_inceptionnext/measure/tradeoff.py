"""Draw the paper's Figure 1, also for segmentation: quality against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import atomic_write
from mmseg_inceptionnext.measure.paper import imagenet_row, paper_row
from mmseg_inceptionnext.measure.speed import Speed


def plot_tradeoff(rows: Sequence[Speed], path: str | Path) -> None:
    """Draw measured speed against the mIoU or top-1 accuracy that the paper reports, a line for each family of models.

    Args:
        rows: Measurements; those whose config or ImageNet model is in no table of the paper are left out. Of ImageNet
            models, the speed is that of forward and backward passes.
        path: Path of the picture; its suffix chooses the format.

    Raises:
        UserError: None of them is in the paper, or the format is unknown.
    """
    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if found := imagenet_row(row.config, row.shape):
            family, _, size = row.config.partition('_')
            families.setdefault(family, []).append((row.fps_forward_backward or row.fps, found.top1, size))
        elif printed := paper_row(row.config):
            family, _, size = printed.name.partition('-')
            families.setdefault(family, []).append((row.fps, printed.miou, size))
    if not families:
        raise UserError(
            f'plot={str(path)!r}: none of the configs is in the paper, which the mIoU and accuracies are taken from'
        )

    figure = Figure(figsize=(7, 5), layout='constrained')
    axes = figure.subplots()
    for family, points in sorted(families.items()):
        points.sort()
        ours = family.lower() == 'inceptionnext'
        axes.plot(
            [fps for fps, _, _ in points],
            [quality for _, quality, _ in points],
            marker='*' if ours else 'o',
            markersize=14 if ours else 7,
            linewidth=2 if ours else 1.2,
            label=family,
            zorder=3 if ours else 2,
        )
        for fps, quality, size in points:
            axes.annotate(size, (fps, quality), textcoords='offset points', xytext=(7, 5), fontsize=8)
    first = rows[0]
    is_imagenet = imagenet_row(first.config, first.shape) is not None
    what = {'fps': 'Inference', 'train': 'Training', 'backbone': 'Backbone inference'}[first.task]
    what = 'Forward and backward' if is_imagenet and first.fps_forward_backward else what
    axes.set_xlabel(f'{what}, images/s (measured: {first.device}, {first.dtype}, {first.shape[0]}×{first.shape[1]})')
    quality = 'ImageNet-1K top-1' if is_imagenet else 'ADE20K mIoU'
    axes.set_ylabel(f"{quality}, % (the paper's values)")
    axes.grid(alpha=0.3)
    axes.margins(0.1)
    axes.legend(loc='best')
    try:
        with atomic_write(Path(path)) as partial:
            figure.savefig(partial, dpi=150)
    except ValueError as error:
        raise UserError(f'plot={str(path)!r}: {error}') from error
