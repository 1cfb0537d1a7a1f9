"""Read a config file and apply to it what a command line asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.processes import check_launcher, process_number


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
    check_launcher(launcher)
    cfg.launcher = launcher
    override(cfg, data_root, cfg_options)
    default = cfg.get('work_dir') or Path('work_dirs', path.absolute().parent.name, path.stem)
    cfg.work_dir = str(work_dir or default)
    if process_number(launcher) == 0:  # the others write nothing
        _check_writable(Path(cfg.work_dir))
    return cfg


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
    """On a CPU, turn SyncBN, which needs a GPU, into BN."""
    if get_device() == 'cpu':
        _replace_type(cfg.model, 'SyncBN', 'BN')


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
