import os
import subprocess
import sys
from dataclasses import replace

import pytest
from support import ROOT

from mmseg_inceptionnext.doctor import Environment, findings, read_environment, report

ONNX = {'onnx': '1.23.2', 'onnxruntime': '1.32.0', 'onnxscript': '0.7.2'}
COMMON = {'torch': '2.6.0+cu124', 'torchvision': '0.21.0', 'timm': '1.0.31', 'numpy': '2.4.6', **ONNX}
MAINTAINED = {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmsegmentation': '1.4.2'}
UPSTREAM = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmsegmentation': '1.2.2', 'setuptools': '80.9.0'}

SOUND = Environment(
    versions={**COMMON, **MAINTAINED, 'opencv-python': '4.12.0.88', 'setuptools': '84.2.1'},
    cuda='12.4', driver='550.54', gpus=('NVIDIA H100',), bf16=True,
)  # fmt: skip
SOUND_UPSTREAM = replace(SOUND, versions={**COMMON, **UPSTREAM, 'opencv-python': '4.12.0.88'}, mmcv_ops=True)


def changed(env: Environment, without: tuple = (), **versions) -> Environment:
    """With other versions, whose names have _ where those of distributions have -."""
    kept = {name: number for name, number in env.versions.items() if name not in without}
    return replace(env, versions=kept | {name.replace('_', '-'): number for name, number in versions.items()})


def test_a_sound_environment_has_no_findings():
    assert findings(SOUND) == []
    (note,) = findings(SOUND_UPSTREAM)
    assert not note.is_fault and 'cannot resume a run under torch 2.6' in note.text


@pytest.mark.parametrize(
    ('env', 'says', 'command'),
    [
        (replace(SOUND, python='3.9.18'), 'Python 3.9.18 is too old', 'python3.11 -m venv'),
        (changed(SOUND, timm='0.9.16'), 'timm 0.9.16 is too old', "pip install --upgrade 'timm>=1.0'"),
        (changed(SOUND, ('timm',)), 'timm is missing', "'timm>=1.0'"),
        (changed(SOUND, torchvision='0.20.1'), 'torchvision::nms', 'torch==2.6.0 torchvision'),
        (
            replace(SOUND, errors={'torchvision': 'RuntimeError: operator torchvision::nms does not exist'}),
            'torchvision 0.21.0 does not match torch 2.6.0+cu124',
            '--force-reinstall torch==2.6.0 torchvision',
        ),
        (
            changed(SOUND, opencv_python_headless='4.12.0.88'),
            'opencv-python and opencv-python-headless install the same files',
            'pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python',
        ),
        (
            replace(SOUND, numpy_1=('cv2',)),
            'importing cv2 loads code that was built for numpy 1',
            'pip install --upgrade opencv-python',
        ),
        (
            replace(SOUND_UPSTREAM, numpy_1=('mmcv',)),
            'importing mmcv loads code that was built for numpy 1',
            "pip install 'numpy<2'",
        ),
        (changed(SOUND, ('onedl-mmcv',)), 'mmcv is missing', 'pip install onedl-mmcv'),
        (
            changed(SOUND, mmcv='2.3.0', setuptools='80.0'),
            'onedl-mmcv and mmcv install the same files, mmcv',
            'pip uninstall -y onedl-mmcv mmcv && pip install --no-deps onedl-mmcv',
        ),
        (changed(SOUND_UPSTREAM, setuptools='81.0.0'), 'pkg_resources', "pip install 'setuptools<81'"),
        (changed(SOUND_UPSTREAM, ('setuptools',)), 'pkg_resources', "pip install 'setuptools<81'"),
        (changed(SOUND_UPSTREAM, mmcv='2.2.0'), 'refuses mmcv 2.2.0', "pip install 'mmcv>=2.0.0,<2.2.0'"),
        (
            changed(SOUND, ('onedl-mmsegmentation',), mmsegmentation='1.2.2'),
            'refuses onedl-mmcv 2.3.6',
            'pip uninstall -y mmsegmentation && pip install onedl-mmsegmentation',
        ),
        (
            replace(changed(SOUND_UPSTREAM, ('mmcv',), mmcv_lite='2.1.0'), mmcv_ops=False),
            "mmcv's compiled operators, which mmcv-lite lacks",
            "pip uninstall -y mmcv-lite && pip install 'mmcv>=2.0.0,<2.2.0'",
        ),
        (replace(SOUND, gpus=()), 'sees no GPU, though there is a driver, 550.54', 'CUDA_VISIBLE_DEVICES'),
        (replace(SOUND, gpus=(), cuda=None), 'this torch is a build for CPUs', '--force-reinstall torch torchvision'),
        (
            replace(SOUND, errors={'mmcv': 'SyntaxError: bad', 'mmseg': 'SyntaxError: bad'}),
            'mmcv cannot be imported: SyntaxError: bad',
            'pip install --force-reinstall --no-deps onedl-mmcv',
        ),
        (
            replace(changed(SOUND, ('opencv-python',)), errors={'cv2': "ModuleNotFoundError: No module named 'cv2'"}),
            "cv2 cannot be imported: ModuleNotFoundError: No module named 'cv2'",
            'pip install --force-reinstall --no-deps opencv-python',
        ),
    ],
)
def test_a_known_fault_is_named_with_what_mends_it(env, says, command):
    (fault,) = [finding for finding in findings(env) if finding.is_fault]
    assert says in fault.text and command in fault.command
    text = report(env, findings(env))
    assert f'problem: {fault.text}\n  {fault.command}' in text


@pytest.mark.parametrize(
    ('env', 'says'),
    [
        (replace(SOUND, gpus=(), driver=None), 'no NVIDIA driver or GPU is visible: everything runs on the CPU'),
        (changed(SOUND, ('onnxscript',)), 'without onnxscript'),
    ],
)
def test_what_works_all_the_same_is_a_note(env, says):
    (note,) = findings(env)
    assert says in note.text and not note.is_fault


def test_versions_of_builds_and_candidates_are_compared_as_numbers():
    assert findings(changed(SOUND, torch='2.14.1+cpu', torchvision='0.29.1+cpu')) == []
    assert findings(changed(SOUND, torch='2.10.0rc1', torchvision='0.25.0')) == []


def test_this_environment_is_read():
    env = read_environment()
    assert {'torch', 'timm', 'numpy'} <= set(env.versions) and env.errors == {}
    assert not [finding for finding in findings(env) if finding.is_fault]


def run(*arguments, first_on_path, folder='/') -> subprocess.CompletedProcess:
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(first_on_path), str(ROOT)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ('arguments', 'broken', 'said'),
    [
        (
            ['-m', 'mmseg_inceptionnext', 'doctor'],
            "raise ImportError('half is missing')",
            'half is missing',
        ),
        ([ROOT / 'tools' / 'doctor.py'], 'import os; os.abort()', 'the import crashes Python'),
    ],
)
def test_it_works_where_the_stack_cannot_be_imported(tmp_path, arguments, broken, said):
    for name in ('torch', 'timm', 'mmengine', 'mmcv', 'mmseg'):
        (tmp_path / f'{name}.py').write_text(broken)
    process = run(*arguments, first_on_path=tmp_path)
    assert (process.returncode, process.stderr) == (1, '')
    assert 'problem: torch cannot be imported: ' in process.stdout and said in process.stdout
    assert 'pip install --force-reinstall --no-deps torch\n' in process.stdout
    assert process.stdout.endswith('\nProblems: 1\n')


def test_a_file_that_hides_a_package_is_named(tmp_path):
    (tmp_path / 'timm.py').write_text('')
    process = run('-m', 'mmseg_inceptionnext', 'doctor', first_on_path=ROOT, folder=tmp_path)
    assert (process.returncode, process.stderr) == (1, '')
    assert 'problem: timm.py in the current folder hides the timm that is installed' in process.stdout
    assert '  mv timm.py another_timm.py\n' in process.stdout


def test_who_imports_the_package_is_sent_to_it(tmp_path):
    (tmp_path / 'mmseg.py').write_text("raise AssertionError('MMCV==2.2.0 is used but incompatible')")
    process = run('-c', 'import mmseg_inceptionnext', first_on_path=tmp_path)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmseg cannot be imported (AssertionError: MMCV==2.2.0 is used')
    assert 'python -m mmseg_inceptionnext doctor' in last


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        ("FileNotFoundError(2, 'No usable temporary directory found in [/tmp]')", 'no temporary folder can be written'),
        ("ImportError('libtorch_cpu.so: failed to map segment from shared object')", 'do not fit into the memory'),
    ],
)
def test_what_the_system_lacks_is_no_fault_of_a_package(tmp_path, error, said):
    (tmp_path / 'mmseg').mkdir()
    (tmp_path / 'mmseg' / '__init__.py').write_text(f'raise {error}')
    for arguments in (['-m', 'mmseg_inceptionnext', 'train', '--list'], [ROOT / 'tools' / 'train.py', '--list']):
        process = run(*arguments, first_on_path=tmp_path)
        assert process.returncode == 2 and process.stdout == ''
        assert process.stderr.startswith('error: ') and said in process.stderr and process.stderr.count('\n') == 1
        assert 'doctor' not in process.stderr
    process = run('-m', 'mmseg_inceptionnext', 'doctor', first_on_path=tmp_path)
    assert process.returncode == 1 and said in process.stdout and 'pip install' not in process.stdout


def test_a_small_shared_memory_is_a_note():
    (note,) = findings(replace(SOUND, shared_memory=2**26))
    assert not note.is_fault and note.text.startswith('/dev/shm has 64 MiB') and '--shm-size' in note.command
    assert findings(replace(SOUND, shared_memory=2**30)) == []
