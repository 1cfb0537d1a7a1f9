"""Checkpoints of strangers: nothing in them runs, nothing large is allocated, one line says what is wrong."""

import builtins
import json
import os
import pickle
import re
import struct
import time
import warnings
import zipfile
from collections import Counter
from copy import deepcopy
from pathlib import Path

import mmengine
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer
from mmseg.registry import MODELS
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import InceptionNeXt, Segmentor, UserError, trusting_checkpoints
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.resume import find_resume_point
from mmseg_inceptionnext.training.train import train

MOST_MEMORY, MOST_SECONDS = 2 * 2**30, 30


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def repacked(path: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a checkpoint's archive anew, with right checksums; ``change`` gets the name and content of each entry."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def with_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    torch.save({}, path)
    repacked(path, lambda name, old: content if name.endswith('data.pkl') else old, compression)


def with_header(path: Path, header: bytes, data: bytes = b'', length: int | None = None) -> None:
    path.write_bytes(struct.pack('<Q', len(header) if length is None else length) + header + data)


def executes(marker: Path) -> str:
    return f'open({str(marker)!r}, "w")'


def hostile(name: str, folder: Path, good: Path, marker: Path) -> Path:
    """A file that means harm, or is broken."""
    path = folder / f'{name}.{"safetensors" if name.startswith("safetensors") else "pth"}'
    weights = {'state_dict': {'backbone.stem.0.weight': torch.zeros(1)}}
    if name == 'os_system':
        torch.save(Call(os.system, f'touch {marker}'), path)
    elif name == 'eval':
        torch.save(Call(builtins.eval, executes(marker)), path)
    elif name == 'nested_in_state_dict':
        content = torch.load(good, weights_only=False)
        content['state_dict']['backbone.stem.0.bias'] = Call(builtins.exec, executes(marker))
        torch.save(content, path)
    elif name == 'in_the_optimizer':
        content = torch.load(good, weights_only=False)
        content['optimizer']['state'][0] = Call(builtins.eval, executes(marker))
        torch.save(content, path)
    elif name == 'legacy_format':
        torch.save(Call(builtins.eval, executes(marker)), path, _use_new_zipfile_serialization=False)
    elif name == 'bare_pickle':
        path.write_bytes(pickle.dumps(Call(builtins.eval, executes(marker)), protocol=2))
    elif name == 'protocol_4':
        with_pickle(path, pickle.dumps(Call(builtins.eval, executes(marker)), protocol=4))
    elif name == 'import_by_numpy':
        with_pickle(path, b'\x80\x02cnumpy\nload\n(X\x01\x00\x00\x00xtR.')
    elif name == 'bytearray':
        with_pickle(path, pickle.dumps({'a': Call(bytearray, 16 * 2**30)}, protocol=2))
    elif name == 'legacy_bytearray':
        torch.save({'a': Call(bytearray, 16 * 2**30)}, path, _use_new_zipfile_serialization=False)
    elif name == 'zip_bomb':
        with_pickle(path, b'\0' * 2**28, zipfile.ZIP_DEFLATED)
    elif name == 'zip_that_overlaps':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', b'\0' * 2**20)
            archive.filelist *= 3000
    elif name == 'truncated':
        path.write_bytes(good.read_bytes()[:-5000])
    elif name == 'flipped_bit':
        content = bytearray(good.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif name == 'wrong_magic':
        path.write_bytes(b'\x89PNG' + good.read_bytes()[4:])
    elif name == 'web_page':
        path.write_text('<!DOCTYPE html><html>404: not found</html>')
    elif name == 'empty':
        path.write_bytes(b'')
    elif name == 'huge_tensor':
        torch.save({'a': torch.zeros(3, dtype=torch.uint8)}, path)
        repacked(path, lambda entry, old: old.replace(b'K\x03tq', b'J\xff\xff\xff\x7ftq') if 'pkl' in entry else old)
    elif name == 'huge_view':
        torch.save({'stem.0.weight': torch.zeros(1).expand(40, 3, 10**6, 10**6)}, path)
    elif name == 'legacy_huge_tensor':
        torch.save({'a': torch.zeros(3, dtype=torch.uint8)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b'K\x03', b'J\xff\xff\xff\x7f'))
    elif name == 'raw_pointers':  # an array of objects whose addresses are in the file, then copied
        text = b'X\x10\0\0\0' + b'A' * 16
        pointers = b'cnumpy\nndarray\n(K\x02\x85X\x01\0\0\0Oc_codecs\nencode\n' + text + b'X\x06\0\0\0latin1\x86RtR'
        with_pickle(path, b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n(' + pointers * 2 + b'tR.')
    elif name == 'slow_hash':  # a key of 2**60 parts
        with_pickle(path, b'\x80\x02}' + b')' + b'q\0h\0\x86' * 60 + b'Ns.')
    elif name == 'colliding_keys':
        keys = b''.join(b'\x8a\x0a' + (i * (2**61 - 1)).to_bytes(10, 'little') + b'N' for i in range(1, 10**5))
        with_pickle(path, b'\x80\x02}(' + keys + b'u.')
    elif name == 'copies_of_copies':
        encode = b'c_codecs\nencode\nq\1X\x40\0\0\0' + b'A' * 64
        with_pickle(
            path,
            b'\x80\x02' + encode + b'X\x06\0\0\0latin1\x86Rq\0' + b'h\1h\0X\3\0\0\0hex\x86Rq\0' * 25 + b'.',
        )
    elif name == 'view_that_is_copied':
        view = Call(
            torch._utils._rebuild_device_tensor_from_cpu_tensor,
            torch.zeros(1).expand(2**30),
            torch.float64,
            'cpu',
            False,
        )
        torch.save({'a': view}, path)
    elif name == 'two_directories':  # Python's reader of archives finds another than torch's
        torch.save({'a': torch.zeros(3)}, path)
        content = path.read_bytes()
        end = content[-98:]
        path.write_bytes(content + end[:56] + end[56:64] + struct.pack('<Q', len(content) - 98) + end[72:])
    elif name == 'other_kinds':
        torch.save({'state_dict': {'a': torch.zeros(3, device='meta'), 'b': torch.eye(3).to_sparse()}}, path)
    elif name == 'torch_script':
        with warnings.catch_warnings():  # one day it will be gone
            warnings.simplefilter('ignore')
            torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    elif name == 'deep_nesting':
        with_pickle(path, b'\x80\x02' + b']' * 10**6 + b'a' * (10**6 - 1) + b'.')
    elif name == 'no_tensors':
        torch.save({'state_dict': {str(i): i for i in range(10)}}, path)
    elif name == 'strange_keys':
        torch.save({1: weights, None: [], 'state_dict': {2: 3}, 'meta': 'meta'}, path)
    elif name == 'safetensors_length':
        with_header(path, b'{}', length=2**60)
    elif name == 'safetensors_json':
        with_header(path, b'{"a": [[[[' * 1000)
    elif name == 'safetensors_overlap':
        tensor = dict(dtype='F32', shape=[2])
        tensors = {name: tensor | {'data_offsets': [start, start + 8]} for name, start in (('a', 0), ('b', 4))}
        with_header(path, json.dumps(tensors).encode(), b'\0' * 12)
    elif name == 'safetensors_beyond':
        tensors = {'a': dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42])}
        with_header(path, json.dumps(tensors).encode(), b'\0' * 16)
    elif name == 'safetensors_not_one':
        path.write_bytes(good.read_bytes())
    return path


NAMES = [
    'os_system', 'eval', 'nested_in_state_dict', 'in_the_optimizer', 'legacy_format', 'bare_pickle', 'protocol_4',
    'import_by_numpy', 'bytearray', 'legacy_bytearray', 'zip_bomb', 'zip_that_overlaps', 'truncated', 'flipped_bit',
    'wrong_magic', 'web_page', 'empty', 'huge_tensor', 'huge_view', 'legacy_huge_tensor', 'deep_nesting',
    'no_tensors', 'strange_keys', 'raw_pointers', 'slow_hash', 'colliding_keys', 'copies_of_copies',
    'view_that_is_copied', 'two_directories', 'other_kinds', 'torch_script', 'safetensors_length',
    'safetensors_json', 'safetensors_overlap', 'safetensors_beyond', 'safetensors_not_one',
]  # fmt: skip

CODE = ['os_system', 'eval', 'nested_in_state_dict', 'in_the_optimizer', 'legacy_format', 'bare_pickle', 'protocol_4']


@pytest.fixture(scope='module')
def files(tmp_path_factory, trained) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('hostile')
    return {name: hostile(name, folder, trained, folder / 'executed') for name in NAMES}


@pytest.fixture
def entries(tool_here, mini_root, tmp_path):
    """The ways into the project, by name; each takes a file and returns the line that it was answered with."""
    data = ('--data-root', mini_root, '--work-dir', tmp_path / 'w')
    options = ('--cfg-options', 'auto_scale_lr.base_batch_size=2')  # nothing to warn of
    image = next((mini_root / 'images' / 'validation').iterdir())

    def of_tool(name: str, *arguments) -> str:
        process = tool_here(name, *arguments)
        assert_user_error(process)
        return process.stderr.strip().splitlines()[-1]

    def of_call(function, *arguments) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments)
        return str(caught.value)

    def pretrained(path: Path) -> None:
        init_cfg = dict(type='Pretrained', checkpoint=str(path))
        InceptionNeXt('atto', norm_cfg=dict(type='BN'), in_channels=4, init_cfg=init_cfg).init_weights()

    return {
        'train --weights': lambda path: of_tool('train', TINY_CONFIG, *data, '--weights', path, *options),
        'train --resume': lambda path: of_tool('train', TINY_CONFIG, *data, '--resume', path, *options),
        'train load_from': lambda path: of_tool('train', TINY_CONFIG, *data, *options, f'load_from={path}'),
        'test': lambda path: of_tool('test', TINY_CONFIG, path, *data),
        'predict': lambda path: of_tool('predict', TINY_CONFIG, path, image, '--out', tmp_path / 'out'),
        'export': lambda path: of_tool('export', TINY_CONFIG, path, '--out', tmp_path / 'out.onnx'),
        'Segmentor': lambda path: of_call(Segmentor, TINY_CONFIG, path),
        'backbone': lambda path: of_call(pretrained, path),
    }


def peak_memory(reset: bool = False) -> int:
    """Of this process, in bytes, since the last reset."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


ENTRIES = ['train --weights', 'train --resume', 'train load_from', 'test', 'predict', 'export', 'Segmentor', 'backbone']


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('names', [NAMES[::9], pytest.param(NAMES, marks=pytest.mark.slow)], ids=['some', 'all'])
def test_every_entry_refuses_every_file(files, entries, entry, names):
    """In one line that names the file; nothing runs, in bounds of time and memory."""
    seconds, memory = [], []
    for name in names:
        before, start = peak_memory(reset=True), time.monotonic()
        line = entries[entry](files[name])
        seconds.append(time.monotonic() - start)
        memory.append(peak_memory() - before)
        assert str(files[name]) in line and '\n' not in line, line
        assert not (files[name].parent / 'executed').exists()
    print(f'{entry}: {len(names)} files refused, {max(seconds):.1f} s and {max(memory) / 2**20:.0f} MiB at most')
    assert max(seconds) < MOST_SECONDS and max(memory) < MOST_MEMORY


def test_every_file_is_refused_or_read_as_what_it_is(files):
    for name in NAMES:
        before, start = peak_memory(reset=True), time.monotonic()
        if name in ('no_tensors', 'other_kinds', 'strange_keys'):  # and no harm
            read_checkpoint(files[name])
        else:
            with pytest.raises(UserError, match=re.escape(str(files[name]))):
                read_checkpoint(files[name])
        assert time.monotonic() - start < MOST_SECONDS
        assert peak_memory() - before < MOST_MEMORY


def test_a_page_that_was_downloaded_instead_is_recognised(files):
    with pytest.raises(UserError, match=r"not a checkpoint \(ValueError: it begins with b'<!DOCTYPE html>"):
        read_checkpoint(files['web_page'])


@pytest.mark.parametrize('name', CODE)
def test_mmengine_refuses_them_too(files, name):
    """It falls back to running them by itself: in its runner, its functions, and ``init_cfg`` of any model."""
    model = torch.nn.Linear(1, 1)
    backbone = MODELS.build(
        dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint=str(files[name])))
    )
    for load in (
        lambda: mmengine.runner.load_checkpoint(model, str(files[name])),
        lambda: mmengine.runner.CheckpointLoader.load_checkpoint(str(files[name])),
        backbone.init_weights,
    ):
        with pytest.raises(UserError, match='refused|damaged'):
            load()
    assert not (files[name].parent / 'executed').exists()


def test_other_places_that_mmengine_loads_from():
    for source in ('s3://bucket/w.pth', 'cluster:petrel://w.pth', 'pavi://w', 'torchvision://nonsense', 'mmcls://none'):
        with pytest.raises(UserError, match=re.escape(source)):
            mmengine.runner.CheckpointLoader.load_checkpoint(source)


@pytest.mark.parametrize('scheme', ['torchvision://resnet18', 'open-mmlab://resnet50_v1c', 'mmcls://vgg11'])
def test_names_of_model_zoos_are_downloaded_and_read_alike(monkeypatch, tmp_path, files, scheme):
    urls = []

    def download(url: str, path: str, **_) -> None:
        urls.append(url)
        Path(path).write_bytes(files['eval'].read_bytes())

    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    with pytest.raises(UserError, match='it wants to run'):
        mmengine.runner.CheckpointLoader.load_checkpoint(scheme)
    assert len(urls) == 1 and urls[0].startswith('https://')


def test_a_config_inside_a_checkpoint_is_not_executed(tiny_cfg, trained, tmp_path):
    """mmengine's Runner would read ``meta.config`` as a config, which is Python."""
    content = read_checkpoint(trained)
    content['meta']['config'] = executes(tmp_path / 'executed')
    torch.save(content, tmp_path / 'iter_3.pth')
    plain = deepcopy(tiny_cfg)
    assert train(tiny_cfg, TrainOptions(resume=str(tmp_path / 'iter_3.pth'))).iter == 6
    plain.update(
        resume=True, load_from=str(tmp_path / 'iter_3.pth'), runner_type='Runner', val_cfg=dict(type='ValLoop')
    )
    plain.model.data_preprocessor.size = None
    plain.default_hooks.checkpoint.type = 'CheckpointHook'
    Runner.from_cfg(plain).load_or_resume()
    assert not (tmp_path / 'executed').exists()


def test_configs_inside_a_checkpoint_reach_no_inferencer(trained, tmp_path):
    """mmengine's would read ``meta.cfg`` or the message hub's as a config, which is Python."""
    content = read_checkpoint(trained)
    code = executes(tmp_path / 'executed')
    content['meta']['cfg'] = content['message_hub']['runtime_info']['cfg'] = code
    torch.save(content, tmp_path / 'iter_3.pth')
    with pytest.raises(Exception, match='config|cfg'):
        MMSegInferencer(model=None, weights=str(tmp_path / 'iter_3.pth'))
    assert not (tmp_path / 'executed').exists()


def damaged_part(content: dict, where: str) -> None:
    if where == 'lr':
        content['optimizer']['param_groups'][0]['lr'] = 'abc'
    elif where == 'scheduler':
        content['param_schedulers'][0]['step'] = 5
    elif where == 'key':
        content['state_dict']['a\nerror: forged \x1b[31m'] = torch.zeros(1)
    elif where == 'scalar':
        content['state_dict']['decode_head.conv_seg.weight'] = torch.zeros(())
    elif where == 'optimizer':
        for group in content['optimizer']['param_groups']:
            del group['betas']


@pytest.mark.parametrize('where', ['lr', 'scheduler', 'key', 'scalar', 'optimizer'])
def test_odd_content_is_refused_in_one_line(trained, tool_here, mini_root, tmp_path, where):
    content = read_checkpoint(trained)
    damaged_part(content, where)
    torch.save(content, tmp_path / 'iter_3.pth')
    data = ('--data-root', mini_root, '--cfg-options', 'auto_scale_lr.base_batch_size=2')
    process = tool_here('train', TINY_CONFIG, '--resume', tmp_path / 'iter_3.pth', *data)
    assert_user_error(process, 'iter_3.pth')
    assert process.stderr.count('\n') == 1 and '\x1b' not in process.stderr


@pytest.mark.parametrize('name', ['~nobody-of-this-name/w.pth', 'x' * 300 + '.pth', 'a\nb.pth', '/dev/zero', '/tmp'])
def test_names_that_cannot_be_files(name):
    with pytest.raises(UserError, match='no checkpoint|is not a valid path|is a directory, a pipe or a device'):
        read_checkpoint(name)


def test_a_trusted_file_may_run(files, trained, tool_here, mini_root, tmp_path):
    marker = files['nested_in_state_dict'].parent / 'executed'
    with pytest.raises(UserError, match='it wants to run builtins.exec, .* pass trust_checkpoint=True'):
        read_checkpoint(files['nested_in_state_dict'])
    assert not marker.exists()
    with trusting_checkpoints():
        assert read_checkpoint(files['nested_in_state_dict'])['meta']['iter'] == 3
    assert marker.exists()
    marker.unlink()

    content = torch.load(trained, weights_only=False)
    content['meta']['note'] = Path('notes')  # harmless, and not allowed
    torch.save(content, tmp_path / 'mine.pth')
    arguments = ('test', TINY_CONFIG, tmp_path / 'mine.pth', '--data-root', mini_root)
    assert_user_error(tool_here(*arguments), 'mine.pth is refused: it wants to run pathlib.', '--trust-checkpoint')
    process = tool_here(*arguments, '--trust-checkpoint')
    assert process.returncode == 0 and 'mIoU' in process.stdout, process.stderr[-3000:]


def bases(good: Path, folder: Path) -> dict[str, Path]:
    """Small files to mutate, by kind."""
    content = read_checkpoint(good)
    weights = {key: value.clone() for key, value in list(content['state_dict'].items())[:12]}
    small = {'meta': content['meta'] | {'cfg': ''}, 'message_hub': content['message_hub'], 'state_dict': weights}
    paths = {kind: folder / f'{kind}.pth' for kind in ('zip', 'pickle', 'legacy')}
    torch.save(small, paths['zip'])
    torch.save(small, paths['pickle'])
    torch.save(small, paths['legacy'], _use_new_zipfile_serialization=False)
    paths['safetensors'] = folder / 'plain.safetensors'
    safetensors.torch.save_file(weights, paths['safetensors'])
    return paths


def mutated(data: st.DataObject, content: bytes, tokens: list[bytes]) -> bytes:
    """Bits flipped, parts cut out, doubled, overwritten by parts of another place or by ``tokens``."""
    place = st.integers(0, len(content) - 1)
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(place) % max(len(result), 1)
        how = data.draw(st.sampled_from(['flip', 'cut', 'delete', 'double', 'copy', 'token', 'number']))
        length = data.draw(st.integers(1, 64))
        if how == 'flip' and result:
            result[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == 'cut':
            del result[at:]
        elif how == 'delete':
            del result[at : at + length]
        elif how == 'double':
            result[at:at] = result[at : at + length]
        elif how == 'copy':
            start = data.draw(place)
            result[at : at + length] = content[start : start + length]
        elif how == 'token':
            result[at:at] = data.draw(st.sampled_from(tokens))
        else:
            result[at : at + 4] = data.draw(st.sampled_from([b'\xff' * 4, b'\0' * 4, b'\xff\xff\xff\x7f']))
    return bytes(result)


@pytest.mark.parametrize('examples', [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_checkpoints(trained, tmp_path, examples):
    """Each is refused in one line, or read without running anything; where checksums are, only if it is the same."""
    marker = tmp_path / 'executed'
    (tmp_path / 'bases').mkdir()
    paths = bases(trained, tmp_path / 'bases')
    originals = {kind: path.read_bytes() for kind, path in paths.items()}
    text = executes(marker).encode()
    call = b'(X' + struct.pack('<I', len(text)) + text + b'tR'
    tokens = [
        b'cbuiltins\neval\n' + call,
        b'c__builtin__\nexec\n' + call,
        b'cos\nsystem\n',
        b'R',
        b'b',
        b'.',
        b'cnumpy\nload\n',
    ]
    expected = read_checkpoint(paths['zip'])
    counts = Counter()

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(sorted(paths)))
    def check(data, kind):
        path = tmp_path / paths[kind].name
        path.write_bytes(originals[kind])
        if kind == 'pickle':
            repacked(path, lambda name, old: mutated(data, old, tokens) if name.endswith('data.pkl') else old)
        else:
            path.write_bytes(mutated(data, originals[kind], tokens))
        before, start = peak_memory(reset=True), time.monotonic()
        try:
            content = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)
            counts[kind, 'refused'] += 1
        else:
            counts[kind, 'read'] += 1
            assert kind != 'zip' or same(content, expected)
        assert time.monotonic() - start < MOST_SECONDS and peak_memory() - before < MOST_MEMORY
        assert not marker.exists()

    check()
    print(dict(counts))
    assert counts.total() >= examples


def same(a, b) -> bool:
    """Whether two checkpoints hold the same, tensors bit by bit."""
    return pickled(a) == pickled(b)


def pickled(content) -> bytes:
    tensors = {key: value.numpy().tobytes() for key, value in content['state_dict'].items()}
    rest = {key: value for key, value in content.items() if key != 'state_dict'}
    return pickle.dumps((tensors, rest))


@pytest.mark.slow
def test_mutated_checkpoints_are_resumed_or_refused(tiny_cfg, trained, tmp_path):
    """The pickle is mutated, the checksums are right: what is read is compared with model and optimizer."""
    original = trained.read_bytes()
    path = tmp_path / 'iter_3.pth'
    counts = Counter()

    @seed(0)
    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        path.write_bytes(original)
        repacked(path, lambda name, old: mutated(data, old, [b'N', b'}', b'K\x00']) if 'data.pkl' in name else old)
        try:
            assert find_resume_point(deepcopy(tiny_cfg), path).path == path
            counts['resumed'] += 1
        except UserError as error:
            assert str(path) in str(error)
            counts['refused'] += 1

    check()
    print(dict(counts))
