"""Files for other runtimes compute what mmseg computes, or are not written; Segmentor and predict.py run them."""

import ast
import json
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from PIL import Image
from support import (
    ROOT,
    TINY_CONFIG,
    TINY_UPERNET,
    assert_user_error,
    needs_onnx_exporter,
    save_segmentor,
    segmentor_with_statistics,
)

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.config import find_config
from mmseg_inceptionnext.export.export import export, mmseg_logits
from mmseg_inceptionnext.inference import onnx_model
from mmseg_inceptionnext.inference.onnx_model import OnnxModel, resize_transforms
from mmseg_inceptionnext.inference.segmentor import load_trained
from mmseg_inceptionnext.inference.temperature import write_temperature

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

TINY = {'fpn': TINY_CONFIG, 'upernet': TINY_UPERNET}
META = {key: ADE20KDataset.METAINFO[key] for key in ('classes', 'palette')} | dict(reduce_zero_label=True)


def checkpoint_of(path, folder):
    """Random, with logits far apart."""
    init_default_scope('mmseg')
    model = segmentor_with_statistics(path)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=META)), folder / 'model.pth')
    return folder / 'model.pth'


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    return {name: checkpoint_of(path, tmp_path_factory.mktemp(name)) for name, path in TINY.items()}


@pytest.fixture(scope='module', params=TINY)
def dynamic(request, checkpoints, tmp_path_factory):
    """Config, checkpoint, and a file of logits whose sizes are open."""
    config, checkpoint = TINY[request.param], checkpoints[request.param]
    out = tmp_path_factory.mktemp('dynamic') / 'model.onnx'
    verified = export(config, checkpoint, out, shape=(64, 96), dynamic=True, verify=3)
    assert verified.images == 6 and verified.error < 1e-5 and verified.differing < 1e-3
    return config, checkpoint, out


@pytest.fixture(scope='module')
def fixed(checkpoints, tmp_path_factory):
    """A file of labels for 96×96 float values, which the test pipeline makes of all square images."""
    folder = tmp_path_factory.mktemp('fixed')
    cfg = Config.fromfile(TINY_UPERNET)
    cfg.test_dataloader.dataset.pipeline[1].scale = (384, 96)
    cfg.dump(folder / 'config.py')
    export(folder / 'config.py', checkpoints['upernet'], folder / 'labels.onnx', (50, 50), labels=True,
           dtype='float32', verify=1)  # fmt: skip
    return folder / 'labels.onnx'


@pytest.fixture(scope='module')
def paths(mini_root):
    return sorted((mini_root / 'images' / 'validation').iterdir())


def expected_logits(config, checkpoint, images: np.ndarray) -> torch.Tensor:
    _, model, _ = load_trained(config, checkpoint)
    return mmseg_logits(model, images)


@needs_onnx_exporter
@pytest.mark.parametrize('shape', [(1, 32, 32), (1, 64, 96), (2, 33, 47), (3, 70, 107), (1, 224, 160)], ids=str)
def test_a_dynamic_file_alone_takes_any_size(dynamic, shape):
    """As its users run it, without this package."""
    config, checkpoint, out = dynamic
    images = np.random.default_rng(0).integers(256, size=(shape[0], 3, *shape[1:]), dtype=np.uint8)
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {'image': images})
    expected = expected_logits(config, checkpoint, images).numpy()
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.mean(logits.argmax(1) != expected.argmax(1)) < 1e-3


@needs_onnx_exporter
def test_the_example_of_the_documentation(dynamic, paths, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'deploy.md').read_text(), re.DOTALL)
    (tmp_path / 'model.onnx').symlink_to(dynamic[2])
    Image.open(paths[0]).save(tmp_path / 'street.jpg')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert ast.literal_eval(capsys.readouterr().out) <= set(OnnxModel(dynamic[2]).contract.classes.names)


@needs_onnx_exporter
def test_the_file_says_what_it_expects_and_returns(dynamic, fixed):
    model = onnx.load(dynamic[2])
    onnx.checker.check_model(model, full_check=True)
    (image,), (logits,) = model.graph.input, model.graph.output
    sizes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in (image, logits)]
    assert (image.name, logits.name) == ('image', 'logits')
    assert sizes == [['batch', 3, 'height', 'width'], ['batch', 150, 'height', 'width']]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata['classes'])[0] == 'wall' and json.loads(metadata['palette'])[0] == [120, 120, 120]
    assert json.loads(metadata['input']) == dict(
        layout='NCHW', channels='RGB', range=[0, 255], dtype='uint8', height=None, width=None
    )
    assert set(json.loads(metadata['versions'])) == {'mmseg_inceptionnext', 'torch', 'mmseg', 'onnx'}
    assert str(ROOT).encode() not in dynamic[2].read_bytes()  # nothing of the machine that exported it

    contract = OnnxModel(fixed).contract
    assert (contract.labels, contract.dtype, contract.shape, contract.precision) == (True, 'float32', (96, 96), 'fp32')
    assert contract.prepare == (dict(type='Resize', scale=(384, 96), keep_ratio=True),) and not contract.align_corners
    assert contract.classes.names[:2] == ('wall', 'building') and contract.classes.reduce_zero_label


@needs_onnx_exporter
def test_segmentor_predicts_alike(dynamic, paths):
    config, checkpoint, out = dynamic
    plain, ours = Segmentor(config, checkpoint, device='cpu', precision='fp32'), Segmentor(out)
    assert ours.classes == plain.classes
    pixels = np.random.default_rng(0).integers(256, size=(60, 101, 3), dtype=np.uint8)
    sources = [*paths, pixels]
    for expected, result in zip(plain(sources), ours(sources, batch_size=3), strict=True):
        assert result.labels.shape == expected.labels.shape and result.labels.dtype == np.int16
        assert np.mean(result.labels != expected.labels) < 1e-3


@needs_onnx_exporter
def test_labels_of_a_fixed_size(fixed, checkpoints, paths):
    images = np.random.default_rng(1).integers(256, size=(2, 3, 96, 96), dtype=np.uint8)
    labels = OnnxModel(fixed).run(images)
    assert labels.shape == (2, 96, 96) and labels.dtype == np.uint8
    expected = expected_logits(TINY_UPERNET, checkpoints['upernet'], images).argmax(1).numpy()
    assert np.mean(labels != expected) < 1e-3
    with pytest.raises(UserError, match='takes images of 96×96, not of 192×96: export it with dynamic=True'):
        Segmentor(fixed)(np.zeros((50, 100, 3), np.uint8))


@needs_onnx_exporter
def test_predict_with_a_file_of_labels(checkpoints, paths, tool_here, tmp_path):
    command = (
        TINY_CONFIG,
        checkpoints['fpn'],
        '--out',
        'm/labels.onnx',
        '--shape',
        160,
        160,
        '--labels',
        '--verify',
        1,
    )
    process = tool_here('export', *command, '--images', *paths)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stderr == '' and process.stdout.startswith('m/labels.onnx: ') and 'On 3 images' in process.stdout
    process = tool_here('predict', 'm/labels.onnx', *paths, '--out', 'out', '--labels')
    assert process.returncode == 0, process.stderr[-3000:]
    segmentor = Segmentor(TINY_CONFIG, checkpoints['fpn'], device='cpu', precision='fp32')
    for path in paths:
        written = np.asarray(Image.open(tmp_path / 'out' / 'labels' / f'{path.stem}.png'))
        expected = np.asarray(segmentor(path).label_image())
        assert written.shape == expected.shape
        # The network saw 160×160 pixels of 96×96: labels are left out where logits would be interpolated.
        assert np.mean(written != expected) < 0.2


@needs_onnx_exporter
def test_a_file_takes_the_size_that_the_test_pipeline_makes(checkpoints, tool_here, tmp_path):
    """Of images that no stride divides, with a Resize and a ResizeToMultiple; and says so."""
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(TINY_CONFIG)!r}\ntest_dataloader = dict(dataset=dict(pipeline=['
        "dict(type='LoadImageFromFile'), dict(type='Resize', scale=(200, 90), keep_ratio=True), "
        "dict(type='ResizeToMultiple', size_divisor=32), dict(type='PackSegInputs')]))\n"
    )
    process = tool_here('export', config, checkpoints['fpn'], '--out', 'm.onnx', '--shape', 90, 120, '--verify', 1)
    assert process.returncode == 0 and 'resizes images of 120×90 to 128×96: that is the size' in process.stdout
    image = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    plain = Segmentor(config, checkpoints['fpn'], device='cpu', precision='fp32')(image)
    assert np.mean(Segmentor(tmp_path / 'm.onnx')(image).labels != plain.labels) < 1e-3


def test_a_program_of_torch_export(checkpoints, tmp_path):
    out = tmp_path / 'model.pt2'
    verified = export(TINY_CONFIG, checkpoints['fpn'], out, (64, 96), dynamic=True, dtype='float32', verify=2)
    assert verified.error < 1e-5
    metadata = {'metadata.json': ''}
    module = torch.export.load(out, extra_files=metadata).module()
    images = np.random.default_rng(0).integers(256, size=(1, 3, 71, 131), dtype=np.uint8)
    expected = expected_logits(TINY_CONFIG, checkpoints['fpn'], images)
    torch.testing.assert_close(module(torch.from_numpy(images).float()), expected, rtol=1e-4, atol=1e-4)
    assert json.loads(json.loads(metadata['metadata.json'])['classes'])[0] == 'wall'
    with zipfile.ZipFile(out) as archive:
        assert {name.split('/')[0] for name in archive.namelist()} == {'archive'}
    assert list(tmp_path.iterdir()) == [out]


@needs_onnx_exporter
def test_half_precision(checkpoints, tmp_path):
    out = tmp_path / 'half.onnx'
    verified = export(TINY_CONFIG, checkpoints['fpn'], out, (64, 64), precision='fp16', verify=1)
    assert 0 < verified.error < 5e-3
    kinds = {tensor.data_type for tensor in onnx.load(out).graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}


@needs_onnx_exporter
def test_a_file_that_deviates_is_not_kept(checkpoints, tmp_path, monkeypatch):
    outputs = OnnxModel.outputs
    monkeypatch.setattr(
        OnnxModel, 'outputs', lambda self, images: [x * np.float32(1.001) for x in outputs(self, images)]
    )
    out = tmp_path / 'model.onnx'
    out.write_text('what was there')
    with pytest.raises(UserError, match='deviates by 1.0e-03 of the largest logit, more than 1e-04'):
        export(TINY_CONFIG, checkpoints['fpn'], out, (64, 64), verify=1)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx'] and out.read_text() == 'what was there'


@needs_onnx_exporter
@pytest.mark.parametrize('labels', [False, True])
def test_a_file_of_nan_is_not_kept(checkpoints, tmp_path, monkeypatch, labels):
    """NaN is greater than nothing, so that no largest deviation shows it."""
    content = torch.load(checkpoints['fpn'], weights_only=False)
    content['state_dict']['decode_head.conv_seg.bias'][0] = float('nan')
    torch.save(content, tmp_path / 'nan.pth')
    out = tmp_path / 'model.onnx'
    with pytest.raises(UserError, match='the segmentor returns logits that are not finite numbers'):
        export(TINY_CONFIG, tmp_path / 'nan.pth', out, (64, 64), labels=labels, verify=1)
    if not labels:
        outputs = OnnxModel.outputs
        monkeypatch.setattr(OnnxModel, 'outputs', lambda self, images: [x * np.nan for x in outputs(self, images)])
        with pytest.raises(UserError, match='the exported segmentor returns numbers that are not finite'):
            export(TINY_CONFIG, checkpoints['fpn'], out, (64, 64), verify=1)
    assert not out.exists()


@needs_onnx_exporter
def test_an_operator_that_is_not_run_from_a_file_is_not_written(checkpoints, tmp_path, monkeypatch):
    """What is written can be opened: the same operators are allowed."""
    allowed = onnx_model._OPERATORS.replace('Resize', '')
    monkeypatch.setattr(onnx_model, '_OPERATORS', allowed)
    with pytest.raises(UserError, match='needs the ONNX operator Resize, which is not run from a file: write a .pt2'):
        export(TINY_CONFIG, checkpoints['fpn'], tmp_path / 'model.onnx', (64, 64), verify=1)
    assert not list(tmp_path.iterdir())


def test_a_torch_that_cannot_write_it(checkpoints, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError('as of torch 2.6, a page long')

    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(UserError, match=f'torch {re.escape(torch.__version__)} cannot write .* or write a .pt2'):
        export(TINY_CONFIG, checkpoints['fpn'], tmp_path / 'model.onnx', (64, 64), verify=1)
    assert not list(tmp_path.iterdir())


def changed(source, out, change):
    model = onnx.load(source)
    change(model)
    out.write_bytes(model.SerializeToString())
    return out


def refer_to_another_file(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField('raw_data')
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key='location', value='../../../etc/passwd')


@needs_onnx_exporter
def test_foreign_and_damaged_files(fixed, tmp_path):
    out = tmp_path / 'x.onnx'
    with pytest.raises(UserError, match='x.onnx cannot be read: No such file'):
        Segmentor(out)
    for content in (b'', b'GIF89a', fixed.read_bytes()[:2000]):
        out.write_bytes(content)
        with pytest.raises(
            UserError, match='x.onnx (is truncated, damaged or no ONNX|was not exported by tools/export)'
        ):
            Segmentor(out)
    with pytest.raises(UserError, match='was not exported by tools/export.py'):
        Segmentor(changed(fixed, out, lambda model: model.ClearField('metadata_props')))
    with pytest.raises(UserError, match='its metadata are damaged'):
        Segmentor(changed(fixed, out, lambda model: setattr(model.metadata_props[1], 'value', '{')))
    other = json.dumps([dict(type='LoadImageFromFile', backend_args=dict(backend='http'))])
    at = [entry.key for entry in onnx.load(fixed).metadata_props].index('prepare')
    with pytest.raises(UserError, match='damaged .ValueError: LoadImageFromFile'):
        Segmentor(changed(fixed, out, lambda model: setattr(model.metadata_props[at], 'value', other)))
    with pytest.raises(UserError, match='its weights are in other files'):
        Segmentor(changed(fixed, out, refer_to_another_file))
    with pytest.raises(UserError, match='cannot be run by ONNX Runtime: .*: export it again'):
        Segmentor(changed(fixed, out, lambda model: setattr(model.graph.node[0], 'op_type', 'Einsum')))
    with pytest.raises(UserError, match='its graph is not what its metadata say'):
        Segmentor(changed(fixed, out, lambda model: model.graph.output.append(model.graph.output[0])))


@needs_onnx_exporter
def test_mistakes(checkpoints, fixed, tool_here, tmp_path, monkeypatch):
    command = ('export', TINY_CONFIG, checkpoints['fpn'])
    assert_user_error(tool_here(*command, '--out', 'x.pb'), 'x.pb: the file name must end', 'in .onnx or .pt2')
    assert_user_error(tool_here(*command, '--out', 'x.onnx', '--shape', 64, 31), '--shape 64 31: no side')
    large = tool_here(*command, '--out', 'x.onnx', '--shape', 8192, 8193)
    assert_user_error(large, '--shape 8192 8193: these are more than 67108864 pixels')
    nothing = tool_here(*command, '--out', 'x.onnx', '--verify', 0)
    assert_user_error(nothing, 'no image to compare on: pass --verify 1 or more')
    assert_user_error(tool_here(*command, '--out', 'x.onnx', '--verify', 'x'), 'not a whole number')
    assert_user_error(tool_here(*command, '--out', 'x.onnx', '--labels', '--logits'), 'not allowed with')
    assert_user_error(tool_here(*command, '--out', 'x.onnx', '--images', 'no.jpg'), 'no.jpg: no such file')
    assert_user_error(tool_here('predict', fixed, '--out', 'x'), 'checkpoint')
    assert_user_error(tool_here('predict', TINY_CONFIG, checkpoints['fpn'], '--out', 'x'), 'required: input')
    with pytest.raises(UserError, match='a config needs checkpoint=FILE'):
        Segmentor(TINY_CONFIG)
    with pytest.raises(UserError, match='cannot be exported .RandomFlip with prob'):
        resize_transforms(Config(dict(p=[dict(type='Load'), dict(type='RandomFlip', prob=0.5)])).p)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    for arguments in ((*command, '--out', 'x.onnx'), ('predict', fixed, 'a.jpg', '--out', 'x')):
        assert_user_error(tool_here(*arguments), 'need onnxruntime: pip install mmseg-inceptionnext[onnx]')
    assert not list(tmp_path.glob('x.*'))


@pytest.mark.slow
@needs_onnx_exporter
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
@pytest.mark.parametrize('arch', 'atsb')
@pytest.mark.parametrize('family', ['upernet', 'fpn'])
def test_every_recipe(family, arch, dynamic, tmp_path):
    path = find_config(f'{family}/inceptionnext_{arch}')
    shape = (64, 96) if dynamic else (512, 512)
    verified = export(path, checkpoint_of(path, tmp_path), tmp_path / 'm.onnx', shape, dynamic=dynamic, verify=2)
    assert verified.error < 1e-4


@pytest.mark.slow
@needs_onnx_exporter
@pytest.mark.parametrize(
    'name', ['fpn/resnet_50', 'fpn/resnext_101_32x4d', 'fpn/pvt_s', 'fpn/poolformer_s24', 'upernet/convnext_t',
             'upernet/swin_t'],
)  # fmt: skip
def test_every_baseline(name, tmp_path):
    """Their operators are run from a file, too."""
    path = find_config(f'baselines/{name}')
    verified = export(path, checkpoint_of(path, tmp_path), tmp_path / 'm.onnx', (64, 96), verify=1)
    assert verified.error < 1e-4


@needs_onnx_exporter
@pytest.mark.parametrize(
    'runtime', ['onnxruntime', *(pytest.param(each, marks=pytest.mark.slow) for each in ('openvino', None))]
)
def test_the_confidence_is_a_second_output(tmp_path, runtime):
    """Of one class against the others, with the temperature beside the checkpoint, in both forms of the up-sampling."""
    files = save_segmentor(tmp_path, classes=5)
    write_temperature(files[1], dict(temperature=1.7))
    pixels = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    expected = Segmentor(*files, device='cpu', precision='fp32')(pixels)
    for labels, dynamic in ((True, False), (False, False), (True, True)):
        out = tmp_path / ('a.onnx' if runtime else 'a.pt2')
        verified = export(*files, out, (64, 96), dynamic, labels, verify=1, runtime=runtime, confidence=True)
        assert verified.confidence_error < 1e-5
        if runtime is None:
            found = torch.export.load(out).module()(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))
            np.testing.assert_allclose(found[1][0], expected.confidence, atol=1e-5)
            continue
        assert [output.name for output in onnx.load(out).graph.output] == [
            'labels' if labels else 'logits',
            'confidence',
        ]
        segmentor = Segmentor(out)
        assert segmentor.temperature == 1.7
        np.testing.assert_allclose(segmentor(pixels).confidence, expected.confidence, atol=1e-5)
        assert np.mean(segmentor(pixels).labels == expected.labels) > 0.999
    if runtime == 'onnxruntime':
        larger = segmentor(pixels[:, :, ::-1].repeat(2, 0).repeat(2, 1))
        assert larger.confidence.shape == (128, 192)
        with pytest.raises(UserError, match='returns labels without logits: export it with confidence=True'):
            larger.top(2)


def test_mistakes_of_confidence(tmp_path, tool_here):
    files = save_segmentor(tmp_path)
    command = ('export', *files, '--out', 'a.onnx', '--confidence')
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    Image.new('RGB', (64, 64)).save(tmp_path / 'b.png')
    process = tool_here(*command, '--precision', 'int8', '--calibrate', '.')
    assert_user_error(process, '--confidence and --precision int8 exclude each other')
    assert_user_error(tool_here(*command, '--for', 'deepness'), 'drop the other options')
    write_temperature(files[1], dict(temperature=2))
    save_segmentor(tmp_path, seed=1)
    assert_user_error(tool_here(*command), 'was fitted for another checkpoint')
    assert not (tmp_path / 'a.onnx').exists()
