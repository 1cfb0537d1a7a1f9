"""An exported file in the place of a checkpoint."""

import copy
import json

import pytest
from support import TINY_CONFIG, assert_user_error, needs_onnx_exporter

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.export.export import export

for package in ('onnx', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package)
pytestmark = needs_onnx_exporter


@pytest.fixture(scope='module', params=[False, True], ids=['logits', 'labels'])
def exported(request, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'model.onnx'
    export(TINY_CONFIG, trained, path, shape=(64, 64), dynamic=True, labels=request.param, verify=1)
    return path, request.param


def test_it_has_the_figures_of_its_checkpoint(tiny_cfg, trained, exported, tmp_path):
    path, labels = exported
    tiny_cfg.test_dataloader.batch_size = 2
    expected = evaluate(copy.deepcopy(tiny_cfg), trained, details=True)
    figures = evaluate(tiny_cfg, path, out=tmp_path / 'out', report=tmp_path / 'report')
    tolerance = 0.5 if labels else 0.02  # labels are scaled to the size of the image, where logits would be
    for name in ('mIoU', 'mAcc', 'aAcc', 'mBoundaryIoU'):
        assert figures[name] == pytest.approx(expected[name], abs=tolerance)
    report = json.loads((tmp_path / 'report/report.json').read_text())
    assert len(list((tmp_path / 'out').iterdir())) == len(report['images'])
    assert ('ECE' in figures) == ('calibration' in figures) == (not labels)
    page = (tmp_path / 'report/index.html').read_text()
    assert ('reliability diagram' in page) == (not labels) and 'model.onnx' in page
    if not labels:
        assert figures['ECE'] == pytest.approx(expected['ECE'], abs=0.02)


@pytest.mark.parametrize('argument', [dict(tta=True), dict(temperature='fit'), dict(precision='bf16')], ids=str)
def test_what_is_for_checkpoints(tiny_cfg, exported, argument):
    name = next(iter(argument))
    with pytest.raises(UserError, match=rf'{name}=.* is for checkpoints, .*model.onnx is an exported file'):
        evaluate(tiny_cfg, exported[0], **argument)


def test_a_config_of_another_run(tiny_cfg, exported):
    cfg = copy.deepcopy(tiny_cfg)
    cfg.test_dataloader.dataset.pipeline[1].scale = (200, 50)
    with pytest.raises(UserError, match=r'model.onnx was exported with the test pipeline .*, the config has .*50'):
        evaluate(cfg, exported[0])
    cfg = copy.deepcopy(tiny_cfg)
    cfg.test_dataloader.dataset.metainfo = dict(classes=['wall', 'sky'])
    cfg.model.decode_head.num_classes = 2
    with pytest.raises(UserError, match='model.onnx has 150 classes, the data set 2: give the config of its run'):
        evaluate(cfg, exported[0])


def test_a_file_that_is_missing_or_no_export(tool_here, mini_root, tmp_path):
    arguments = 'test', TINY_CONFIG, '--data-root', mini_root
    assert_user_error(tool_here(*arguments[:2], 'no.onnx', *arguments[2:]), 'no.onnx cannot be read')
    (tmp_path / 'text.onnx').write_text('hello')
    assert_user_error(tool_here(*arguments[:2], tmp_path / 'text.onnx', *arguments[2:]), 'text.onnx')
