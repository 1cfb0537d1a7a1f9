"""Train a segmentor from a config."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmseg_inceptionnext.config import fit_to_device, require
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.training.batch import effective_batch, use_auto_batch
from mmseg_inceptionnext.training.dry_run import Plan, dry_run
from mmseg_inceptionnext.training.mixed_precision import use_mixed_precision
from mmseg_inceptionnext.weights import check_fits, read_checkpoint


def train(
    cfg: Config,
    weights: str | None = None,
    resume: str | bool = False,
    amp: bool = False,
    seed: int | None = None,
    auto_batch: bool = False,
) -> Runner:
    """Run the training loop of a config, with its validations.

    Args:
        cfg: A whole config, with ``work_dir`` set.
        weights: The backbone's checkpoint instead of the config's, see
            :func:`mmseg_inceptionnext.weights.load_pretrained`; 'none' trains from scratch.
        resume: A checkpoint to go on from, or True for the last one in the work dir. Where there is none yet, the run
            starts from the beginning, so that a job script can always ask to resume.
        amp: Mixed precision, see :func:`use_mixed_precision`.
        seed: Of all random numbers. Default: the config's, on resuming the checkpoint's, else a random one.
        auto_batch: Accumulate gradients so that the recipe's batch holds, see
            :func:`~mmseg_inceptionnext.training.batch.use_auto_batch`.

    Returns:
        The runner, after the last iteration.

    Raises:
        UserError: the data set, the weights or the checkpoint cannot be read or do not fit; or the loss is not finite.
    """
    runner = _prepare(cfg, weights, resume, amp, seed, auto_batch)(cfg)
    runner.train()
    return runner


def plan(cfg: Config, weights: str | None = None, resume: str | bool = False, amp: bool = False,
         seed: int | None = None, auto_batch: bool = False) -> Plan:  # fmt: skip
    """What :func:`train` would do with the same arguments, and what it would cost; see :func:`dry_run`."""
    return dry_run(cfg, _prepare(cfg, weights, resume, amp, seed, auto_batch))


def summary(runner: Runner) -> dict:
    """``{'best', 'iteration', 'checkpoint', 'config'}`` of a finished run: the best validation's figure, when it was
    reached, its checkpoint, and the whole config that the run wrote beside it. Without a best one, of the last.
    """
    hub, work_dir = runner.message_hub, Path(runner.work_dir)
    best = hub.get_info('best_ckpt')
    checkpoint = Path(best or hub.get_info('last_ckpt') or work_dir / f'iter_{runner.iter}.pth')
    iteration = re.search(r'iter_(\d+)', checkpoint.name)
    return {
        'best': hub.get_info('best_score') if best else None,
        'iteration': int(iteration[1]) if iteration else runner.iter,
        'checkpoint': checkpoint,
        'config': work_dir / Path(runner.cfg.filename).name,
    }


def _prepare(cfg: Config, weights: str | None, resume: str | bool, amp: bool, seed: int | None,
             auto_batch: bool) -> Callable[[Config], Runner]:  # fmt: skip
    """Check and change a config as :func:`train` is asked to, and say what makes its runner."""
    require(cfg, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f'--seed {seed} must be from 0 to {2**32 - 1}')
    for section, key in (('train_dataloader', 'batch_size'), ('train_cfg', 'max_iters'), ('train_cfg', 'val_interval')):
        value = cfg[section].get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise UserError(f'{section}.{key}={value!r} must be a positive whole number')
    check_data(cfg, 'train', 'val')
    fit_to_device(cfg)
    if weights is not None:
        cfg.model.backbone.init_cfg = None if weights == 'none' else dict(type='Pretrained', checkpoint=weights)
    if amp:
        use_mixed_precision(cfg)
    if seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)

    if auto_batch:
        use_auto_batch(cfg)
    elif warning := effective_batch(cfg).warning:
        print_log(warning, logger='current', level=logging.WARNING)

    checkpoint = _last_checkpoint(Path(cfg.work_dir)) if resume is True else resume or None
    if checkpoint is None:
        if resume:
            print_log(f'No checkpoint in {cfg.work_dir} yet: training starts from the beginning', logger='current')
        return _new_runner
    return partial(_resumed_runner, checkpoint=checkpoint)


def _last_checkpoint(work_dir: Path) -> Path | None:
    """What ``last_checkpoint`` names, also after the work dir was moved or is given relative to another folder."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    named = Path(pointer.read_text().strip())
    beside = work_dir / named.name
    return beside if beside.is_file() else named


def _new_runner(cfg: Config) -> Runner:
    if cfg.get('load_from') is None:
        return Runner.from_cfg(cfg)
    # A segmentor to fine-tune. mmengine would load what happens to match.
    content = read_checkpoint(cfg.load_from)
    cfg.model.backbone.init_cfg = None
    runner = Runner.from_cfg(cfg)
    check_fits(runner.model, content, cfg.load_from, ARCHS)
    return runner


def _resumed_runner(cfg: Config, checkpoint: str | Path) -> Runner:
    content = read_checkpoint(checkpoint)
    if lacking := [key for key in ('meta', 'message_hub', 'optimizer', 'param_schedulers') if key not in content]:
        raise UserError(f'{checkpoint} cannot be resumed, it lacks {", ".join(lacking)}: start anew with --weights')
    if not isinstance(content['meta'], dict) or not {'iter', 'epoch'} <= set(content['meta']):
        raise UserError(f'{checkpoint} cannot be resumed, it does not say at which iteration it was saved')
    if content['meta']['iter'] >= cfg.train_cfg.get('max_iters', float('inf')):
        print_log(f'{checkpoint} is at or past train_cfg.max_iters: nothing is left to train', logger='current')
    cfg.update(resume=True, load_from=str(checkpoint))
    # Everything comes from the checkpoint: pretrained weights need not be fetched again only to be overwritten.
    cfg.model.backbone.init_cfg = None
    # mmengine takes the seed over only after the sampler has been built with another one.
    cfg.randomness = {'seed': content['meta'].get('seed'), **cfg.get('randomness', {})}
    runner = Runner.from_cfg(cfg)
    check_fits(runner.model, content, checkpoint, ARCHS)
    return runner
