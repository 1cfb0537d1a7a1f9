"""Find and read config files; find what they set, and the heads."""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmseg_inceptionnext.errors import MissingFile, UserError

_SCOPE = 'mmseg_inceptionnext'

# What follows the number of iterations, unless the user sets it.
SCHEDULE_KEYS = ('train_cfg.val_interval', 'default_hooks.checkpoint.interval', 'param_scheduler')
# Arguments of mmengine's parameter schedulers that count iterations.
SCHEDULER_COUNTS = (
    'begin', 'end', 'T_max', 'step_size', 'total_steps', 'total_iters', 'milestones', 'periods',
)  # fmt: skip


def read_config(path: str | Path) -> Config:
    """Read a config file as it is.

    Modules that its ``custom_imports`` names may lie beside it.

    Args:
        path: Path of a config, or name of one that the package ships, such as 'upernet/inceptionnext_t'.

    Raises:
        UserError: There is no such config, it cannot be read, or a module that it imports cannot be.
    """
    path = find_config(path)
    folder = str(path.absolute().parent)
    if folder not in sys.path and not _is_shipped(path):
        sys.path.append(folder)  # for good: workers import what they unpickle
    try:
        return _load(path)
    except Exception as error:  # a config is a program of the user's: it can raise anything
        reason = next(iter(str(error).strip().splitlines()), '')
        if error.__cause__ and isinstance(error.__cause__.__context__, UserError):  # of a module of ours
            raise error.__cause__.__context__ from error
        if isinstance(error, ImportError) and error.__cause__:  # mmengine's, whose cause names the module
            causes = (error.__cause__, error.__cause__.__context__)
            reason = ': '.join(str(cause).splitlines()[0] for cause in causes if str(cause or ''))
            raise UserError(
                f'{path}: custom_imports: {reason}: put the module into {folder} or on PYTHONPATH, or install it'
            ) from error
        raise UserError(f'{path} cannot be read as a config: {type(error).__name__}: {reason}') from error


def _load(path: Path) -> Config:
    """Read a config; without the marks of what it inherits by ``mmseg_inceptionnext::…``.

    mmengine puts a scope into each of those dicts, which is no argument. Our classes are in mmseg's registries anyway.
    """
    return without_scope(Config.fromfile(path))


def without_scope(cfg: Config) -> Config:
    """Remove mmengine's marks of what a config inherits from this package, in place; return the config."""
    for node in dicts_inside(cfg._cfg_dict):
        if node.get('_scope_') == _SCOPE:
            del node['_scope_']
    return cfg


def _is_shipped(path: Path) -> bool:
    return shipped_folder('configs').resolve() in path.resolve().parents


def find_config(path: str | Path) -> Path:
    """Return the path of a config, given its path or the last parts of a shipped config's path.

    Raises:
        UserError: There is none, or several shipped ones have that name.
    """
    path = Path(path)
    if path.is_file():
        return path
    wanted = Path(str(path).removesuffix('.py')).parts
    root = shipped_folder('configs')
    configs = sorted(p for p in root.rglob('*.py') if '_base_' not in p.parts)
    found = [p for p in configs if p.relative_to(root).with_suffix('').parts[-len(wanted) :] == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        names = ', '.join(str(p.relative_to(root).with_suffix('')) for p in found)
        raise UserError(f'{path} is the name of several configs: say which of {names}')
    close = difflib.get_close_matches('/'.join(wanted), recipe_names(), n=1)
    meant = f'did you mean {close[0]}?' if close else 'name a shipped one, such as upernet/inceptionnext_t'
    raise MissingFile(f'no config at {path.absolute()}: check the path, or {meant} (`train --list` prints all)')


def recipe_names() -> list[str]:
    """Return the names of all shipped configs, such as 'upernet/inceptionnext_t'."""
    root = shipped_folder('configs')
    return sorted(
        path.relative_to(root).with_suffix('').as_posix() for path in root.rglob('*.py') if '_base_' not in path.parts
    )


def shipped_folder(folder: str) -> Path:
    """Return the path of ``configs`` or ``tools``: inside the package in a wheel, beside it in a checkout.

    In a checkout ``.mim`` holds links to them, which some file systems and archives do not keep.
    """
    package = Path(__file__).parent
    inside = package / '.mim' / folder
    return inside.resolve() if inside.is_dir() else package.parent / folder


def require(cfg: Config, *keys: str) -> None:
    """Check that a config has a dict or a list under each of some keys.

    Raises:
        UserError: A key is missing.
    """
    if lacking := [key for key in keys if not isinstance(cfg.get(key), (dict, list))]:
        raise UserError(f'{cfg.filename} lacks {", ".join(lacking)}: inherit from a recipe under configs')


def own_settings(cfg: Config) -> dict[str, Any]:
    """Return what a config file sets otherwise than the files that it inherits from.

    Everything, if it inherits from none, as the config that a run saves.
    """
    path = Path(cfg.filename).resolve()
    if _is_shipped(path):
        return {}  # a recipe
    bases = Config._get_base_files(str(path))  # evaluates `_base_`, which may be an expression
    if not bases:
        return cfg.to_dict()
    bases = [base if '::' in base else str(path.parent / base) for base in bases]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'bases.py')
        file.write_text(f'_base_ = {bases!r}\n', encoding='utf-8')
        inherited = _load(file)
    return _difference(cfg.to_dict(), inherited.to_dict())


def _difference(ours: dict, theirs: dict) -> dict:
    changed = {}
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(value, other):
                changed[key] = inner
        elif value != other:
            changed[key] = value
    return changed


def dotted_keys(settings: Mapping[str, Any]) -> set[str]:
    """Return the keys of all settings in nested dicts, such as 'train_cfg.max_iters'."""
    keys = set()
    for key, value in settings.items():
        inner = dotted_keys(value) if isinstance(value, Mapping) else set()
        keys |= {f'{key}.{name}' for name in inner} or {key}
    return keys


def dicts_inside(node: Any) -> Iterator[dict]:
    """Yield all dicts inside a part of a config, itself included; what is yielded may be changed."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from dicts_inside(child)


def is_classifier(cfg: Config) -> bool:
    """Return whether the model of a config is a classifier of mmpretrain, not a segmentor."""
    model = cfg.get('model') or {}
    return 'head' in model and 'decode_head' not in model


def require_segmentor(cfg: Config) -> None:
    """Check that a config is not of a classifier, which this package only trains and tests.

    Raises:
        UserError: It is.
    """
    if is_classifier(cfg):
        raise UserError(f'{cfg.filename} is the config of a classifier: name that of a segmentor')


def pretrained_source(model: ConfigDict) -> str | None:
    """Return where a model's config takes ImageNet weights from: those of a backbone, or of a whole classifier."""
    found = (model.get('init_cfg'), model.backbone.get('init_cfg'))
    return next((cfg['checkpoint'] for cfg in found if cfg and 'checkpoint' in cfg), None)


def heads(model: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every head of a model's config and the key that it stands under; of cascades, and auxiliary ones."""
    for name in ('decode_head', 'auxiliary_head'):
        found = model.get(name) or []
        yield from ((name, head) for head in (found if isinstance(found, list) else [found]))
