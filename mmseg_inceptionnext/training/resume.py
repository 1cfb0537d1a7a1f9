"""Find the checkpoint that a run resumes from: the newest one that is undamaged and fits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.optim import OptimWrapper, _ParamScheduler, build_optim_wrapper

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.errors import UserError, first_sentence
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import check_fits

# Keys that mmengine needs to resume.
_PARTS = {'meta': dict, 'message_hub': dict, 'optimizer': dict, 'param_schedulers': list}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        path: Path of the checkpoint.
        iteration, seed: Iteration and seed of the run that saved it.
        max_iters: Iterations that that run was to have; None if it does not say.
        is_averaged: Whether that run has put moving averages in the place of the trained weights, and those aside.
        warnings: Which newer checkpoints cannot be used, and why.
    """

    path: Path
    iteration: int
    seed: int | None
    max_iters: int | None
    is_averaged: bool
    warnings: list[str]


def find_resume_point(cfg: Config, checkpoint: str | Path | None = None) -> ResumePoint | None:
    """Find the checkpoint to resume from; read it and check it against the config.

    Args:
        cfg: A whole config, as the run executes it.
        checkpoint: Path of the checkpoint. Default: the newest in the work dir that can be used.

    Returns:
        None if there is no checkpoint in the work dir.

    Raises:
        UserError: The checkpoint that is named, or all that are there, cannot be used.
    """
    warnings: list[str] = []
    candidates = [Path(checkpoint)] if checkpoint else _newest_first(Path(cfg.work_dir), warnings)
    for path in candidates:
        try:
            content = _read_resumable(path, cfg)
        except UserError as error:
            warnings.append(str(error))
            continue
        meta = content['meta']
        if warnings:
            lost = max(_iteration(candidates[0]) - meta['iter'], 0)
            warnings.append(f'resuming from {path}: {lost} iterations are lost')
        info = content['message_hub'].get('runtime_info')
        last = info.get('max_iters') if isinstance(info, dict) else None
        last = last if isinstance(last, int) else None
        return ResumePoint(path, meta['iter'], meta.get('seed'), last, 'ema_state_dict' in content, warnings)
    if checkpoint and (
        others := [path for path in _newest_first(Path(checkpoint).parent, []) if path != candidates[0]]
    ):
        warnings.append(f'try resume={str(others[0])!r}, the one before')
    if candidates:
        raise UserError('; '.join(warnings))
    return None


def belongs_to(checkpoint: str | Path, work_dir: str | Path) -> bool:
    """Return whether a checkpoint is of the run in a work dir: it lies there, or could only be saved elsewhere."""
    path, folder = Path(checkpoint).expanduser(), os.path.realpath(work_dir)
    if os.path.realpath(path.parent) == folder:
        return True
    try:
        info = read_checkpoint(path, mmap=True)['message_hub']['runtime_info']
        saved = [str(value) for key, value in info.items() if key.startswith(('last_ckpt', 'best_ckpt'))]
    except (UserError, KeyError, TypeError, AttributeError):  # what cannot be resumed is said when it is tried
        return True
    return any(os.path.realpath(os.path.dirname(name)) == folder for name in saved)


def _newest_first(folder: Path, warnings: list[str]) -> list[Path]:
    """Return the checkpoint that ``last_checkpoint`` names, even if the folder was moved, then older ones.

    Newer ones belong to another run. Without ``last_checkpoint``, return all.
    """
    found = sorted(folder.glob('iter_*.pth'), key=_iteration, reverse=True)
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        return found
    named = pointer.read_text(errors='replace').strip()
    for last in (folder / os.path.basename(named), Path(named)):
        if os.path.isfile(last):  # False for what cannot be a name
            older = last.parent.glob('iter_*.pth')
            return [last, *sorted((p for p in older if _iteration(p) < _iteration(last)), key=_iteration, reverse=True)]
    if found:
        warnings.append(f'{pointer} names {named[:200]!r}, which is not there')
    return found


def _iteration(path: Path) -> int:
    number = re.fullmatch(r'iter_(\d+)\.pth', path.name)
    return int(number[1]) if number else 0


def _read_resumable(path: Path, cfg: Config) -> dict:
    """Read a checkpoint, and check that it has all that a run needs, in the shapes of its model and optimizer."""
    content = read_checkpoint(path)
    lacking = [key for key, kind in _PARTS.items() if not isinstance(content.get(key), kind)]
    if lacking:
        raise UserError(
            f'{path} cannot be resumed, it lacks {", ".join(lacking)}: start anew with weights={str(path)!r}'
        )
    iteration, epoch, seed = (content['meta'].get(key) for key in ('iter', 'epoch', 'seed'))
    if not all(isinstance(number, int) and number >= 0 for number in (iteration, epoch, seed or 0)):
        raise UserError(f'{path} cannot be resumed, its meta lacks a valid iter, epoch or seed')
    if iteration > (last := cfg.train_cfg.get('max_iters', iteration)):
        raise UserError(
            f'{path} is of iteration {iteration}, past train_cfg.max_iters={last}: raise that, or start anew'
        )
    model = build_segmentor(cfg)
    check_fits(model, content, path)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    try:
        _check_optimizer(wrapper, content['optimizer'])
        for scheduler in content['param_schedulers']:
            if shadowed := set(scheduler) & set(dir(_ParamScheduler)):
                raise ValueError(f'a scheduler has {shadowed.pop()}')
    except Exception as error:  # what is in a file can be anything
        reason = first_sentence(error)
        raise UserError(f'{path} cannot be resumed, its optimizer does not fit the config ({reason})') from error
    return content


def _check_optimizer(wrapper: OptimWrapper, state: dict) -> None:
    """Load an optimizer's state as mmengine will, and check what torch does not.

    Raises:
        Exception: Any type; the state does not fit.
    """
    for ours, theirs in zip(wrapper.optimizer.param_groups, state['param_groups'], strict=False):
        for key, value in ours.items():
            there = theirs[key]  # a KeyError names what the saved optimizer lacks
            if isinstance(value, (int, float)) != isinstance(there, (int, float)):
                raise ValueError(f'{key} is {there!r}')
    wrapper.load_state_dict(state)
    for parameter, moments in wrapper.optimizer.state.items():
        if {value.shape for value in moments.values() if getattr(value, 'ndim', 0)} - {parameter.shape}:
            raise ValueError('the shapes of its state differ')
