"""int8 files: calibrated on some images, compared on others, and not kept if they lose too much."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_CONFIG, TINY_UPERNET, assert_user_error, segmentor_with_statistics

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.export.export import export, to_onnx
from mmseg_inceptionnext.export.exportable import ExportableSegmentor
from mmseg_inceptionnext.export.quantize import (
    Calibration,
    HeldOut,
    calibration_of_config,
    calibration_of_folder,
    compare,
    quantize,
)
from mmseg_inceptionnext.inference.onnx_model import OnnxModel
from mmseg_inceptionnext.inference.runtimes import RUNTIMES

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytest.importorskip('openvino')
pytest.importorskip('nncf')
pytestmark = pytest.mark.skipif(
    torch.__version__.startswith('2.6.'), reason="torch 2.6's ONNX exporter cannot write these segmentors"
)


@pytest.fixture(scope='module')
def photos(mini_root):
    return mini_root / 'images' / 'training'


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_an_int8_file_of_a_trained_segmentor(trained, photos, runtime, tool_here, tmp_path):
    command = ('export', TINY_CONFIG, trained, '--out', 'm.onnx', '--shape', 160, 160, '--labels', '--runtime', runtime,
               '--precision', 'int8', '--calibrate', photos, '--images', 2, '--max-drop', 100)  # fmt: skip
    process = tool_here(*command)
    assert process.returncode == 0, process.stderr[-3000:]
    found = re.search(
        r'm.onnx: \d+ MiB, int8. Calibrated on 2 images. On 2 others: ([\d.]+)% of the labels differ', process.stdout
    )
    assert found, process.stdout
    model = onnx.load(tmp_path / 'm.onnx')
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count('QuantizeLinear') > 10
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    stored = json.loads(metadata['quantization'])
    assert (stored['calibrated'], stored['compared'], stored['miou']) == (2, 2, None)
    assert f'{100 * stored["differing"]:.2f}' == found[1] and 'nncf' in json.loads(metadata['versions'])
    contract = OnnxModel(tmp_path / 'm.onnx').contract
    assert (contract.precision, contract.runtime, contract.quantization) == ('int8', runtime, stored)
    image = np.asarray(Image.open(next(photos.iterdir())))
    assert Segmentor(tmp_path / 'm.onnx')(image).labels.shape == image.shape[:2]


def test_interpolation_and_convolutions_of_concatenated_maps_are_not_quantised():
    """UPerHead's products of weights are, in the form for either runtime."""
    torch.manual_seed(0)
    model = segmentor_with_statistics(TINY_UPERNET)
    pixels = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    for runtime in RUNTIMES:
        program = torch.export.export(ExportableSegmentor(model, True, runtime, 'int8', fixed_size=True), (pixels,))
        graph = quantize(to_onnx(program, 'labels'), set(program.state_dict), [pixels.numpy()]).graph
        made_by = {output: node for node in graph.node for output in node.output}

        def kind(name, made_by=made_by):
            while name in made_by and made_by[name].op_type == 'Transpose':
                name = made_by[name].input[0]
            return made_by[name].op_type if name in made_by else 'constant'

        kinds = {
            (node.op_type, *map(kind, node.input[:2])) for node in graph.node if node.op_type in ('Conv', 'MatMul')
        }
        assert ('MatMul', 'DequantizeLinear', 'DequantizeLinear') in kinds  # taps
        assert ('Conv', 'Concat', 'constant') in kinds
        for found in kinds:
            assert found.count('DequantizeLinear') in (0, 2), found


def test_the_miou_of_both_is_stored(tiny_cfg, trained, tmp_path):
    calibration = calibration_of_config(tiny_cfg, 2, max_drop=100)
    verified = export(tiny_cfg, trained, tmp_path / 'm.onnx', (160, 160), precision='int8', calibration=calibration)
    found = verified.quantization
    assert (found.calibrated, found.compared) == (2, 2) and verified.images == 2 and verified.error is None
    assert 0 <= found.miou <= 100 and 0 <= found.miou_int8 <= 100


def held_out(*masks):
    return [HeldOut(str(i), mask) for i, mask in enumerate(masks)]


def test_the_drop_is_that_of_the_pooled_miou():
    """Over all images, at the masks' size, without ignored pixels; a class that is nowhere does not count."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    right, wrong = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    found = compare(lambda _: (right, wrong), Calibration(['a'], held_out(mask, mask), 75), 3, 255)
    assert (found.miou, found.differing, found.compared) == (100, 0.5, 2)
    assert found.miou_int8 == pytest.approx(100 * (4 / 7 + 0) / 2)
    with pytest.raises(
        UserError, match=r'int8 loses 71.43 points of mIoU on 1 images, more than max_drop=0.5: nothing'
    ):
        compare(lambda _: (right, wrong), Calibration(['a'], held_out(mask), 0.5), 3, 255)
    with pytest.raises(UserError, match=r'int8 loses 50.00 % of the labels on 1 images, more than max_drop=5.0'):
        compare(lambda _: (right, wrong), Calibration(['a'], held_out(None), 5.0), 3, 255)


def test_a_file_that_loses_too_much_is_not_kept(trained, photos, tmp_path):
    out = tmp_path / 'm.onnx'
    out.write_text('what was there')
    with pytest.raises(UserError, match='nothing is written'):
        export(TINY_CONFIG, trained, out, (160, 160), precision='int8',
               calibration=calibration_of_folder(photos, 2, max_drop=-1))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ['m.onnx'] and out.read_text() == 'what was there'


def test_images_to_calibrate_on_are_not_those_to_compare_on(tmp_path, mini_root, tiny_cfg):
    for i in range(9):
        (tmp_path / f'{i}.jpg').touch()
    chosen = calibration_of_folder(tmp_path, 3)
    others = [item.image for item in chosen.held_out]
    assert len(chosen.images) == len(others) == 3 and not set(chosen.images) & set(others)
    assert chosen.max_drop == 5
    chosen = calibration_of_config(tiny_cfg, 100)
    assert len(chosen.images) == 4 and all('training' in path for path in chosen.images) and chosen.max_drop == 0.5
    (first, _) = chosen.held_out
    assert 'validation' in first.image and first.mask.shape == (96, 96)


def test_mistakes(trained, photos, tool_here, tmp_path, monkeypatch):
    command = ('export', TINY_CONFIG, trained, '--out', 'm.onnx', '--shape', 160, 160)
    int8 = (*command, '--precision', 'int8')
    assert_user_error(tool_here(*int8), 'needs images to calibrate on: pass --calibrate DIR or --data FILE')
    assert_user_error(tool_here(*command, '--calibrate', photos), '--calibrate DIR goes with --precision int8')
    assert_user_error(tool_here(*command, '--max-drop', 1), '--max-drop goes with --precision int8')
    assert_user_error(tool_here(*int8, '--calibrate', 'none'), '--calibrate none cannot be read: No such file')
    assert_user_error(tool_here(*int8, '--calibrate', tmp_path), 'holds 0 images: at least two')
    few = tool_here(*int8, '--calibrate', photos, '--images', 'a.jpg')
    assert_user_error(few, '--images a.jpg: with --precision int8, it is the number of images')
    monkeypatch.setitem(sys.modules, 'nncf', None)
    missing = tool_here(*int8, '--calibrate', photos)
    assert_user_error(missing, '--precision int8 needs nncf: pip install mmseg-inceptionnext[int8]')
    assert not (tmp_path / 'm.onnx').exists()


def test_masks_of_classes_in_another_order(trained, photos, tmp_path):
    """Both mIoUs would be near 0, and no loss would show."""
    names = torch.load(trained, weights_only=False)['meta']['dataset_meta']['classes']
    calibration = Calibration([str(next(photos.iterdir()))], [], 0.5, names[::-1])
    with pytest.raises(UserError, match='all are in another order'):
        export(TINY_CONFIG, trained, tmp_path / 'm.onnx', (64, 64), precision='int8', calibration=calibration)
