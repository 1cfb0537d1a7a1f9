"""ONNX files from strangers: what no export writes ends in one line, before it takes time or memory."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT, assert_user_error

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.inference.onnx_model import Contract
from mmseg_inceptionnext.labels import Classes

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from onnx import TensorProto, helper  # noqa: E402

CLASSES = Classes(('road', 'ground'), ((120, 120, 120), (40, 160, 40)))
PIXELS = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)


def tensor(name: str, values) -> TensorProto:
    return onnx.numpy_helper.from_array(np.array(values), name)


def model_of(labels=False, size=(64, 64), n=1, steps=(), tensors=(), out='y', kind=None, dims=4, **facts):
    """A model as an export writes it, of a single convolution that gives 'y'; ``steps`` come after it."""
    weight = np.float32([[1, -1, 0], [-1, 1, 0]])[..., None, None]
    nodes = [
        helper.make_node('Cast', ['image'], ['x'], to=TensorProto.FLOAT),
        helper.make_node('Conv', ['x', 'weight'], ['y']),
        *([helper.make_node('ArgMax', ['y'], ['labels'], axis=1, keepdims=0)] if labels else []),
        *steps,
    ]
    out = 'labels' if labels and out == 'y' else out
    shape = [n, *size] if labels else [1] * (dims - 4) + [n, 2, *size]
    kind = kind or (TensorProto.INT64 if labels else TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        'main',
        [helper.make_tensor_value_info('image', TensorProto.UINT8, [n, 3, *size])],
        [helper.make_tensor_value_info(out, kind, shape)],
        [tensor('weight', weight), *tensors],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    is_dynamic = isinstance(size[0], str)
    contract = Contract(CLASSES, labels, 'uint8', None if is_dynamic else size, (), False, 'fp32')
    metadata = contract.metadata({}) | {key: json.dumps(value) for key, value in facts.items()}
    helper.set_model_props(model, metadata)
    return model


def dynamic(**changes):
    return model_of(size=('height', 'width'), n='batch', **changes)


def written(model, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def with_metadata(key: str, text: str):
    model = model_of()
    next(entry for entry in model.metadata_props if entry.key == key).value = text
    return model


def changed(change, **options):
    model = model_of(**options)
    change(model)
    return model


def node(operator: str, *inputs: str, out: str = 'z', **attributes):
    return helper.make_node(operator, list(inputs), [out], **attributes)


def endless_loop():
    """A Loop whose condition stays true."""
    state = helper.make_tensor_value_info
    body = helper.make_graph(
        [node('Identity', 'going', out='goes'), node('Identity', 'a', out='b')],
        'body',
        [state('i', TensorProto.INT64, []), state('going', TensorProto.BOOL, []), state('a', TensorProto.FLOAT, None)],
        [state('goes', TensorProto.BOOL, []), state('b', TensorProto.FLOAT, None)],
    )
    return model_of(steps=[node('Loop', '', 'true', 'y', body=body)], tensors=[tensor('true', True)], out='z')


def graph_in_an_attribute():
    """On an operator that has no such attribute."""
    return model_of(steps=[node('Relu', 'y', body=model_of().graph)], out='z')


def sparse_weights():
    """One number, for which ONNX Runtime would allocate 17 TB."""
    dense = helper.make_sparse_tensor(tensor('many', [1.0]), tensor('at', [3]), [2**42])
    return changed(lambda model: model.graph.sparse_initializer.append(dense))


def function_of_its_own():
    opset = [helper.make_opsetid('', 20)]
    function = helper.make_function('', 'Sigmoid', ['a'], ['b'], [node('Relu', 'a', out='b')], opset)
    return changed(lambda model: model.functions.append(function), steps=[node('Sigmoid', 'y')], out='z')


def many_nodes():
    names = ['y', *(f'y{i}' for i in range(70_000)), 'z']
    return model_of(steps=[node('Relu', a, out=b) for a, b in zip(names, names[1:], strict=False)], out='z')


SCALE = dict(type='Resize', scale=(30000, 30000), keep_ratio=True)
NOT_A_NUMBER = dict(steps=[node('Div', 'y', 'zero')], tensors=[tensor('zero', np.float32(0))], out='z')
HOSTILE = {
    'no classes': (lambda: model_of(classes=[]), 'metadata are damaged'),
    'no classes at all': (lambda: model_of(classes=[], palette=[], codes=[]), 'metadata are damaged'),
    'another number of classes': (
        lambda: model_of(classes=list('abc'), palette=[[0, 0, 0]] * 3, codes=[1, 2, 3]),
        'its graph is not what',
    ),
    'a colour out of range': (lambda: model_of(palette=[[0, 0, 0], [0, 0, 256]]), 'out of range'),
    'a code out of range': (lambda: model_of(codes=[1, 70000]), 'out of range'),
    'an infinite code': (lambda: with_metadata('codes', '[1, Infinity]'), 'OverflowError'),
    'codes of two kinds': (lambda: model_of(codes=[1, [1, 2, 3]]), 'out of range'),
    'a name of a million characters': (lambda: model_of(classes=['a' * 10**6, 'b']), '1000000 characters'),
    'nested brackets': (lambda: with_metadata('prepare', '[' * 200_000 + ']' * 200_000), 'RecursionError'),
    'metadata of 5 MB': (lambda: with_metadata('precision', json.dumps('x' * 5 * 2**20)), 'too long'),
    'no scale': (lambda: model_of(prepare=[dict(type='Resize', keep_ratio=True)]), 'Resize without scale'),
    'a huge scale': (lambda: model_of(prepare=[SCALE]), '30000×30000 are more than 67108864 pixels'),
    'a huge divisor': (lambda: model_of(prepare=[dict(type='ResizeToMultiple', size_divisor=30000)]), '30000'),
    'a thousand transforms': (lambda: model_of(prepare=[SCALE | dict(scale=(64, 64))] * 1000), '1000 resize'),
    'a huge size': (lambda: model_of(size=(2**20, 2**20)), '1048576×1048576 are more than'),
    'a threshold that is none': (lambda: with_metadata('threshold', 'NaN'), 'threshold nan'),
    'a batch of none': (lambda: model_of(n=0), 'its graph is not what'),
    'another rank': (
        lambda: model_of(steps=[node('Unsqueeze', 'y', 'axes')], tensors=[tensor('axes', [0])], out='z', dims=5),
        'its graph is not what',
    ),
    'another dtype': (
        lambda: model_of(steps=[node('Cast', 'y', to=TensorProto.DOUBLE)], out='z', kind=TensorProto.DOUBLE),
        'its graph is not what',
    ),
    'more channels than it says': (
        lambda: dynamic(steps=[node('Concat', 'y', 'y', axis=1)], out='z'),
        'its metadata say',
    ),
    'another size than it says': (
        lambda: dynamic(steps=[node('Slice', 'y', 'one', 'far', 'axes')], out='z',
                        tensors=[tensor('one', [1]), tensor('far', [50]), tensor('axes', [2])]),
        'returns values of shape (1, 2, 49, 64), not (1, 2, 64, 64) as its metadata say',
    ),
    'labels out of range': (
        lambda: model_of(True, steps=[node('Add', 'labels', 'more')], tensors=[tensor('more', 100)], out='z'),
        'returns labels from 100 to 101, but has 2 classes',
    ),
    'negative labels': (
        lambda: model_of(True, steps=[node('Sub', 'labels', 'more')], tensors=[tensor('more', 1)], out='z'),
        'returns labels from -1 to 0, but has 2 classes',
    ),
    'logits that are infinite or NaN': (lambda: model_of(**NOT_A_NUMBER), 'logits that are not finite numbers'),
    'logits that overflow': (
        lambda: model_of(**NOT_A_NUMBER, precision='fp16'),
        'not finite numbers: export it again with --precision fp32',
    ),
    'an endless loop': (endless_loop, "operator 'Loop'"),
    'random numbers': (lambda: model_of(steps=[node('RandomNormalLike', 'y')], out='z'), "operator 'RandomNormalLike'"),
    'a domain of its own': (
        lambda: model_of(steps=[node('Gelu', 'y', domain='com.microsoft')], out='z'),
        "operator 'com.microsoft.Gelu'",
    ),
    'a graph in an attribute': (graph_in_an_attribute, 'graphs inside of the graph'),
    'a function': (function_of_its_own, 'it holds functions'),
    'sparse weights': (sparse_weights, 'sparse tensors'),
    'many nodes': (many_nodes, '70003 nodes'),
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_file_ends_in_one_line(name, tool_here, tmp_path):
    make, message = HOSTILE[name]
    path = written(make(), tmp_path / 'hostile.onnx')
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    start = time.monotonic()
    process = tool_here('predict', path, 'a.png', '--out', 'out')
    assert_user_error(process, 'hostile.onnx', message, 'export it again')
    assert len(process.stderr.strip().splitlines()[-1]) < 600 and time.monotonic() - start < 10
    assert not list(tmp_path.glob('out/*'))


@pytest.mark.parametrize('labels', [False, True], ids=['logits', 'labels'])
@pytest.mark.parametrize('make', [model_of, dynamic])
def test_a_file_that_is_in_order(make, labels, tmp_path):
    """What the others are made from."""
    result = Segmentor(written(make(labels=labels), tmp_path / 'x.onnx'))(PIXELS)
    assert set(np.unique(result.labels)) == {0, 1}


def test_copies_predict_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segmentor = Segmentor(written(model_of(), Path('x.onnx')))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    for other in (pickle.loads(pickle.dumps(segmentor)), copy.deepcopy(segmentor)):
        assert np.array_equal(other(PIXELS).labels, segmentor(PIXELS).labels)
        assert other.classes == segmentor.classes


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.onnx')
    (tmp_path / 'zero.onnx').symlink_to('/dev/zero')
    (tmp_path / 'folder.onnx').mkdir()
    with (tmp_path / 'large.onnx').open('wb') as file:
        file.truncate(2**40)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f'{path.name} is no file of tools/export.py'):
            Segmentor(path)


LIMITED = """
import os, resource, sys
import numpy as np
page = os.sysconf('SC_PAGE_SIZE')
sysconf = os.sysconf
os.sysconf = lambda name: 2**30 // page if name == 'SC_PHYS_PAGES' else sysconf(name)
from mmseg_inceptionnext import Segmentor, UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        Segmentor(path)(np.zeros((64, 64, 3), np.uint8))
    except UserError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10)
"""


def test_a_small_graph_cannot_take_all_memory(tmp_path):
    """On a machine of 1 GiB, as it is told; each of the graphs asks for 1.5 GiB."""
    large = [tensor('size', [384, 1024, 1024]), tensor('one', np.float32([1]))]
    summed = [node('ReduceSum', 'large', out='sum', keepdims=0), node('Add', 'y', 'sum')]
    graphs = dict(
        constant=[node('Expand', 'one', 'size', out='large'), *summed],  # known before the first image
        run=[
            node('ReduceMax', 'y', out='max', keepdims=0),
            node('Expand', 'max', 'size', out='large'),
            *summed,
        ],
    )
    paths = [
        written(model_of(steps=steps, tensors=large, out='z'), tmp_path / f'{name}.onnx')
        for name, steps in graphs.items()
    ]
    process = subprocess.run([sys.executable, '-c', LIMITED, *paths], cwd=ROOT, capture_output=True, text=True)
    *errors, megabytes = process.stdout.splitlines()
    assert process.returncode == 0 and len(errors) == 2, process.stderr[-2000:]
    for path, error in zip(paths, errors, strict=True):
        assert error.startswith(f'{path} needs more memory for 64×64 pixels than there is')
    assert int(megabytes) < 800


def test_a_signal_ends_a_long_run(tmp_path):
    """Of 2000 convolutions, a minute; ONNX Runtime stops after the one that runs."""
    names = ['y', *(f'y{i}' for i in range(1999)), 'z']
    steps = [node('Conv', a, 'kernel', out=b, pads=[3] * 4) for a, b in zip(names, names[1:], strict=False)]
    kernel = tensor('kernel', np.full((2, 2, 7, 7), 1e-3, np.float32))
    size = (1024, 1024)
    segmentor = Segmentor(written(model_of(steps=steps, tensors=[kernel], out='z', size=size), tmp_path / 'x.onnx'))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs beside it
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            segmentor(np.zeros((*size, 3), np.uint8))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30


def test_nothing_is_reported_to_the_makers_of_onnx_runtime(tmp_path):
    """It would leave the id of the device and a store of events in the user's cache, and connect to its server."""
    path = written(model_of(), tmp_path / 'x.onnx')
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    home = tmp_path / 'home'
    home.mkdir()
    # What turns it off as well, or puts its files elsewhere.
    off = (
        'ORT_DISABLE_TELEMETRY', 'ORT_RUNNING_UNIT_TESTS', 'XDG_CACHE_HOME',
        'CI', 'GITHUB_ACTIONS', 'GITLAB_CI', 'JENKINS_URL', 'TF_BUILD', 'TRAVIS',
    )  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in off}
    command = [sys.executable, ROOT / 'tools' / 'predict.py', path, tmp_path / 'a.png', '--out', tmp_path / 'out']
    subprocess.run(command, env=environment | dict(HOME=str(home)), check=True, capture_output=True)
    assert [str(p.relative_to(home)) for p in home.rglob('*') if p.is_file() and 'matplotlib' not in p.parts] == []
