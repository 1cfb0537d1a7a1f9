"""Read a config file and apply to it what a command line asks for."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import traceback
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import Registry
from mmseg import registry

from mmseg_inceptionnext.errors import UserError, one_line

# What starts the processes of a distributed run, and what it sets: the number of a process, how many there are, and
# what mmengine asks for besides.
_LAUNCHERS = {
    'pytorch': ('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('srun', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': ('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR'),
}


def read_config(path: str | Path) -> Config:
    """Read a config file as it is.

    Args:
        path: A file, or the name of a config that the package ships, such as 'upernet/inceptionnext_t'.

    Raises:
        UserError: no such file, or one that cannot be read as a config.
    """
    path = find_config(path)
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program of the user's: it can raise anything
        reason = next(iter(str(error).strip().splitlines()), '')
        raise UserError(f'{path} cannot be read as a config: {type(error).__name__}: {reason}') from error


def find_config(path: str | Path) -> Path:
    """The file of a config that is given by its path, or by the end of the path of a shipped one.

    Raises:
        UserError: there is none, or several shipped ones have that name.
    """
    path = Path(path)
    if path.is_file():
        return path
    wanted = Path(str(path).removesuffix('.py')).parts
    root = shipped('configs')
    configs = sorted(p for p in root.rglob('*.py') if '_base_' not in p.parts)
    found = [p for p in configs if p.relative_to(root).with_suffix('').parts[-len(wanted) :] == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        names = ', '.join(str(p.relative_to(root).with_suffix('')) for p in found)
        raise UserError(f'{path} is the name of several configs: say which of {names}')
    raise UserError(
        f'no config at {path.absolute()}: check the path, or name a shipped one, such as upernet/inceptionnext_t'
    )


def shipped(folder: str) -> Path:
    """Where ``configs`` or ``tools`` are: in a wheel inside the package; in a checkout beside it.

    There, too, ``.mim`` leads to them, by links; but some file systems and archives do not keep links.
    """
    package = Path(__file__).parent
    inside = package / '.mim' / folder
    return inside.resolve() if inside.is_dir() else package.parent / folder


def mistake_in_config(error: Exception) -> str:
    """What to say of an exception of mmengine's where the config is to blame; '' where it may be a bug.

    These are a ``type`` that nothing is registered under, and an argument that the class it names does not have.
    """
    text = str(error.args[0]) if error.args else ''
    if isinstance(error, KeyError) and (match := re.match(r'(\S+) is not in the (?:\w+::)?(.+?) registry', text)):
        name, kind = match.groups()
        registries = [r for r in vars(registry).values() if isinstance(r, Registry) and r.name == kind]
        known = [other for r in registries for other in (*r.module_dict, *r.parent.module_dict)]
        meant = ''.join(f'; {close} is' for close in difflib.get_close_matches(name, known, n=1))
        return (
            f'type={name!r} in the config is not the name of a {kind}{meant}: mend it, or let custom_imports import '
            'the module that registers it'
        )
    unexpected = r"(.+?)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'"
    if isinstance(error, TypeError) and (match := re.match(unexpected, text)):
        what, argument = match.groups()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # What mmengine builds an object from; an argument that is not among them was not the config's.
            given = {'build_from_cfg': 'args', 'build_dataloader': 'dataloader_cfg'}.get(frame.f_code.co_name)
            if argument in frame.f_locals.get(given, ()):
                return f'{argument} in the config is not an argument of {what}: mend its name'
    return ''


def require(cfg: Config, *keys: str) -> None:
    """Make sure that a config has something under some keys.

    Raises:
        UserError: naming those that it lacks.
    """
    if lacking := [key for key in keys if not isinstance(cfg.get(key), (dict, list))]:
        raise UserError(f'{cfg.filename} lacks {", ".join(lacking)}: inherit from a recipe under configs')


def load_config(path: str | Path, work_dir: str | Path | None = None, data_root: str | Path | None = None,
                launcher: str = 'none', cfg_options: dict | None = None) -> Config:  # fmt: skip
    """Read a config, override parts of it, and make sure that its work dir can be written.

    Args:
        path: A config file.
        work_dir: Where logs and checkpoints go. Default: the config's own, else ``work_dirs/<folder>/<name>``, because
            UperNet and Semantic FPN have configs of the same name.
        data_root: Root of the data set of every dataloader.
        launcher: 'none', or how the processes of a distributed run were started: 'pytorch', 'slurm' or 'mpi'.
        cfg_options: Further changes, ``{'model.backbone.with_cp': True}``. They go last and win, but for
            ``work_dir``, which is set by the argument of that name.

    Raises:
        UserError: no such file, one that cannot be read as a config, a work dir that cannot be written, or processes
            that were started in another way than the launcher's.
    """
    cfg = read_config(path)
    path = Path(cfg.filename)
    _check_launcher(launcher)
    cfg.launcher = launcher
    override(cfg, data_root, cfg_options)
    default = cfg.get('work_dir') or Path('work_dirs', path.absolute().parent.name, path.stem)
    cfg.work_dir = str(work_dir or default)
    if process_number(launcher) == 0:  # the others write nothing
        _check_writable(Path(cfg.work_dir))
    return cfg


def _check_launcher(launcher: str) -> None:
    if launcher in _LAUNCHERS:
        program, *variables = _LAUNCHERS[launcher]
        if lacking := [name for name in variables if name not in os.environ]:
            raise UserError(f'--launcher {launcher} needs its processes started by {program}: {lacking[0]} is not set')
    elif 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ['WORLD_SIZE']) > 1:
        raise UserError(f'torchrun has started {os.environ["WORLD_SIZE"]} processes: add --launcher pytorch')


def override(cfg: Config, data_root: str | Path | None = None, cfg_options: dict | None = None) -> None:
    """Set the data root and other parts of a config, as :func:`load_config` does.

    Raises:
        UserError: the options do not fit the config.
    """
    if data_root is not None:
        set_data_root(cfg, data_root)
    if cfg_options:
        try:
            cfg.merge_from_dict(cfg_options)
        except (KeyError, TypeError, IndexError, ValueError, AssertionError) as error:
            raise UserError(f'--cfg-options do not fit the config: {error}') from error


def fit_to_device(cfg: Config) -> None:
    """On a CPU, turn SyncBN, which needs a GPU, into BN, and let the processes of a run talk over gloo.

    mmengine's own start of a distributed run assumes a GPU in each process, and so does its default model wrapper.

    Raises:
        UserError: there is no GPU for a launcher other than torchrun, or the processes do not find each other.
    """
    if get_device() != 'cpu':
        return
    _replace_type(cfg.model, 'SyncBN', 'BN')
    launcher = cfg.get('launcher', 'none')
    if launcher in ('slurm', 'mpi'):
        raise UserError(f'--launcher {launcher} needs a GPU in each process, and there is none: on CPUs use torchrun')
    if launcher == 'pytorch' and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group('gloo')
        except (RuntimeError, ValueError) as error:
            raise UserError(f'the processes of the run do not find each other: {one_line(error)}') from error
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


def world_size(cfg: Config) -> int:
    """How many processes a run of this config has, also before they have met."""
    launcher = cfg.get('launcher', 'none')
    return 1 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][2]])


def process_number(launcher: str) -> int:
    """Which of a run's processes this is, from 0 on, also before they have met."""
    return 0 if launcher == 'none' else int(os.environ[_LAUNCHERS[launcher][1]])


def set_data_root(cfg: Config, data_root: str | Path) -> None:
    """Set the root of the data set of every dataloader, also inside wrappers such as RepeatDataset."""
    for split in ('train', 'val', 'test'):
        _set_data_root(cfg.get(f'{split}_dataloader'), str(data_root))


def _set_data_root(node, data_root: str) -> None:
    for child in _children(node):
        if isinstance(child, dict) and 'data_root' in child:
            child['data_root'] = data_root
        _set_data_root(child, data_root)


def _replace_type(node, old: str, new: str) -> None:
    for child in _children(node):
        if isinstance(child, dict) and child.get('type') == old:
            child['type'] = new
        _replace_type(child, old, new)


def _children(node) -> list:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, (list, tuple)) else []


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'cannot write to {folder.absolute()} ({error.strerror}): choose another --work-dir') from error
