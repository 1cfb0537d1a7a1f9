"""Write an evaluation as a page for people (index.html) and a file for programs (report.json)."""

from __future__ import annotations

import base64
import io
import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import mmcv
import mmengine
import mmseg
import numpy as np
import timm
import torch
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for whoever imports the package
from mmengine.config import Config
from mmengine.device import get_device
from PIL import Image

from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.device import device_name
from mmseg_inceptionnext.drawing import draw_overlay
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation.metrics import TITLES, EvaluatedImage, ious, total_confusion
from mmseg_inceptionnext.files import file_digest, write_text
from mmseg_inceptionnext.images import local_or_content, read_picture
from mmseg_inceptionnext.labels import ignore_index_of
from mmseg_inceptionnext.version import __version__

_PANEL_SIDE = 480  # pixels of the longer side: an image of four panels takes about 100 kB
_PAIRS_SHOWN = 20
_ROWS_OF_HEAT_MAP, _COLUMNS_OF_HEAT_MAP = 15, 24
_WRONG, _RIGHT = (214, 39, 40), (205, 220, 205)


def write_report(folder: str | Path, figures: dict, images: Sequence[EvaluatedImage], meta: dict, cfg: Config,
                 checkpoint: str | Path, num_images: int = 5, digest: str | None = None) -> None:  # fmt: skip
    """Write ``index.html``, which needs no other file, and ``report.json`` into a folder.

    Args:
        folder: Folder, made if it is missing; an older report in it is replaced.
        figures: What :func:`~mmseg_inceptionnext.evaluation.evaluate` returns.
        images: All images of the test.
        meta: 'classes' and 'palette' of the data set.
        cfg, checkpoint: Config and path of the checkpoint.
        num_images: How many of the worst, the median and the best images to show.
        digest: The checkpoint's, as it was when it was read; by default, as it is now.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes = [name.strip() for name in meta['classes']]
    palette = [tuple(map(int, colour)) for colour in meta['palette']]
    confusion = total_confusion(images, len(classes))
    ranked = sorted((image for image in images if len(image.pairs)), key=lambda image: image.miou)
    calibration = figures.get('calibration')  # none of a file that returns labels alone
    headline = {key: value for key, value in figures.items() if key not in ('per_class', 'calibration')}
    report = {
        **headline,
        'per_class': {
            name: {**figures['per_class'][name], 'pixels': int(pixels)}
            for name, pixels in zip(classes, confusion.sum(1), strict=True)
        },
        'calibration': calibration,
        'confused_pairs': confused_classes(confusion, classes),
        'images': [
            {'path': image.path, 'mIoU': round(image.miou, 2), 'aAcc': round(image.aacc, 2)} for image in ranked
        ],
        'run': _run(checkpoint, digest or file_digest(Path(checkpoint).expanduser())),
        'config': cfg.pretty_text,
    }
    write_text(folder / 'report.json', json.dumps(report, indent=1) + '\n')

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('mmseg_inceptionnext', 'evaluation'),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template('report.html.j2').render(
        name='/'.join(Path(checkpoint).parts[-2:]),
        report=report,
        headline={key: TITLES.get(key, key) for key in headline},
        columns=list(next(iter(figures['per_class'].values()))),
        num_images=len(images),
        colours=dict(zip(classes, palette, strict=True)),
        labelled_pixels=int(confusion.sum()),
        pairs=report['confused_pairs'][:_PAIRS_SHOWN],
        heat_map=_heat_map(confusion, classes) if confusion.any() else None,  # all may be unlabelled
        calibration=_calibration_charts(calibration) if calibration and confusion.any() else None,
        galleries={
            title: [panels for image in chosen if (panels := _panels(image, classes, palette))]
            for title, chosen in choose_images(ranked, num_images).items()
        },
    )
    write_text(folder / 'index.html', page)


def confused_classes(confusion: np.ndarray, classes: Sequence[str]) -> list[dict]:
    """List all pairs of a true class and a wrongly predicted one, most pixels first.

    Args:
        confusion: What :func:`~mmseg_inceptionnext.evaluation.metrics.total_confusion` returns.
        classes: Names of the classes.

    Returns:
        ``[{'truth', 'prediction', 'pixels', 'share'}]``; the share is that of the true class's pixels, in percent.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    pixels_of = confusion.sum(1)
    order = np.argsort(wrong, axis=None, kind='stable')[::-1]
    pairs = zip(*np.unravel_index(order[: np.count_nonzero(wrong)], wrong.shape), strict=True)
    return [
        {
            'truth': classes[i],
            'prediction': classes[j],
            'pixels': int(wrong[i, j]),
            'share': round(float(100 * wrong[i, j] / pixels_of[i]), 2),
        }
        for i, j in pairs
    ]


def choose_images(ranked: Sequence[EvaluatedImage], number: int) -> dict[str, Sequence[EvaluatedImage]]:
    """Choose the worst, the median and the best of images that are ranked from worst to best; none twice."""
    number = min(number, -(-len(ranked) // 3))
    worst, rest = ranked[:number], ranked[number:]
    best = rest[::-1][:number]
    between = rest[: len(rest) - len(best)]
    start = max(0, (len(between) - number) // 2)
    return {'Worst': worst, 'Median': between[start : start + number], 'Best': best}


def _run(checkpoint: str | Path, digest: str) -> dict:
    modules = {'torch': torch, 'timm': timm, 'mmengine': mmengine, 'mmcv': mmcv, 'mmsegmentation': mmseg}
    return {
        'command': shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        'checkpoint': str(checkpoint),
        'sha256': digest,
        'date': datetime.now().astimezone().isoformat(timespec='seconds'),
        'device': device_name(get_device()),
        'versions': {
            'mmseg_inceptionnext': __version__,
            'python': platform.python_version(),
            **{name: module.__version__ for name, module in modules.items()},
        },
    }


def _heat_map(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Draw the classes of the lowest IoU, and what their pixels were predicted as; return an SVG as data URI."""
    present = np.flatnonzero(confusion.sum(1))
    rows = present[np.argsort(ious(confusion)[present], kind='stable')][:_ROWS_OF_HEAT_MAP]
    shares = 100 * confusion[rows] / confusion[rows].sum(1, keepdims=True)
    columns = [j for j in np.argsort(-shares.sum(0), kind='stable') if shares[:, j].max() >= 1][:_COLUMNS_OF_HEAT_MAP]
    size = (2.5 + 0.42 * len(columns), 2 + 0.36 * len(rows))
    figure = Figure(figsize=size, layout='constrained', facecolor='white')
    axes = figure.subplots()
    axes.imshow(shares[:, columns], cmap='Blues', vmin=0, vmax=100, aspect='auto')
    axes.set_xticks(range(len(columns)), [classes[j] for j in columns], rotation=60, ha='right', rotation_mode='anchor')
    axes.set_yticks(range(len(rows)), [classes[i] for i in rows])
    axes.set(xlabel='predicted', ylabel='truth')
    for y, i in enumerate(rows):
        for x, j in enumerate(columns):
            if (share := shares[y, j]) >= 1:
                axes.text(x, y, f'{share:.0f}', ha='center', va='center', fontsize=8,
                          fontweight='bold' if i == j else None, color='white' if share > 55 else 'black')  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format='svg')
    return _data_uri(file.getvalue(), 'svg+xml')


def _calibration_charts(calibration: dict) -> str:
    """Draw the reliability diagram, and accuracy against coverage; return an SVG as data URI."""
    figure = Figure(figsize=(10, 4.2), layout='constrained', facecolor='white')
    left, right = figure.subplots(1, 2)
    bins = [row for row in calibration['reliability'] if row['pixels']]
    total = sum(row['pixels'] for row in bins)
    middles = [50 * (row['low'] + row['high']) for row in bins]
    left.bar(middles, [100 * row['pixels'] / total for row in bins], 100 / len(calibration['reliability']),
             color='#dde2e8', label='% of the pixels')  # fmt: skip
    left.plot([0, 100], [0, 100], color='#667', linestyle=':')
    left.plot([row['confidence'] for row in bins], [row['accuracy'] for row in bins], 'o-', color='#1f77b4',
              label='accuracy')  # fmt: skip
    left.set(xlabel='confidence, %', ylabel='%', xlim=(0, 100), ylim=(0, 100))
    left.legend(loc='upper left')
    rows = [row for row in calibration['coverage'] if row['accuracy'] is not None]
    right.plot([row['coverage'] for row in rows], [row['accuracy'] for row in rows], color='#1f77b4')
    right.set(xlabel='coverage: % of the pixels, the most confident', ylabel='accuracy, %', xlim=(0, 100))
    file = io.BytesIO()
    figure.savefig(file, format='svg')
    return _data_uri(file.getvalue(), 'svg+xml')


def _panels(image: EvaluatedImage, classes: Sequence[str], palette: Sequence[tuple]) -> dict | None:
    """Return what the page shows of an image: four pictures, its metrics and the classes that it has.

    None for one that is no picture, such as an array that the config's own transform reads.
    """
    truth, prediction = (
        np.asarray(Image.open(io.BytesIO(png))).astype(np.int64) for png in (image.truth_png, image.prediction_png)
    )
    try:
        pixels = read_picture(local_or_content(image.path))
    except (UserError, OSError) as error:
        say(f'the report does not show an image that cannot be drawn: {error}', logging.WARNING)
        return None
    labelled = truth != ignore_index_of(len(classes))
    errors = np.full_like(pixels, 255)
    errors[labelled] = np.where((truth == prediction)[labelled, None], _RIGHT, _WRONG)
    pictures = {
        'input': pixels,
        'truth': draw_overlay(pixels, truth, palette),
        'prediction': draw_overlay(pixels, prediction, palette),
        'errors': errors,
    }
    present = [i for i in np.union1d(truth, prediction) if i < len(classes)]
    return {
        'name': Path(image.path).name,
        'miou': image.miou,
        'aacc': image.aacc,
        'pictures': {title: _jpeg(picture) for title, picture in pictures.items()},
        'classes': [classes[i] for i in present],
    }


def _jpeg(pixels: np.ndarray) -> str:
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((_PANEL_SIDE, _PANEL_SIDE))
    picture.save(file, 'jpeg', quality=85)
    return _data_uri(file.getvalue(), 'jpeg')


def _data_uri(content: bytes, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
