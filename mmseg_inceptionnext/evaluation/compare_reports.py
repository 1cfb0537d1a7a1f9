"""Compare two reports: what improved, and what got worse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmseg_inceptionnext.command_line import markdown_table
from mmseg_inceptionnext.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Metrics of report A beside those of report B, in percent.

    Attributes:
        headline: ``{'mIoU': (A, B), …}``; None where a report has no figure.
        classes: ``{name: (IoU in A, IoU in B)}`` of the classes whose IoU is known in both and differs, most improved
            first.
        unchanged: How many classes have the same IoU in both.
        one_sided: ``{name: (IoU in A, IoU in B)}`` of the classes whose IoU is known in one report only.
        same_images: Whether both evaluated images of the same names.
    """

    headline: dict[str, tuple[float | None, float | None]]
    classes: dict[str, tuple[float, float]]
    unchanged: int
    one_sided: dict[str, tuple[float | None, float | None]]
    same_images: bool


def read_report(path: str | Path) -> dict:
    """Read a report that :func:`~mmseg_inceptionnext.evaluation.evaluate` has written.

    Args:
        path: Path of its folder, or of ``report.json`` in it.

    Raises:
        UserError: There is no report, or the file is not one.
    """
    path = Path(path)
    file = path / 'report.json' if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding='utf-8'))
        ious = [row['IoU'] for row in report['per_class'].values()] + [report['mIoU']]
        if not all(map(_is_figure, ious)):
            raise TypeError('a figure is not a number')
        names = [image['path'] for image in report['images']]
        if not all(isinstance(name, str) for name in names):
            raise TypeError('a path is not a string')
    except OSError as error:
        raise UserError(
            f'no report at {file} ({error.strerror}): `python -m mmseg_inceptionnext test … --report {path}` writes one'
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is not a report of tools/test.py --report: {type(error).__name__}: {error}') from error
    return report


def compare_reports(a: dict, b: dict) -> Comparison:
    """Compare two reports of :func:`read_report`.

    Raises:
        UserError: Their classes differ.
    """
    if a['per_class'].keys() != b['per_class'].keys():
        odd = sorted(a['per_class'].keys() ^ b['per_class'].keys())
        raise UserError(f'the reports have different classes, {odd[0]!r} is in one only: compare runs on one data set')
    pairs = {name: (a['per_class'][name]['IoU'], b['per_class'][name]['IoU']) for name in a['per_class']}
    known = {name: pair for name, pair in pairs.items() if None not in pair}
    changed = {name: pair for name, pair in known.items() if pair[0] != pair[1]}
    names = [sorted(Path(image['path']).name for image in report['images']) for report in (a, b)]
    return Comparison(
        headline={
            key: (a[key], b[key])
            for key in a
            if key in b and _is_figure(a[key]) and _is_figure(b[key]) and key != 'calibration'
        },
        classes=dict(sorted(changed.items(), key=lambda item: item[1][0] - item[1][1])),
        unchanged=len(known) - len(changed),
        one_sided={name: pair for name, pair in pairs.items() if pair.count(None) == 1},
        same_images=names[0] == names[1],
    )


def _is_figure(value) -> bool:
    return value is None or isinstance(value, (int, float))


def comparison_text(comparison: Comparison) -> str:
    """Format a comparison as tables: headline, improved, worse, and classes that only one report has."""
    parts = [_table('', comparison.headline)]
    if not comparison.same_images:
        parts.insert(0, 'The two runs evaluated different images: differences are not due to the models alone.')
    better = {name: pair for name, pair in comparison.classes.items() if pair[1] > pair[0]}
    worse = {name: pair for name, pair in reversed(comparison.classes.items()) if pair[1] < pair[0]}
    if better:
        parts.append(_table(f'improved ({len(better)})', better))
    if worse:
        parts.append(_table(f'worse ({len(worse)})', worse))
    if comparison.one_sided:
        parts.append(_table(f'in one only ({len(comparison.one_sided)})', comparison.one_sided))
    parts.append(f'{comparison.unchanged} classes have the same IoU in both.')
    return '\n\n'.join(parts)


def _table(title: str, rows: dict[str, tuple[float | None, float | None]]) -> str:
    cells = [
        [name, *('–' if x is None else f'{x:.2f}' for x in (a, b)), '–' if None in (a, b) else f'{b - a:+.2f}']
        for name, (a, b) in rows.items()
    ]
    return markdown_table([title, 'A', 'B', 'B − A'], cells)
