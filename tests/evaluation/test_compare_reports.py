import json

import pytest

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.evaluation.compare_reports import compare_reports, comparison_text, read_report


def report(miou: float, images=('x/1.jpg',), **ious) -> dict:
    return {
        'mIoU': miou, 'mAcc': None, 'aAcc': 90.0, 'images': [{'path': path} for path in images],
        'per_class': {name: {'IoU': iou} for name, iou in ious.items()},
    }  # fmt: skip


A = report(40, wall=50.0, sky=90.0, sea=10.0, rare=None, never=None, same=7.0)
B = report(44.5, images=('elsewhere/1.jpg',), wall=49.0, sky=91.0, sea=25.5, rare=3.0, never=None, same=7.0)


def test_what_improved_and_what_got_worse():
    comparison = compare_reports(A, B)
    assert list(comparison.classes) == ['sea', 'sky', 'wall']
    assert comparison.unchanged == 1 and comparison.one_sided == {'rare': (None, 3.0)} and comparison.same_images
    text = comparison_text(comparison)
    assert [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('|') and '---' not in line] == [
        '', 'mIoU', 'mAcc', 'aAcc', 'improved (2)', 'sea', 'sky', 'worse (1)', 'wall', 'in one only (1)', 'rare'
    ]  # fmt: skip
    assert '+15.50' in text and '-1.00' in text and '+4.50' in text


def test_the_same_twice():
    assert 'improved' not in comparison_text(compare_reports(A, A))


def test_no_row_says_that_there_is_no_calibration():
    a, b = (report | dict(calibration=None) for report in (A, B))
    assert 'calibration' not in comparison_text(compare_reports(a, b))


def test_other_images_are_said():
    assert 'different images' in comparison_text(
        compare_reports(A, report(1, images=('2.jpg',), **dict.fromkeys(A['per_class'], 1.0)))
    )


def test_other_classes():
    with pytest.raises(UserError, match="have different classes, 'moon' is in one only"):
        compare_reports(A, report(1, **dict.fromkeys(A['per_class'], 1.0), moon=2.0))


@pytest.mark.parametrize(
    'content',
    [
        None,
        '',
        '[]',
        '{}',
        '{"per_class": {"a": {"IoU": "x"}}}',
        '{"per_class": 3}',
        json.dumps(A | {'images': [{'path': 5}]}),
    ],
)
def test_files_that_are_no_reports(tmp_path, content):
    if content is not None:
        (tmp_path / 'report.json').write_text(content)
    with pytest.raises(UserError, match='no report at' if content is None else 'is not a report'):
        read_report(tmp_path)


def test_a_folder_and_its_file_are_the_same(tmp_path):
    (tmp_path / 'report.json').write_text(json.dumps(A))
    assert read_report(tmp_path) == read_report(tmp_path / 'report.json') == A
