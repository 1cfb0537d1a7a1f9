import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from mmseg.registry import DATA_SAMPLERS, HOOKS, LOOPS, METRICS, MODELS, OPTIM_WRAPPERS, RUNNERS, TRANSFORMS
from support import ROOT

import mmseg_inceptionnext


def test_importing_registers_everything():
    for registry, names in (
        (MODELS, ['InceptionNeXt', 'MetaNeXt', 'LabelMapSegmentor', 'LateUpsampleUPerHead']),
        (
            HOOKS,
            ['OverlayHook', 'SafeCheckpointHook', 'SeedIterationHook', 'StopOnNonFiniteLossHook', 'UseKernelsHook'],
        ),
        (LOOPS, ['AccumulatingTrainLoop', 'TolerantValLoop']),
        (RUNNERS, ['SafeRunner']),
        (TRANSFORMS, ['CheckAnnotation', 'ReadImage', 'SeedAugmentation']),
        (METRICS, ['PerClassIoUMetric']),
        (DATA_SAMPLERS, ['ReproducibleInfiniteSampler']),
        (OPTIM_WRAPPERS, ['BFloat16OptimWrapper']),
    ):
        for name in names:
            assert registry.get(name).__module__.startswith('mmseg_inceptionnext.')


def test_importing_says_nothing(tmp_path):
    process = subprocess.run(
        [sys.executable, '-c', 'import mmseg_inceptionnext'], cwd=tmp_path, capture_output=True, text=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')


def test_a_logger_that_an_import_creates_is_heard_later(tmp_path):
    """mmdet, which mmseg imports where it is installed, creates mmengine's logger while our import mutes the screen."""
    (tmp_path / 'mmdet').mkdir()
    (tmp_path / 'mmdet' / '__init__.py').write_text(
        'from mmengine.logging import MMLogger\nMMLogger.get_current_instance().warning("at import")\n'
    )
    program = (
        'import mmseg_inceptionnext; from mmengine.logging import MMLogger; '
        'MMLogger.get_current_instance().warning("later")'
    )
    process = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert 'later' in process.stdout and 'at import' not in process.stdout


def test_importing_leaves_matplotlibs_backend_to_its_user():
    """pyplot chooses one when it is imported; in a notebook that would be the wrong one."""
    program = "import sys, mmseg_inceptionnext; print(sys.modules.get('matplotlib').rcParams._get_backend_or_none())"
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert process.stdout == 'None\n'


def test_version_is_the_installed_one():
    assert version('mmseg-inceptionnext') == mmseg_inceptionnext.__version__


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Built without isolation, so that nothing is downloaded."""
    pytest.importorskip('setuptools', '77')
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--quiet']
    subprocess.run([*command, '--wheel-dir', folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob('mmseg_inceptionnext-*-py3-none-any.whl')
    return wheel


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory) -> Path:
    """A folder of installed packages that holds the wheel."""
    folder = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_in(site: Path, folder: Path, *arguments) -> subprocess.CompletedProcess:
    """Python in another folder than the checkout, with the wheel before everything else that is installed."""
    environment = os.environ | {'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_wheel_holds_the_package_and_what_openmmlab_looks_for(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith('mmseg_inceptionnext/')}
    files = [path for path in (ROOT / 'mmseg_inceptionnext').rglob('*') if path.suffix in ('.py', '.j2', '.typed')]
    modules = {str(path.relative_to(ROOT)) for path in files if '.mim' not in path.parts}
    carried = [path for folder in ('configs', 'tools') for path in (ROOT / folder).rglob('*.*')]
    carried = [path for path in carried if path.suffix in ('.py', '.sh', '.yaml')] + [ROOT / 'model-index.yml']
    mim = {f'mmseg_inceptionnext/.mim/{path.relative_to(ROOT)}' for path in carried}
    assert packed == modules | mim


def test_what_can_be_executed_stays_so_in_the_wheel(wheel):
    mim = 'mmseg_inceptionnext/.mim/'
    for entry in zipfile.ZipFile(wheel).infolist():
        if entry.filename.startswith(mim):
            file = ROOT / entry.filename.removeprefix(mim)
            assert (entry.external_attr >> 16) & 0o111 == file.stat().st_mode & 0o111, entry.filename


def test_configs_are_found_by_name_in_a_wheel(site, tmp_path):
    program = (
        'import mmengine.hub; from mmseg_inceptionnext import get_config; '
        "print(get_config('upernet/inceptionnext_t').filename); "
        "print(mmengine.hub.get_config('mmseg_inceptionnext::upernet/inceptionnext_t.py').filename)"
    )
    process = run_in(site, tmp_path, '-c', program)
    expected = site / 'mmseg_inceptionnext' / '.mim' / 'configs' / 'upernet' / 'inceptionnext_t.py'
    assert process.stdout.splitlines()[-2:] == [str(expected)] * 2, process.stderr


def test_the_tools_run_from_a_wheel(site, tmp_path):
    """`benchmark` starts further processes, which have to find it, too."""
    config = 'mini/fpn_inceptionnext_a'
    arguments = ['benchmark', config, '--shape', 64, 64, '--repeat', 1, '--json', 'speed.json']
    process = run_in(site, tmp_path, '-m', 'mmseg_inceptionnext', *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    assert [row['config'] for row in json.loads((tmp_path / 'speed.json').read_text())] == [config]
    assert [path.name for path in tmp_path.iterdir()] == ['speed.json']


def test_a_rivals_backbone_is_registered_but_not_ours_to_export():
    assert 'PVT' not in mmseg_inceptionnext.__all__ and 'PVT' in MODELS
