"""The report: a page that works by itself in a browser, and the same figures for programs."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from support import TINY_CONFIG

from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.evaluation.metrics import EvaluatedImage
from mmseg_inceptionnext.evaluation.report import choose_images, confused_classes, write_report


@pytest.fixture(scope='module')
def report(trained, mini_root, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with a report, and the figures that evaluate returned with it."""
    folder = tmp_path_factory.mktemp('report')
    cfg = load_config(TINY_CONFIG, folder / 'work', mini_root)
    return folder / 'report', evaluate(cfg, trained, report=folder / 'report', report_images=1)


def test_the_file_for_programs(report, trained):
    folder, figures = report
    content = json.loads((folder / 'report.json').read_text())
    assert {key: content[key] for key in ('mIoU', 'mAcc', 'aAcc')} == {
        key: figures[key] for key in ('mIoU', 'mAcc', 'aAcc')
    }
    for name, row in content['per_class'].items():
        assert {key: row[key] for key in ('IoU', 'BoundaryIoU', 'Acc')} == figures['per_class'][name]
    assert content['calibration'] == figures['calibration'] and content['ECE'] == figures['ECE'] > 0
    assert 'Calibration</h2>' in (folder / 'index.html').read_text()
    assert sum(row['pixels'] for row in content['per_class'].values()) > 0
    assert [Path(image['path']).name for image in content['images']] != []
    assert content['images'] == sorted(content['images'], key=lambda image: image['mIoU'])
    run = content['run']
    assert run['sha256'] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert run['versions'].keys() >= {'mmseg_inceptionnext', 'torch', 'mmsegmentation'} and run['command']
    assert "type='InceptionNeXt'" in content['config']


def test_the_page_needs_nothing_else(report):
    page = (report[0] / 'index.html').read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert 'http://' not in page.replace('http://www.w3.org', '').split('<details>')[0]


def browser():
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@pytest.mark.skipif(browser() is None, reason='no Chromium on this machine: apt-get install chromium')
@pytest.mark.parametrize('width', [1280, 390], ids=['desktop', 'phone'])
def test_in_a_browser(report, width):
    sync_api = pytest.importorskip('playwright.sync_api')
    folder, figures = report
    problems = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=['--no-sandbox', '--disable-gpu'])
        page = chromium.new_page(viewport=dict(width=width, height=900))
        page.on('pageerror', lambda error: problems.append(str(error)))
        page.on('console', lambda message: problems.append(message.text) if message.type == 'error' else None)
        page.on(
            'request',
            lambda request: problems.append(request.url[:80]) if request.url[:5] not in ('file:', 'data:') else None,
        )
        page.goto((folder / 'index.html').as_uri())
        assert page.locator('.headline b').all_inner_texts()[0] == f'{figures["mIoU"]:.2f}'
        assert page.evaluate('document.documentElement.scrollWidth') <= width

        pictures = page.locator('img')
        assert (
            pictures.count() == 2 + 4 * 2
        )  # the heat map; calibration; four panels of the worst and the best of two images
        assert page.evaluate('[...document.images].every(image => image.complete && image.naturalWidth > 0)')

        def column(index: int) -> list[str]:
            return page.locator(f'#classes tbody td:nth-child({index})').all_inner_texts()

        known = [row['IoU'] for row in figures['per_class'].values() if row['IoU'] is not None]
        missing = ['–'] * (150 - len(known))
        page.click('#classes th:nth-child(2) button')
        assert column(2) == [f'{iou:.2f}' for iou in sorted(known, reverse=True)] + missing
        page.click('#classes th:nth-child(2) button')
        assert column(2) == [f'{iou:.2f}' for iou in sorted(known)] + missing
        page.click('#classes th:nth-child(1) button')
        assert column(1)[:2] == ['airplane', 'animal'] and len(column(1)) == 150
        page.click('summary')
        assert page.locator('pre').is_visible()
        chromium.close()
    assert problems == []


def test_of_images_that_are_unlabelled_altogether(trained, tmp_path):
    figures = dict(mIoU=None, mAcc=None, aAcc=None, per_class={'a': dict(IoU=None, Acc=None)}, calibration={})
    images = [EvaluatedImage('x.jpg', b'', b'', np.zeros((0, 3), np.int64))]
    write_report(tmp_path, figures, images, dict(classes=['a'], palette=[[1, 2, 3]]), Config(), trained)
    assert 'lowest IoU' not in (tmp_path / 'index.html').read_text()


def test_the_most_confused_come_first():
    confusion = np.array([[8, 2, 0], [5, 5, 10], [0, 0, 0]])
    assert confused_classes(confusion, ['a', 'b', 'c']) == [
        dict(truth='b', prediction='c', pixels=10, share=50.0),
        dict(truth='b', prediction='a', pixels=5, share=25.0),
        dict(truth='a', prediction='b', pixels=2, share=20.0),
    ]


@pytest.mark.parametrize('total', [0, 1, 2, 3, 4, 7, 100])
def test_no_image_is_shown_twice(total):
    ranked = [EvaluatedImage(str(i), b'', b'', np.zeros((0, 3))) for i in range(total)]
    chosen = choose_images(ranked, 5)
    shown = [int(image.path) for images in chosen.values() for image in images]
    assert len(set(shown)) == len(shown) == min(total, 15) or total < 15 and len(set(shown)) == len(shown)
    if total == 100:
        assert [[int(image.path) for image in images] for images in chosen.values()] == [
            [0, 1, 2, 3, 4], [47, 48, 49, 50, 51], [99, 98, 97, 96, 95]
        ]  # fmt: skip
    if total:
        assert shown[0] == 0
