"""A prediction that is killed and repeated, or shared out, gives the folder of one run; and its record."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, TINY_CONFIG, assert_user_error, save_segmentor

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.inference import precision
from mmseg_inceptionnext.inference import predict as predict_module
from mmseg_inceptionnext.inference.manifest import Manifest
from mmseg_inceptionnext.inference.predict import predict
from mmseg_inceptionnext.inference.sources import Output, find_sources, shard_of

OUT = Output(Path('out'), labels=True)


@pytest.fixture(scope='module')
def segmentor(trained):
    return Segmentor(TINY_CONFIG, trained, device='cpu', precision='fp32')


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Eight images, and one that is none; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i in range(8):
        path = Path('in', f'{i % 2}', f'{i}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    Path('in/bad.jpg').write_bytes(b'text')
    return tmp_path


def sources(out='out'):
    return find_sources(['in'], Path(out))


def lines(path='out/manifest.jsonl') -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder) -> dict[str, object]:
    """All that is in a folder, but for the seconds."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob('*') if p.is_file()):
        is_manifest = path.suffix == '.jsonl'
        value = [dict(line, seconds=0) for line in lines(path)] if is_manifest else path.read_bytes()
        found[str(path.relative_to(folder))] = value
    return found


def resume(segmentor, out=OUT, **options):
    return predict(segmentor, sources(out.folder), out, skip_existing=True, **options)


def test_what_is_recorded_of_a_file(folder, segmentor):
    assert resume(segmentor).keys() == {'in/bad.jpg'}
    head, *files = lines()
    assert list(head) == ['run'] and head['run']['precision'] == 'fp32' and head['run']['labels'] is True
    assert [line['file'] for line in files] == sorted(str(source.path) for source in sources())
    image, bad = files[0], files[-1]
    raw = Path('in/0/0.png').read_bytes()
    assert (image['file'], image['size'], image['hash']) == ('in/0/0.png', len(raw), hashlib.sha256(raw).hexdigest())
    assert image['seconds'] > 0
    assert image['classes'] == pytest.approx(segmentor('in/0/0.png').areas(), abs=1e-6)
    assert 'not an image' in bad['reason'] or bad['reason'] and 'classes' not in bad
    assert bad['size'] == 4


def test_only_what_is_missing_or_has_changed_is_predicted_again(folder, segmentor):
    resume(segmentor)
    before = content('out')
    predicted = []
    count = dict(on_start=predicted.append)
    assert resume(segmentor, **count).keys() == {'in/bad.jpg'}  # which is tried again, and named again
    Path('out/labels/0/2.png').unlink()
    resume(segmentor, **count)
    os.utime('in/0/0.png')  # touched, and the same
    resume(segmentor, **count)
    assert predicted == [1, 2, 1] and content('out') == before
    Image.new('RGB', (40, 48)).save('in/1/1.png')
    Path('in/bad.jpg').write_bytes(Path('in/0/0.png').read_bytes())
    assert resume(segmentor, **count) == {}
    assert predicted[-1] == 2 and content('out').keys() == before.keys() | {'bad.png', 'labels/bad.png'}
    assert [line for line in lines() if 'reason' in line] == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.inference import manifest
from mmseg_inceptionnext.inference.predict import predict
from mmseg_inceptionnext.inference.sources import Output, find_sources

def run(dies_at):
    '''Predict, and be killed before the n-th file appears or the n-th line is written.'''
    events = 0
    def mortal(function):
        def call(*arguments):
            nonlocal events
            events += 1
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call
    os.replace, manifest.Manifest._write = mortal(os.replace), mortal(manifest.Manifest._write)
    segmentor = Segmentor(*sys.argv[1:3], device='cpu', precision='fp32')
    predict(segmentor, find_sources(['in'], Path('out')), Output(Path('out'), labels=True), skip_existing=True)

for dies_at in (1, 2, 3, 6, 12, 0):
    if not (child := os.fork()):
        run(dies_at)
        os._exit(0)
    print('code', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_run_that_was_killed_at_any_moment_and_repeated_gives_the_same_folder(folder, trained, segmentor):
    process = subprocess.run([sys.executable, '-c', KILLED, str(TINY_CONFIG), str(trained)], capture_output=True,
                             text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})  # fmt: skip
    codes = [line for line in process.stdout.splitlines() if line.startswith('code ')]
    assert codes == [*['code -9'] * 5, 'code 0'], process.stderr
    resume(segmentor, Output(Path('whole'), labels=True))
    assert content('out') == content('whole')


def test_a_line_that_a_kill_has_cut_is_written_again(folder, segmentor):
    resume(segmentor)
    before, path = content('out'), Path('out/manifest.jsonl')
    path.write_bytes(path.read_bytes()[:-20])
    started = []
    resume(segmentor, on_start=started.append)
    assert started == [1] and content('out') == before
    path.write_bytes(path.read_bytes().replace(b'{"file": "in/0', b'{"fil\xff": "in/0', 1))
    with pytest.raises(UserError, match=r'manifest.jsonl: line 2 is damaged: remove the line'):
        resume(segmentor)


@pytest.mark.parametrize('shards', [2, 20])
def test_shards_give_what_one_run_gives(folder, segmentor, shards):
    resume(segmentor, Output(Path('whole'), labels=True))
    for i in range(shards, 0, -1):
        predict(segmentor, sources(), OUT, shard=f'{i}/{shards}')
        assert len(lines()) == (10 if i == 1 or shards > 2 and len(list(Path('out').rglob('*.png'))) == 16 else 1)
    assert content('out') == content('whole')
    started = []
    for i in range(1, shards + 1):
        resume(segmentor, shard=f'{i}/{shards}', on_start=started.append)
    assert sum(started) == 1 and content('out') == content('whole')  # what cannot be read is tried again


def test_a_shard_is_killed_and_repeated(folder, segmentor, monkeypatch):
    resume(segmentor, Output(Path('whole'), labels=True))
    predict(segmentor, sources(), OUT, shard='1/2')
    write, number = Manifest._write, []

    def dies(self, line):
        number.append(1)
        if len(number) == 3:
            raise KeyboardInterrupt
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, '_write', dies)
        with pytest.raises(KeyboardInterrupt):
            predict(segmentor, sources(), OUT, shard='2/2')
    assert {path.name for path in Path('out').glob('*.jsonl')} == {
        'manifest.jsonl', 'manifest.1-of-2.jsonl', 'manifest.2-of-2.jsonl'
    }  # fmt: skip
    resume(segmentor, shard='2/2')
    assert content('out') == content('whole')


def test_a_file_that_is_added_moves_no_other_and_the_mount_does_not_matter(folder):
    def shards() -> dict[str, int]:
        found = {str(s.path): i for i in range(1, 5) for s in shard_of(sources(), f'{i}/4')}
        assert len(found) == len(sources())
        return found

    before = shards()
    assert len(set(before.values())) > 1
    for i in range(20):
        Path('in', f'{i}a.png').touch()
    assert before.items() <= shards().items()
    elsewhere = find_sources([str(folder / 'in')], Path('out'))
    assert {s.name for s in shard_of(elsewhere, '2/4')} == {s.name for s in shard_of(sources(), '2/4')}


@pytest.mark.parametrize('shard', ['0/4', '5/4', '1/0', '4', '1/2/3', '-1/4', 'a/b', ''])
def test_there_is_no_such_shard(folder, shard):
    with pytest.raises(UserError, match=f"shard='{shard}' must be i/n, the i-th of n shards, counted from 1"):
        shard_of(sources(), shard)


@pytest.mark.parametrize('other, said', [
    (dict(output=Output(Path('out'))), 'its labels was True, now it is False'),
    (dict(output=Output(Path('out'), labels=True, opacity=0.2)), 'its opacity was 0.5, now it is 0.2'),
    (dict(precision='bf16'), 'its precision was fp32, now it is bf16'),
    (dict(tile=64), 'its tile was None, now it is 64'),
    (dict(seed=1), r'its checkpoint was \w{12}…, now it is \w{12}…'),
], ids=str)  # fmt: skip
def test_a_manifest_of_another_run(folder, other, said):
    options = dict(device='cpu', precision='fp32')
    predict(Segmentor(*save_segmentor(Path('m')), **options), sources(), OUT, skip_existing=True)
    before, other = content('out'), dict(other)
    output, model = other.pop('output', OUT), save_segmentor(Path('n'), seed=other.pop('seed', 0))
    if said.startswith('its checkpoint'):
        model = (Path('m/config.py'), model[1])
    else:
        model = (Path('m/config.py'), Path('m/model.pth'))
    made = Segmentor(*model, **options | other)
    Image.new('RGB', (40, 48)).save('in/new.png')
    for run in (dict(skip_existing=True), dict(shard='1/1')) if output is OUT else (dict(skip_existing=True),):
        Path('in/new.png').rename('new.png')
        with pytest.raises(UserError, match=f'out/manifest.jsonl is of another run: {said}: choose another out=DIR'):
            predict(
                made, sources() if 'skip_existing' in run else find_sources(['new.png'], Path('out')), output, **run
            )
        Path('new.png').rename('in/new.png')
    assert content('out') == before
    assert predict(made, sources(), output, overwrite=True).keys() == {'in/bad.jpg'}
    assert len(lines()) == 11


def test_a_run_that_ended_before_its_first_file_is_no_other_run(folder, segmentor, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(segmentor, 'predict', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(segmentor, find_sources(['in/1/1.png'], Path('out')), OUT)
    assert content('out') == {}
    other = Segmentor(TINY_CONFIG, trained, device='cpu', precision='fp32', fast=False)
    assert predict(other, find_sources(['in/1/1.png'], Path('out')), OUT) == {}
    with monkeypatch.context() as patch:  # but one that had files is
        patch.setattr(other, 'predict', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(other, find_sources(['in/0/2.png'], Path('out')), OUT)
    assert len(lines()) == 2


def test_the_precision_that_a_race_chose_is_kept(folder, trained, monkeypatch):
    """Whoever repeats a run, or does another shard, takes what its first process chose, whatever is faster there."""
    winner = iter(['bf16', 'fp32', 'fp32'])
    raced = []

    def faster(make, *_):
        raced.append(next(winner))
        return raced[-1], make(raced[-1]).eval()

    monkeypatch.setattr(precision, 'faster', faster)
    auto = dict(device='cpu', precision='auto')
    predict(Segmentor(TINY_CONFIG, trained, **auto), sources(), OUT, shard='1/2')
    predict(Segmentor(TINY_CONFIG, trained, **auto), sources(), OUT, shard='2/2')
    assert raced == ['bf16'] and lines()[0]['run']['precision'] == 'bf16'
    predict(
        Segmentor(TINY_CONFIG, trained, device='cpu', precision='bf16'), sources('b'), Output(Path('b'), labels=True)
    )
    assert [{name: value for name, value in content(out).items() if name.endswith('png')} for out in ('out', 'b')] == [
        {name: value for name, value in content('b').items() if name != 'manifest.jsonl'}
    ] * 2
    Path('out/0/0.png').unlink()
    raced_elsewhere = Segmentor(TINY_CONFIG, trained, **auto)
    raced_elsewhere.settled()
    assert raced == ['bf16', 'fp32']
    resume(raced_elsewhere)
    assert [{name: value for name, value in content(out).items() if name.endswith('png')} for out in ('out', 'b')] == [
        {name: value for name, value in content('b').items() if name != 'manifest.jsonl'}
    ] * 2


def test_the_batch_size_that_was_chosen_is_kept(folder, segmentor, monkeypatch):
    chosen = iter([4, 2])
    monkeypatch.setattr(predict_module, 'choose_batch_size', lambda *_: next(chosen))
    batches, compute = [], segmentor.predict

    def counted(images, *rest):
        batches.append(len(images))
        return compute(images, *rest)

    monkeypatch.setattr(segmentor, 'predict', counted)
    predict(segmentor, sources(), OUT, 'auto', shard='1/2')
    assert lines()[0]['run']['batch_size'] == 4
    predict(segmentor, sources(), OUT, 'auto', shard='2/2')
    assert max(batches) == 4 and next(chosen) == 2
    Path('out/0/0.png').unlink()
    resume(segmentor, batch_size=1)  # of a GPU with less memory
    assert batches[-1] == 1


@pytest.mark.parametrize('seconds, expected', [
    ({1: 1, 2: 0.99}, 1), ({1: 1, 2: 0.8, 4: 0.7, 8: 0.69}, 4), ({1: 1, 2: 0.5, 4: 'full'}, 2),
    ({1: 1, 2: 0.5, 4: 0.2, 8: 0.1, 16: 0.05}, 16),
])  # fmt: skip
def test_a_batch_size_is_doubled_while_it_pays(folder, segmentor, monkeypatch, seconds, expected):
    clock = [0.0]

    def compute(images, *_):
        took = seconds[len(images)]
        if took == 'full':
            raise torch.OutOfMemoryError
        clock[0] += took * len(images)

    monkeypatch.setattr(segmentor, 'predict', compute)
    monkeypatch.setattr(predict_module.time, 'perf_counter', lambda: clock[0])
    found = predict_module.choose_batch_size(segmentor, sources())
    monkeypatch.undo()
    assert found == expected


def test_what_no_manifest_knows_is_not_replaced(folder, segmentor):
    Path('out/0').mkdir(parents=True)
    Path('out/0/0.png').write_text('mine')
    with pytest.raises(UserError, match='0.png exist already, and no manifest says what they were made from: pass'):
        resume(segmentor)
    assert content('out') == {'0/0.png': b'mine'}
    for options in (dict(skip_existing=True), dict(shard='1/2')):
        with pytest.raises(UserError, match='overwrite=True and .* exclude each other'):
            predict(segmentor, sources(), OUT, overwrite=True, **options)


def test_outputs_of_another_file_are_not_replaced(folder, segmentor):
    """Two cameras name their photographs alike."""
    shutil.copytree('in', 'other')
    Image.new('RGB', (40, 48)).save('other/0/2.png')
    predict(segmentor, sources(), OUT)
    before = content('out')
    with pytest.raises(UserError, match='out/0/2.png was made from in/0/2.png, not from other/0/2.png: choose another'):
        predict(segmentor, find_sources(['other'], Path('out')), OUT, skip_existing=True)
    assert content('out') == before
    Path('out/0/2.png').unlink()
    Path('out/labels/0/2.png').unlink()
    assert predict(segmentor, find_sources(['other'], Path('out')), OUT, skip_existing=True).keys() == {'other/bad.jpg'}


def test_polygons_of_another_image_are_not_replaced(folder, trained):
    tiled = Segmentor(TINY_CONFIG, trained, device='cpu', tile=64)
    output = Output(Path('out'), polygons=Path('p.geojson'))
    for name, value in (('a', 0), ('b', 99)):
        Image.new('RGB', (80, 70), (value, 0, 0)).save(f'{name}.tif')
    predict(tiled, find_sources(['a.tif'], Path('out')), output)
    before = Path('p.geojson').read_bytes()
    with pytest.raises(UserError, match='p.geojson was made from a.tif, not from b.tif'):
        predict(tiled, find_sources(['b.tif'], Path('out')), output, skip_existing=True)
    assert Path('p.geojson').read_bytes() == before and not Path('out/labels/b.tif').exists()


def test_a_shard_that_runs_already(folder, segmentor):
    with Manifest(Path('out'), '1/2') as running:
        running.begin(segmentor.identity() | OUT.identity() | dict(bands=None, scale=None, batch_size=1))
        with pytest.raises(UserError, match=r'manifest.1-of-2.jsonl is being written by another run: wait'):
            predict(segmentor, sources(), OUT, shard='1/2')
        predict(segmentor, sources(), OUT, shard='2/2')
    predict(segmentor, sources(), OUT, shard='1/2')
    assert sum('file' in line for line in lines()) == 9


def test_a_disk_that_fills_leaves_whole_lines(folder, segmentor, monkeypatch):
    resume(segmentor, Output(Path('whole'), labels=True))
    add, number = Manifest.add, []

    class Full:
        """A file on a disk that has room for half a line."""

        def __init__(self, file):
            self._file, self.halves = file, 0

        def write(self, content):
            self.halves += 1
            if self.halves > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content[: len(content) // 2])

        def __getattr__(self, name):
            return getattr(self._file, name)

    def fills(self, *arguments, **found):
        number.append(1)
        if len(number) == 4:
            self._file = Full(self._file)
        add(self, *arguments, **found)

    monkeypatch.setattr(Manifest, 'add', fills)
    with pytest.raises(UserError, match='cannot write out/manifest.jsonl: No space left on device'):
        resume(segmentor)
    monkeypatch.undo()
    os.chdir(folder)
    assert len(lines()) == 4
    resume(segmentor)
    assert content('out') == content('whole')


def test_the_tool(folder, trained, tool_here):
    command = ('predict', TINY_CONFIG, trained, 'in', '--out', 'out', '--labels', '--precision', 'fp32')
    assert_user_error(tool_here(*command, '--shard', '3/2'), '--shard 3/2 must be i/n')
    assert_user_error(tool_here(*command, '--shard', '1/2', '--overwrite'), '--overwrite and --shard 1/2 exclude')
    process = tool_here(*command, '--skip-existing')
    assert_user_error(process, 'in/bad.jpg: ')
    assert '8 images in out' in process.stdout
    Path('in/bad.jpg').unlink()
    process = tool_here(*command, '--skip-existing')
    assert process.returncode == 0 and '0 images in out' in process.stdout
    assert_user_error(tool_here(*command, '--skip-existing', '--legend'), 'its legend was False', 'another --out DIR')


def test_an_array_of_slurm_jobs(folder, trained, tool_here):
    """sbatch is one that keeps the script of a job; each job of the array runs it with its number."""
    Path('bin').mkdir()
    Path('bin/sbatch').write_text('#!/bin/sh\necho "$@" > options\ncat > job\n')
    Path('bin/python').write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\n')
    for name in ('sbatch', 'python'):
        Path('bin', name).chmod(0o755)
    path = {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}'}
    Path('in').rename('my "in"')
    script = ROOT / 'tools' / 'slurm_predict.sh'
    command = [script, 'gpus', 'towns', TINY_CONFIG, trained, 'my "in"', '--out', 'out', '--precision', 'fp32']
    subprocess.run(command, env=os.environ | path | {'SHARDS': '2', 'SBATCH_ARGS': '--time=1:0'}, check=True)
    assert {'--partition=gpus', '--array=1-2', '--time=1:0'} <= set(Path('options').read_text().split())
    for i in (1, 2):
        job = {'SLURM_ARRAY_TASK_ID': str(i), 'SLURM_ARRAY_TASK_COUNT': '2'}
        subprocess.run(['bash', 'job'], env=os.environ | path | job, check=True)
        unbuffered, tool, *words = Path('words').read_text().splitlines()
        assert (unbuffered, Path(tool).name) == ('-u', 'predict.py')
        process = tool_here('predict', *words)
        assert process.returncode == 0 or 'bad.jpg' in process.stderr
    assert len(lines()) == 10
    assert subprocess.run([script, 'gpus'], capture_output=True, check=False).returncode == 2
