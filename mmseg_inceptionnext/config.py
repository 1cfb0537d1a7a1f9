"""Load a config, fit it to a data set, override parts of it, and say what is wrong with it."""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmseg.registry
from mmengine.config import Config
from mmengine.registry import Registry

from mmseg_inceptionnext.config_files import (
    SCHEDULE_KEYS,
    SCHEDULER_COUNTS,
    dicts_inside,
    dotted_keys,
    find_config,
    is_classifier,
    read_config,
    require,
)
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.own_data import fit_channels, use_data_file
from mmseg_inceptionnext.distributed import check_launcher, rank
from mmseg_inceptionnext.errors import UserError, one_line
from mmseg_inceptionnext.files import make_folder

__all__ = ['find_config', 'load_config', 'override', 'read_config', 'require', 'set_data_root', 'user_error_message']


def load_config(path: str | Path, work_dir: str | Path | None = None, data_root: str | Path | None = None,
                launcher: str = 'none', cfg_options: dict | None = None,
                data: str | Path | Mapping[str, Any] | None = None) -> Config:  # fmt: skip
    """Read a config, override parts of it, and check that its work dir can be written.

    Args:
        path: Path or name of a config.
        work_dir: Folder for logs and checkpoints. Default: the config's own, else ``work_dirs/<folder>/<name>``:
            UperNet and Semantic FPN have configs of the same name.
        data_root: Root of the data set of every dataloader.
        launcher: 'none', or what started the processes of a distributed run: 'pytorch', 'slurm' or 'mpi'.
        cfg_options: Further changes, ``{'model.backbone.with_cp': True}``. They are applied last and win, except for
            ``work_dir``, which is set by the argument of that name.
        data: Data file of a data set of your own, or its content, see
            :func:`~mmseg_inceptionnext.data.data_file.read_data_file`. What follows from it is logged.

    Raises:
        UserError: There is no such config, it cannot be read, its work dir cannot be written, or the processes were
            started by something else than ``launcher``.
    """
    cfg = read_config(path)
    path = Path(cfg.filename)
    check_launcher(launcher)
    cfg.launcher = launcher
    override(cfg, data_root, cfg_options, data)
    default = cfg.get('work_dir') or Path('work_dirs', path.absolute().parent.name, path.stem)
    cfg.work_dir = str(work_dir or default)
    _check_names_are_text(cfg)
    if rank(launcher) == 0:  # the others write nothing
        _check_writable(Path(cfg.work_dir))
    return cfg


def _check_names_are_text(cfg: Config) -> None:
    """Check that a config can be saved: names of folders are bytes, and may be no UTF-8.

    Raises:
        UserError: One is not.
    """
    for node in dicts_inside(cfg._cfg_dict):
        for key, value in node.items():
            if isinstance(value, str) and re.search('[\ud800-\udfff]', value):
                if sys.getfilesystemencoding() == 'utf-8':
                    way_out = 'rename the folder, or make a link to it (ln -s) and name that'
                else:
                    way_out = 'this Python takes names for another encoding, set PYTHONUTF8=1'
                raise UserError(f'{key}={value!r} is no UTF-8, so the config could not be saved: {way_out}')


def override(cfg: Config, data_root: str | Path | None = None, cfg_options: dict | None = None,
             data: str | Path | Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Fit a config to a data set, set the data root and other parts of it, in place; see :func:`load_config`.

    Raises:
        UserError: The data file is wrong, or the options do not fit the config.
    """
    if data is not None:
        if is_classifier(cfg):
            raise UserError(
                f'data={str(data)!r} is for segmentors: a classifier takes the names of folders, data_root=DIR'
            )
        for line in use_data_file(cfg, data):
            say(line)
    if data_root is not None:
        set_data_root(cfg, data_root)
    given = dotted_keys(cfg_options or {})
    if cfg_options:
        _merge(cfg, cfg_options)
    # A power or a factor of a scheduler says nothing about its iterations.
    counts = {name for name in given if not name.startswith('param_scheduler.') or _names_a_count(name)}
    if kept := [key for key in SCHEDULE_KEYS if any(f'{name}.'.startswith(f'{key}.') for name in counts)]:
        cfg.kept_by_iters = kept  # training takes it out again
    if data is not None:
        fit_channels(cfg.model)  # of the backbone that the options may have chosen
        _merge(cfg, cfg_options or {})
        if 'train_cfg.max_iters' in given:
            cfg.pop('epochs', None)


def _names_a_count(name: str) -> bool:
    return not set(SCHEDULER_COUNTS).isdisjoint(name.split('.'))


def _merge(cfg: Config, options: dict) -> None:
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError, ValueError, AssertionError) as error:
        raise UserError(f'cfg_options={options} do not fit the config: {error}') from error


def set_data_root(cfg: Config, data_root: str | Path) -> None:
    """Set the root of the data set of every dataloader, in place, also inside wrappers such as RepeatDataset."""
    for split in ('train', 'val', 'test'):
        for node in dicts_inside(cfg.get(f'{split}_dataloader')):
            if 'data_root' in node:
                node['data_root'] = str(data_root)


def _check_writable(folder: Path) -> None:
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'cannot write to {folder.absolute()} ({error.strerror}): choose another work_dir=DIR'
        ) from error


def user_error_message(error: Exception) -> str:
    """Return a one-line message if an exception is the user's mistake; '' if it may be a bug.

    User's mistakes are :class:`~mmseg_inceptionnext.UserError` and two errors of mmengine about the config: a
    ``type`` that is not registered, and an argument that its class does not have.
    """
    if isinstance(error, UserError):
        return one_line(error)
    text = str(error.args[0]) if error.args else ''
    if isinstance(error, KeyError) and (match := re.match(r'(\S+) is not in the (?:\w+::)?(.+?) registry', text)):
        name, kind = match.groups()
        registries = [r for r in vars(mmseg.registry).values() if isinstance(r, Registry) and r.name == kind]
        known = [other for r in registries for other in (*r.module_dict, *r.parent.module_dict)]
        meant = ''.join(f' (did you mean {close}?)' for close in difflib.get_close_matches(name, known, n=1))
        return (
            f'type={name!r} in the config is not a registered {kind}{meant}: correct it, or let custom_imports import '
            'the module that registers it'
        )
    unexpected = r"(.+?)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'"
    if isinstance(error, TypeError) and (match := re.match(unexpected, text)):
        what, argument = match.groups()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # The arguments that mmengine builds an object from: only these come from the config.
            given = {'build_from_cfg': 'args', 'build_dataloader': 'dataloader_cfg'}.get(frame.f_code.co_name)
            if argument in frame.f_locals.get(given, ()):
                return f'{argument} in the config is not an argument of {what}: correct its name'
    return ''
