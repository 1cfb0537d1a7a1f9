"""Say what is installed, what is wrong with it, and the commands that fix it.

This must work where torch or mmseg cannot be imported. So it imports only Python's own modules, reads the versions that
pip has recorded, and tries imports in another process, which may crash.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The distributions that install each import name: the maintained one, then upstream's. Two of one line overwrite each
# other's files.
STACK = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
}
OPENCV = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless')
ONNX = ('onnx', 'onnxruntime', 'onnxscript')
OPENVINO = ('openvino', 'nncf')
OTHERS = ('torch', 'torchvision', 'timm', 'numpy', 'setuptools')

# In order of dependence: an import that fails makes those after it fail.
IMPORTS = ('numpy', 'cv2', 'torch', 'torchvision', 'timm', 'mmengine', 'mmcv', 'mmseg')

# Of 2 prefetched batches for each of 4 workers, of 8 crops of 512×512: uint8 colours and int64 labels.
_ENOUGH_SHARED_MEMORY = 4 * 2 * 8 * 512 * 512 * (3 + 8)

_NUMPY_1 = 'compiled using NumPy 1.x'  # in numpy 2's message about a build that it cannot run

# Run in another process; it prints a line of JSON after each import, so that a crash shows where it was.
_TRY_IMPORTS = """
import contextlib, importlib.util, io, json, sys

def tell(**facts):
    print(json.dumps(facts), file=sys.__stdout__, flush=True)

for name in sys.argv[1:]:
    said, origin = io.StringIO(), ''
    try:
        origin = getattr(importlib.util.find_spec(name), 'origin', '')
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(name)
        error = ''
    except BaseException as exception:
        error = ' '.join(f'{type(exception).__name__}: {exception}'.split())
    tell(name=name, error=error, said=said.getvalue(), origin=origin)

torch = sys.modules.get('torch')
if torch is not None and hasattr(torch, 'cuda'):
    tell(cuda=torch.version.cuda)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        tell(gpus=names, bf16=torch.cuda.is_bf16_supported(including_emulation=False))
"""


_NO_TEMPORARY_FOLDER = 'No usable temporary directory'  # of Python's tempfile
_NO_MEMORY = ('failed to map segment', 'annot allocate memory', "can't allocate memory", 'MemoryError')


def system_cause(error: str) -> tuple[str, str]:
    """Return what in the system makes an import fail, and the command that helps; ('', '') if it is something else.

    Args:
        error: Type and message of what the import raised.
    """
    if _NO_TEMPORARY_FOLDER in error:
        tried = ', '.join(dict.fromkeys([*filter(None, map(os.environ.get, ('TMPDIR', 'TEMP', 'TMP'))), '/tmp']))
        return f'no temporary folder can be written ({tried} …): free space there, or name another', 'export TMPDIR=DIR'
    if any(text in error for text in _NO_MEMORY):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        allowed = 'the machine has' if limit == resource.RLIM_INFINITY else f'a process may use: {limit >> 20} MiB'
        return f'the libraries do not fit into the memory that {allowed} (they map about 4 GiB)', 'ulimit -v unlimited'
    return '', ''


def import_fault(error: BaseException) -> str:
    """Return why the package cannot be imported, and what to do, as one line."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    cause, command = system_cause(text)
    if cause:
        return f'{cause}: {command}'
    return (
        f'mmseg cannot be imported ({text}): `python -m mmseg_inceptionnext doctor` says what is wrong and what to do'
    )


def is_tool() -> bool:
    """Return whether this process runs a tool of the package, not a program that imports it."""
    if sys.argv[:1] == ['-m']:  # until Python has found the module to run
        return __package__ in sys.orig_argv
    script = Path(getattr(sys.modules['__main__'], '__file__', None) or '.').resolve()
    folders = [Path(__file__).resolve().parent.parent / 'tools', Path(__file__).resolve().parent / '.mim' / 'tools']
    return script.parent in folders


@dataclass(frozen=True)
class Environment:
    """What is installed, and what it reports.

    Attributes:
        python: Version of Python.
        versions: Version of each distribution that is installed.
        errors: Why an import fails, by import name.
        hidden: The file in the current folder that Python imports instead, by import name.
        numpy_1: Import names whose compiled parts were built for numpy 1, which numpy 2 refuses.
        mmcv_ops: Whether mmcv has its compiled operators.
        cuda: CUDA version that torch was built for; None for a CPU build, or where torch cannot be imported.
        driver: Version of NVIDIA's driver; None without one.
        gpus: Names of the GPUs that torch sees.
        bf16: Whether the GPUs compute in bfloat16.
        shared_memory: Bytes of /dev/shm; 0 where there is none, or it has no limit.
    """

    python: str = '3.11.0'
    versions: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    numpy_1: tuple[str, ...] = ()
    mmcv_ops: bool = False
    cuda: str | None = None
    driver: str | None = None
    gpus: tuple[str, ...] = ()
    bf16: bool = False
    shared_memory: int = 0

    def has(self, distribution: str, least: str = '0', below: str = '9999') -> bool:
        """Return whether a distribution is installed in a version of at least ``least`` and below ``below``."""
        return distribution in self.versions and (
            _number(least) <= _number(self.versions[distribution]) < _number(below)
        )

    def installed(self, distributions: tuple[str, ...]) -> list[str]:
        """Return which of some distributions are installed, in the same order."""
        return [name for name in distributions if name in self.versions]


@dataclass(frozen=True)
class Finding:
    """A fault or a note.

    Attributes:
        text: What it is, and its consequence.
        command: Command that fixes it; for a note, one that changes it, if there is one.
        is_fault: Whether something does not work; otherwise it is a note.
    """

    text: str
    command: str = ''
    is_fault: bool = True


def read_environment() -> Environment:
    """Read the environment of this Python. It takes seconds: another process imports torch and mmseg."""
    versions = {}
    for name in (
        *(name for line in STACK.values() for name in line),
        *OPENCV,
        *ONNX,
        *OPENVINO,
        *OTHERS,
        'mmseg-inceptionnext',
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    answers, end = _try_imports()
    tried = {answer['name']: answer for answer in answers if 'name' in answer}
    errors = {name: answer['error'] for name, answer in tried.items() if answer['error']}
    if crashed := next((name for name in IMPORTS if name not in tried), ''):
        errors[crashed] = f'the import crashes Python ({end})'
    facts = {key: value for answer in answers if 'name' not in answer for key, value in answer.items()}
    return Environment(
        python=platform.python_version(),
        versions=versions,
        errors=errors,
        hidden={
            name: Path(answer['origin']).name
            for name, answer in tried.items()
            if answer['origin'] in (str(Path.cwd() / f'{name}.py'), str(Path.cwd() / name / '__init__.py'))
        },
        numpy_1=tuple(name for name, answer in tried.items() if _NUMPY_1 in answer['said'] + answer['error']),
        mmcv_ops=_has_compiled_ops(),
        cuda=facts.get('cuda'),
        driver=_driver(),
        gpus=tuple(facts.get('gpus', ())),
        bf16=facts.get('bf16', False),
        shared_memory=_shared_memory(),
    )


def findings(env: Environment) -> list[Finding]:
    """List all findings about an environment, faults first, and causes before their consequences."""
    found = [*_hidden(env), *_system(env)]
    if any(finding.is_fault for finding in found):
        return found  # nothing can be said of packages that were not reached
    found += [*_python_and_torch(env), *_numpy_and_opencv(env), *_stack(env), *_gpu(env), *_options(env)]
    if not any(finding.is_fault for finding in found):
        found += _unexplained(env)
    return sorted(found, key=lambda finding: not finding.is_fault)


def _hidden(env: Environment) -> Iterator[Finding]:
    for name, file in env.hidden.items():
        here = f'{name}.py' if file == f'{name}.py' else name
        yield Finding(
            f'{here} in the current folder hides the {name} that is installed: Python looks there first',
            f'mv {here} another_{here}',
        )


def _system(env: Environment) -> Iterator[Finding]:
    for cause, command in dict.fromkeys(map(system_cause, env.errors.values())):
        if cause:
            yield Finding(cause, command)
    if 0 < env.shared_memory < _ENOUGH_SHARED_MEMORY:
        yield Finding(
            f'/dev/shm has {env.shared_memory >> 20} MiB: data-loading workers hand over batches through it, and 4 '
            f'workers with 8 images of 512×512 need about {_ENOUGH_SHARED_MEMORY >> 20} MiB. Use fewer workers, or '
            'start the container with more',
            'docker run --shm-size 1g …',
            is_fault=False,
        )


def _python_and_torch(env: Environment) -> Iterator[Finding]:
    if _number(env.python) < (3, 10):
        yield Finding(
            f'Python {env.python} is too old: 3.10 is the minimum. Install into a newer one', 'python3.11 -m venv .venv'
        )
    for name, least in (('torch', '2.6'), ('timm', '1.0')):
        if not env.has(name, least):
            what = f'{name} {env.versions[name]} is too old' if name in env.versions else f'{name} is missing'
            yield Finding(f'{what}: {least} is the minimum', f"pip install --upgrade '{name}>={least}'")
    if 'torch' in env.versions and 'torchvision' in env.versions:
        torch, torchvision = (env.versions[name] for name in ('torch', 'torchvision'))
        release = _number(torch)
        unlike = release[0] == 2 and _number(torchvision)[:2] != (0, release[1] + 15)  # 2.6 goes with 0.21
        if unlike or any('torchvision::nms' in error for error in env.errors.values()):
            yield Finding(
                f'torchvision {torchvision} does not match torch {torch}: its operators are not registered '
                '(torchvision::nms does not exist)',
                f'pip install --force-reinstall torch=={torch.partition("+")[0]} torchvision',
            )


def _numpy_and_opencv(env: Environment) -> Iterator[Finding]:
    several = env.installed(OPENCV)
    if len(several) > 1:
        yield Finding(
            f'{" and ".join(several)} install the same files, cv2: whichever came last has overwritten the others',
            f'pip uninstall -y {" ".join(several)} && pip install opencv-python',
        )
    if env.numpy_1:
        upgrades = {'cv2': 'opencv-python', 'torch': 'torch torchvision', 'torchvision': 'torch torchvision'}
        first = env.numpy_1[0]
        command = f'pip install --upgrade {upgrades[first]}' if first in upgrades else "pip install 'numpy<2'"
        yield Finding(
            f'importing {", ".join(env.numpy_1)} loads code that was built for numpy 1, which numpy '
            f'{env.versions.get("numpy")} does not run',
            command,
        )


def _stack(env: Environment) -> Iterator[Finding]:
    for module, line in STACK.items():
        there = env.installed(line)
        if not there:
            yield Finding(f'{module} is missing', f'pip install {line[0]}')
        elif len(there) > 1:
            yield Finding(
                f'{" and ".join(there)} install the same files, {module}: they have overwritten each other',
                f'pip uninstall -y {" ".join(there)} && pip install --no-deps {there[0]}',
            )
    upstream = env.installed(('mmengine', 'mmcv'))
    if upstream and not env.has('setuptools', below='81'):
        yield Finding(
            f'pkg_resources, needed by upstream {" and ".join(upstream)}, is only in setuptools below 81; installed: '
            f'{env.versions.get("setuptools", "none")}',
            "pip install 'setuptools<81'",
        )
    if env.has('mmengine', below='0.10.8') and env.has('torch', '2.6'):
        yield Finding(
            f'upstream mmengine {env.versions["mmengine"]} cannot resume a run under torch 2.6 or later by itself. The '
            "tools of this package can: they read checkpoints their own way. mmseg's own tools cannot",
            is_fault=False,
        )
    yield from _upstream_mmseg(env)


def _upstream_mmseg(env: Environment) -> Iterator[Finding]:
    if 'mmsegmentation' not in env.versions:
        return
    to_maintained = 'pip uninstall -y mmsegmentation && pip install onedl-mmsegmentation'
    mmcv = next(iter(env.installed(STACK['mmcv'])), '')
    to_older = f"pip uninstall -y {mmcv} && pip install 'mmcv>=2.0.0,<2.2.0'"
    fix = to_maintained if mmcv == 'onedl-mmcv' else to_older
    name = f'upstream mmsegmentation {env.versions["mmsegmentation"]}'
    if mmcv and env.has(mmcv, '2.2') and env.has('mmsegmentation', below='1.2.3'):
        yield Finding(f'{name} refuses {mmcv} {env.versions[mmcv]}: it takes those below 2.2.0', fix)
    elif mmcv and not env.mmcv_ops and not env.errors.keys() - {'mmseg'}:  # else mmcv may not have been reached
        yield Finding(f"{name} cannot be imported without mmcv's compiled operators, which {mmcv} lacks here", fix)


def _gpu(env: Environment) -> Iterator[Finding]:
    if 'torch' not in env.versions or 'torch' in env.errors or env.gpus:
        return
    if env.driver and env.cuda:
        yield Finding(
            f'torch, built for CUDA {env.cuda}, sees no GPU, though there is a driver, {env.driver}: it is too old for '
            'this CUDA, or CUDA_VISIBLE_DEVICES hides the GPUs',
            "env -u CUDA_VISIBLE_DEVICES python -c 'import torch; torch.cuda.init()'",
        )
    elif env.driver:
        yield Finding(
            f'there is a GPU (driver {env.driver}), but this torch is a build for CPUs',
            'pip install --force-reinstall torch torchvision',
        )
    elif env.cuda:
        yield Finding(
            f'torch is built for CUDA {env.cuda}, and no NVIDIA driver or GPU is visible: everything runs on the CPU',
            is_fault=False,
        )


def _options(env: Environment) -> Iterator[Finding]:
    if missing := [name for name in ONNX if name not in env.versions]:
        yield Finding(
            f'without {", ".join(missing)}, `export` to .onnx files and `predict` with them do not work',
            f'pip install {" ".join(missing)}',
            is_fault=False,
        )


def _unexplained(env: Environment) -> Iterator[Finding]:
    """Yield the first import that fails; it may be the cause of the others."""
    providers = {'cv2': OPENCV, **STACK}
    for name in IMPORTS:
        if name in env.errors:
            distributions = providers.get(name, (name,))
            distribution = next(iter(env.installed(distributions)), distributions[0])
            yield Finding(
                f'{name} cannot be imported: {env.errors[name]}',
                f'pip install --force-reinstall --no-deps {distribution}',
            )
            return


def report(env: Environment, found: list[Finding]) -> str:
    """Format the environment and what :func:`findings` found."""
    lines = [
        f'mmseg_inceptionnext {env.versions.get("mmseg-inceptionnext", "(not installed)")} in {Path(__file__).parent}'
    ]
    lines += [f'Python {env.python}, {platform.platform()}', f'OpenMMLab: {_kind_of_stack(env)}', '']
    for name in (*OTHERS, *OPENCV, *(name for line in STACK.values() for name in line), *ONNX, *OPENVINO):
        if name in env.versions:
            lines.append(f'{name:<26} {env.versions[name]}')
    lines.append('')
    need = 'needed: upstream mmsegmentation imports them' if 'mmsegmentation' in env.versions else 'not needed'
    lines.append(f"mmcv's compiled operators: {'there' if env.mmcv_ops else 'none'}; {need}")
    lines.append(f'GPU: {_gpus(env)}')
    lines += [f'import {name} fails: {error}' for name, error in env.errors.items()]
    for finding in found:
        lines += ['', f'{"problem" if finding.is_fault else "note"}: {finding.text}']
        if finding.command:
            lines.append(f'  {finding.command}')
    return '\n'.join(lines)


def _kind_of_stack(env: Environment) -> str:
    there = [name for line in STACK.values() for name in env.installed(line)]
    maintained = [name for name in there if name.startswith('onedl-')]
    if not there:
        return 'none'
    kind = 'the maintained distributions' if maintained == there else 'a mixture' if maintained else 'upstream'
    return f'{kind} ({", ".join(there)})'


def _gpus(env: Environment) -> str:
    driver = f'driver {env.driver}' if env.driver else 'no driver'
    cuda = f'torch built for CUDA {env.cuda}' if env.cuda else 'torch not built for CUDA'
    names = ', '.join(env.gpus) + (', with' if env.bf16 else ', without') + ' bfloat16' if env.gpus else 'none'
    return f'{names} ({driver}, {cuda})'


def _number(text: str) -> tuple[int, ...]:
    """Return the comparable part of a version such as 2.14.1+cu130."""
    return tuple(int(part) for part in re.findall(r'\d+', text.partition('+')[0])[:3])


def _try_imports() -> tuple[list[dict], str]:
    process = subprocess.run([sys.executable, '-c', _TRY_IMPORTS, *IMPORTS], capture_output=True, text=True)
    # Compiled code that is imported may print lines of its own.
    answers = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"')]
    return answers, f'exit code {process.returncode}'


def _has_compiled_ops() -> bool:
    spec = importlib.util.find_spec('mmcv')
    folders = spec.submodule_search_locations or () if spec else ()
    return any(path.suffix in ('.so', '.pyd') for folder in folders for path in Path(folder).glob('_ext*'))


def _shared_memory() -> int:
    try:
        status = os.statvfs('/dev/shm')
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize


def _driver() -> str | None:
    if not shutil.which('nvidia-smi'):
        return None
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    process = subprocess.run(query, capture_output=True, text=True)
    return process.stdout.split()[0] if process.returncode == 0 and process.stdout.split() else None


def main(arguments: list[str]) -> int:
    """Print the report; return the exit code: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog='python -m mmseg_inceptionnext doctor',
        description='Say what is installed, what is wrong with it, and the commands that fix it.',
    )
    parser.parse_args(arguments)
    env = read_environment()
    found = findings(env)
    print(report(env, found))
    faults = sum(finding.is_fault for finding in found)
    print(f'\nProblems: {faults}' if faults else '\nNothing is wrong')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
