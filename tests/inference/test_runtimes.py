"""Exported files run in ONNX Runtime and in OpenVINO, in each precision; a runtime's failure is one line."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from support import TINY_CONFIG, TINY_UPERNET, assert_user_error, segmentor_with_statistics

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.export.export import export
from mmseg_inceptionnext.inference import runtimes
from mmseg_inceptionnext.inference.onnx_model import OnnxModel
from mmseg_inceptionnext.inference.runtimes import RUNTIMES, OpenVinoSession

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.skipif(
    torch.__version__.startswith('2.6.'), reason="torch 2.6's ONNX exporter cannot write these segmentors"
)

SIZE = (160, 160)  # as the config's test pipeline leaves it


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    init_default_scope('mmseg')
    model = segmentor_with_statistics(TINY_UPERNET)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    meta = {key: ADE20KDataset.METAINFO[key] for key in ('classes', 'palette')} | dict(reduce_zero_label=True)
    path = tmp_path_factory.mktemp('upernet') / 'model.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), path)
    return path


@pytest.fixture(scope='module')
def written(checkpoint, tmp_path_factory):
    """Function that returns a file with its verification; each is exported once."""
    folder, files = tmp_path_factory.mktemp('files'), {}

    def write(**options):
        name = ' '.join(f'{key}={value}' for key, value in options.items())
        if name not in files:
            path = folder / f'{len(files)}.onnx'
            files[name] = path, export(TINY_UPERNET, checkpoint, path, SIZE, verify=2, **options)
        return files[name]

    return write


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(256, size=(2, 3, *SIZE), dtype=np.uint8)


@pytest.mark.parametrize(
    ('made_for', 'dynamic'),
    [('onnxruntime', False), ('openvino', False), pytest.param('openvino', True, marks=pytest.mark.slow)],
    ids=['onnxruntime', 'openvino', 'openvino, dynamic'],
)
def test_a_file_for_one_runtime_runs_in_both_alike(written, images, made_for, dynamic):
    path, verified = written(runtime=made_for, dynamic=dynamic)
    assert verified.error < 1e-5 and verified.precision == 'fp32'
    assert OnnxModel(path).contract.runtime == made_for
    logits = [OnnxModel(path, runtime).run(images) for runtime in RUNTIMES]
    assert logits[0].dtype == logits[1].dtype == np.float32
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_labels_are_uint8_and_those_of_the_logits(written, images, runtime):
    path, _ = written(runtime=runtime, labels=True)
    labels = OnnxModel(path).run(images)
    expected = OnnxModel(written(runtime=runtime, dynamic=False)[0]).run(images).argmax(1)
    assert labels.dtype == np.uint8 and labels.shape == (2, *SIZE)
    assert np.mean(labels != expected) < 1e-3


@pytest.mark.skipif(not runtimes.computes_bf16(), reason='this processor has no units for bfloat16')
def test_bfloat16_is_computed_in_openvino_alone(written, images):
    """Its file has float32 weights, which ONNX Runtime computes with."""
    path, verified = written(runtime='openvino', precision='bf16')
    assert verified.precision == 'bf16' and 1e-4 < verified.error < 8e-2
    exact, rounded = (OnnxModel(path, runtime).run(images) for runtime in RUNTIMES)
    expected = OnnxModel(written(runtime='openvino', dynamic=False)[0]).run(images)
    largest = np.abs(expected).max()
    assert np.abs(exact - expected).max() < 1e-5 * largest < 1e-3 * largest < np.abs(rounded - expected).max()


@pytest.mark.parametrize('has_units', [False, True])
def test_auto_is_bfloat16_where_the_processor_has_units_for_it(checkpoint, tmp_path, monkeypatch, has_units):
    monkeypatch.setattr(sys.modules['mmseg_inceptionnext.export.export'], 'computes_bf16', lambda: has_units)
    options = dict(shape=SIZE, verify=1, labels=True, runtime='openvino', precision='auto')
    verified = export(TINY_UPERNET, checkpoint, tmp_path / 'm.onnx', **options)
    assert verified.precision == ('bf16' if has_units else 'fp32')


def test_segmentor_and_predict_take_the_runtime_and_threads(written, tool_here, tmp_path):
    path, _ = written(runtime='onnxruntime', labels=True)
    image = np.random.default_rng(1).integers(256, size=(*SIZE, 3), dtype=np.uint8)
    plain, ours = Segmentor(path), Segmentor(path, runtime='openvino', threads=1)
    assert isinstance(ours._model._session, OpenVinoSession)
    assert np.mean(plain(image).labels != ours(image).labels) < 1e-3
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again._model._session, OpenVinoSession)
    threads = torch.get_num_threads()
    try:
        process = tool_here('predict', path, *write_images(tmp_path, image), '--out', 'o', '--runtime', 'openvino',
                            '--threads', 1)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert process.returncode == 0 and '1 images in o' in process.stdout, process.stderr[-2000:]


def test_a_trained_segmentor_takes_a_number_of_threads_as_well(trained, tool_here, tmp_path):
    image, threads = np.zeros((64, 64, 3), np.uint8), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        process = tool_here(
            'predict', TINY_CONFIG, trained, *write_images(tmp_path, image), '--out', 'o', '--threads', 1
        )
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    assert process.returncode == 0 and '1 images in o' in process.stdout, process.stderr[-2000:]
    assert used == 1


def write_images(folder, *images):
    from PIL import Image

    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{i}.png')
        yield folder / f'{i}.png'


def test_a_file_of_an_earlier_version_says_neither_runtime_nor_dtype(written, images, tmp_path):
    """Its labels are int64, and ONNX Runtime runs it."""
    model = onnx.load(written(runtime='openvino', labels=True)[0])
    kept = [entry for entry in model.metadata_props if entry.key not in ('runtime', 'label_dtype', 'quantization')]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    (output,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node('Cast', [output.name], ['long'], to=onnx.TensorProto.INT64))
    output.name = 'long'
    output.type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, tmp_path / 'old.onnx')
    old = OnnxModel(tmp_path / 'old.onnx')
    assert (old.contract.runtime, old.contract.label_dtype) == ('onnxruntime', 'int64')
    assert old.run(images).dtype == np.int64


def test_mistakes(written, checkpoint, tool_here, tmp_path, monkeypatch):
    path, _ = written(runtime='openvino', labels=True)
    with pytest.raises(UserError, match="runtime='tensorrt': choose onnxruntime or openvino"):
        Segmentor(path, runtime='tensorrt')
    with pytest.raises(UserError, match='threads=0 must be at least 1'):
        Segmentor(path, threads=0)
    with pytest.raises(UserError, match="runtime='openvino' is for .onnx files"):
        Segmentor(TINY_UPERNET, checkpoint, device='cpu', runtime='openvino')
    command = ('export', TINY_UPERNET, checkpoint, '--out')
    assert_user_error(tool_here(*command, 'm.onnx', '--precision', 'bf16'), '--precision bf16 needs --runtime openvino')
    assert_user_error(tool_here(*command, 'm.pt2', '--runtime', 'openvino'), '--runtime openvino is for .onnx files')
    assert_user_error(tool_here(*command, 'm.pt2', '--precision', 'bf16'), '--precision bf16 is for .onnx files')
    assert_user_error(tool_here(*command, 'm.onnx', '--runtime', 'x'), "invalid choice: 'x'")
    assert_user_error(tool_here('predict', path, 'a.jpg', '--out', 'o', '--threads', 0), '--threads')
    monkeypatch.setitem(sys.modules, 'openvino', None)
    expected = '--runtime openvino needs openvino: pip install mmseg-inceptionnext[openvino]'
    assert_user_error(tool_here(*command, 'm.onnx', '--runtime', 'openvino'), expected)
    assert_user_error(tool_here('predict', path, 'a.jpg', '--out', 'o'), expected)
    assert not list(tmp_path.glob('m.*'))


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_graph_that_a_runtime_cannot_run_is_one_line(written, runtime, tmp_path):
    model = onnx.load(written(runtime=runtime, labels=True)[0])
    concat = next(node for node in model.graph.node if node.op_type == 'Concat')
    concat.attribute[0].i = 7  # an axis that its inputs do not have
    (tmp_path / 'm.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f'm.onnx cannot be run by {RUNTIMES[runtime].name}: '):
        OnnxModel(tmp_path / 'm.onnx').run(np.zeros((1, 3, *SIZE), np.uint8))


def test_a_signal_after_openvino_reaches_its_handler(written):
    """Not SIGSEGV, although the model was dropped in another thread than it was made in."""
    program = (
        'import os, signal, sys, threading\n'
        'from mmseg_inceptionnext.inference.onnx_model import OnnxModel\n'
        'signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n'
        'models = [OnnxModel(sys.argv[1])]\n'
        'thread = threading.Thread(target=models.clear)\n'
        'thread.start(); thread.join()\n'
        'os.kill(os.getpid(), signal.SIGTERM)\n'
    )
    path, _ = written(runtime='openvino', labels=True)
    process = subprocess.run([sys.executable, '-c', program, path], capture_output=True, text=True, timeout=120)
    assert process.returncode == 7, process.stderr[-2000:]


def test_an_interrupt_ends_a_run_in_openvino(written, images, monkeypatch):
    """The request is cancelled, and can be started again."""
    model = OnnxModel(written(runtime='openvino', labels=True)[0])
    expected = model.run(images)

    class Interrupted:
        def __init__(self, request):
            self.request, self.cancelled = request, False

        def start_async(self, inputs):
            self.request.start_async(inputs)

        def wait_for(self, milliseconds):
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True
            self.request.cancel()

        def wait(self):
            self.request.wait()

    session = model._session
    request = session._request
    session._request = Interrupted(request)
    with pytest.raises(KeyboardInterrupt):
        model.run(images)
    assert session._request.cancelled
    session._request = request
    assert np.array_equal(model.run(images), expected)
