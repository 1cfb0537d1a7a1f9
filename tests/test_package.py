import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest
from conftest import ROOT
from mmseg.registry import DATA_SAMPLERS, HOOKS, LOOPS, METRICS, MODELS, OPTIM_WRAPPERS, RUNNERS, TRANSFORMS

import mmseg_inceptionnext


def test_importing_registers_everything():
    for registry, names in (
        (MODELS, ['InceptionNeXt', 'LabelMapSegmentor', 'LateUpsampleUPerHead']),
        (HOOKS, ['OverlayHook', 'SafeCheckpointHook', 'SeedIterationHook', 'StopOnNonFiniteLossHook']),
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


def test_importing_leaves_matplotlibs_backend_to_its_user():
    """pyplot chooses one when it is imported; in a notebook that would be the wrong one."""
    program = "import sys, mmseg_inceptionnext; print(sys.modules.get('matplotlib').rcParams._get_backend_or_none())"
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert process.stdout == 'None\n'


def test_version_is_the_installed_one():
    assert version('mmseg-inceptionnext') == mmseg_inceptionnext.__version__


def test_wheel_holds_the_package_and_works_elsewhere(tmp_path):
    """Built without isolation, so that nothing is downloaded; imported from the wheel itself."""
    pytest.importorskip('setuptools', '77')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--quiet']
    subprocess.run([*command, '--wheel-dir', tmp_path, ROOT], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob('mmseg_inceptionnext-*-py3-none-any.whl')
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith('mmseg_inceptionnext/')}
    files = [path for path in (ROOT / 'mmseg_inceptionnext').rglob('*') if path.suffix in ('.py', '.j2', '.typed')]
    modules = {str(path.relative_to(ROOT)) for path in files}
    configs = {f'mmseg_inceptionnext/.mim/{p.relative_to(ROOT)}' for p in (ROOT / 'configs').rglob('*.py')}
    assert packed == modules | configs
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    program = (
        'import sys; sys.path.insert(0, sys.argv[1]); from mmseg_inceptionnext.config import read_config; '
        "print(read_config('upernet/inceptionnext_t').filename)"
    )
    process = subprocess.run(
        [sys.executable, '-c', program, tmp_path / 'site'], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = tmp_path / 'site' / 'mmseg_inceptionnext' / '.mim' / 'configs' / 'upernet' / 'inceptionnext_t.py'
    assert process.stdout.strip() == str(expected)
