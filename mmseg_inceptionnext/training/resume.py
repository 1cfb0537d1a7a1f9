"""Where a run goes on: its newest checkpoint that is whole and fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmseg_inceptionnext.checkpoints import read_checkpoint, summary
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.weights import check_fits

# What mmengine goes on from.
_PARTS = {'meta': dict, 'message_hub': dict, 'optimizer': dict, 'param_schedulers': list}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        path: The file.
        iteration, seed: Of the run, as it says.
        warnings: Which newer ones cannot be used, and why.
    """

    path: Path
    iteration: int
    seed: int | None
    warnings: list[str]


def find_resume_point(cfg: Config, checkpoint: str | Path | None = None) -> ResumePoint | None:
    """The checkpoint that a run of a config goes on from, read and compared with the config.

    Args:
        cfg: A whole config, fit to the device.
        checkpoint: This one; by default the newest in the work dir that can be used.

    Returns:
        None if there is no checkpoint in the work dir.

    Raises:
        UserError: the named one, or none of those that are there, can be used.
    """
    candidates = [Path(checkpoint)] if checkpoint else _newest_first(Path(cfg.work_dir))
    warnings: list[str] = []
    for path in candidates:
        try:
            meta = _read_resumable(path, cfg)['meta']
        except UserError as error:
            warnings.append(str(error))
            continue
        if warnings:
            newest = _iteration(candidates[0])
            lost = f'{newest - meta["iter"]} iterations are lost' if newest else 'iterations are lost'
            warnings.append(f'going on from {path} instead: {lost}')
        return ResumePoint(path, meta['iter'], meta.get('seed'), warnings)
    if checkpoint and (beside := [path for path in _newest_first(Path(checkpoint).parent) if path != candidates[0]]):
        warnings[0] += f'; --resume {beside[0]} is the one before'
    if warnings:
        raise UserError('; '.join(warnings))
    return None


def _newest_first(folder: Path) -> list[Path]:
    """What ``last_checkpoint`` names, though the folder may have been moved, and those before it.

    Later ones are left from another run.
    """
    pointer = folder / 'last_checkpoint'
    named = Path(pointer.read_text(errors='replace').replace('\0', '').strip()) if pointer.is_file() else Path()
    last = folder / named.name if (folder / named.name).is_file() or not named.is_file() else named
    found = sorted(last.parent.glob('iter_*.pth') if named.name else folder.glob('iter_*.pth'), key=_iteration)[::-1]
    return [last, *(path for path in found if _iteration(path) < _iteration(last))] if named.name else found


def _iteration(path: Path) -> int:
    number = re.fullmatch(r'iter_(\d+)\.pth', path.name)
    return int(number[1]) if number else 0


def _read_resumable(path: Path, cfg: Config) -> dict:
    """A checkpoint with all that a run needs, in the shapes of its model and optimizer."""
    content = read_checkpoint(path)
    lacking = [key for key, kind in _PARTS.items() if not isinstance(content.get(key), kind)]
    if lacking:
        raise UserError(f'{path} cannot be resumed, it lacks {", ".join(lacking)}: start anew with --weights')
    iteration, epoch, seed = (content['meta'].get(key) for key in ('iter', 'epoch', 'seed'))
    if not all(isinstance(number, int) and number >= 0 for number in (iteration, epoch, seed or 0)):
        raise UserError(f'{path} cannot be resumed, it does not say at which iteration of which seed it was saved')
    if iteration > (last := cfg.train_cfg.get('max_iters', iteration)):
        raise UserError(
            f'{path} is of iteration {iteration}, past train_cfg.max_iters={last}: raise that, or start anew'
        )
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = MODELS.build(cfg.model)
    check_fits(model, content, path, ARCHS)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    try:
        wrapper.load_state_dict(content['optimizer'])
        for parameter, state in wrapper.optimizer.state.items():
            shapes = {value.shape for value in state.values() if getattr(value, 'ndim', 0)}
            if shapes - {parameter.shape}:
                raise ValueError('the shapes of its state differ')
    except Exception as error:  # what is in a file can be anything
        raise UserError(
            f'{path} cannot be resumed, its optimizer does not fit the config ({summary(error)})'
        ) from error
    return content
