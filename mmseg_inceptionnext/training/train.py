"""Train a segmentor from a config."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmengine.runner import ValLoop
from mmseg.registry import HOOKS, LOOPS, MODELS

from mmseg_inceptionnext.checkpoints import read_checkpoint
from mmseg_inceptionnext.config import fit_to_device, require
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.processes import meet, process_number
from mmseg_inceptionnext.training.batch import effective_batch, use_auto_batch
from mmseg_inceptionnext.training.dry_run import Plan, dry_run
from mmseg_inceptionnext.training.fsdp import use_fsdp
from mmseg_inceptionnext.training.mixed_precision import use_mixed_precision
from mmseg_inceptionnext.training.resume import ResumePoint, find_resume_point
from mmseg_inceptionnext.training.runner import SafeFlexibleRunner, SafeRunner, Safety
from mmseg_inceptionnext.weights import check_fits


def train(
    cfg: Config,
    weights: str | None = None,
    resume: str | bool = False,
    amp: bool = False,
    seed: int | None = None,
    auto_batch: bool = False,
    skip_bad_images: bool = False,
    strategy: str = 'ddp',
) -> Safety:
    """Run the training loop of a config, with its validations.

    Args:
        cfg: A whole config, with ``work_dir`` set.
        weights: The backbone's checkpoint instead of the config's, see
            :func:`mmseg_inceptionnext.weights.load_pretrained`; 'none' trains from scratch.
        resume: A checkpoint to go on from, or True for the newest in the work dir that is whole. Where there is none
            yet, the run starts from the beginning, so that a job script can always ask to resume.
        amp: Mixed precision, see :func:`use_mixed_precision`.
        seed: Of all random numbers. Default: the config's, on resuming the checkpoint's, else a random one.
        auto_batch: Accumulate gradients so that the recipe's batch holds, see
            :func:`~mmseg_inceptionnext.training.batch.use_auto_batch`.
        skip_bad_images: Replace training images that cannot be read by others, instead of stopping.
        strategy: What the processes of a distributed run hold: 'ddp', each the whole model, or 'fsdp', a share of it,
            see :class:`~mmseg_inceptionnext.training.fsdp.ShardedStrategy`.

    Returns:
        The runner, after the last iteration, or after the one in which a signal asked it to end.

    Raises:
        UserError: the data set, the weights or the checkpoint cannot be read or do not fit; or the loss is not finite.
    """
    resume = _after_restart(cfg, resume)
    runner = _prepare(cfg, weights, resume, amp, seed, auto_batch, skip_bad_images, strategy)(cfg)
    runner.train()
    return runner


def plan(cfg: Config, weights: str | None = None, resume: str | bool = False, amp: bool = False,
         seed: int | None = None, auto_batch: bool = False, skip_bad_images: bool = False,
         strategy: str = 'ddp') -> Plan:  # fmt: skip
    """What :func:`train` would do with the same arguments, and what it would cost; see :func:`dry_run`."""
    return dry_run(cfg, _prepare(cfg, weights, resume, amp, seed, auto_batch, skip_bad_images, strategy))


def summary(runner: Safety) -> dict:
    """What a run has come to.

    Returns:
        ``{'best', 'iteration', 'checkpoint', 'config'}`` of the best validation: its figure, when it was reached, its
        checkpoint, and the whole config that the run wrote beside it. Without a best one, of the last. And
        ``{'done', 'stopped_by', 'failed_validations', 'skipped'}``: the iterations that are done, which signal
        ended them early or None, why validations failed by iteration, and how often each damaged image was
        replaced, by message.
    """
    hub, work_dir = runner.message_hub, Path(runner.work_dir)
    several = '_mIoU' if 'best_ckpt_mIoU' in hub.runtime_info else ''  # figures whose best checkpoints are kept
    best, score = (hub.get_info(f'best_{what}{several}') for what in ('ckpt', 'score'))
    checkpoint = Path(best or hub.get_info('last_ckpt') or work_dir / f'iter_{runner.iter}.pth')
    iteration = re.search(r'iter_(\d+)', checkpoint.name)
    skipped = runner.skipped_images.read_text().splitlines() if runner.skipped_images.is_file() else []
    return {
        'best': score if best else None,
        'iteration': int(iteration[1]) if iteration else runner.iter,
        'checkpoint': checkpoint,
        'config': work_dir / Path(runner.cfg.filename).name,
        'done': runner.iter,
        'stopped_by': runner.stopped_by if runner.iter < runner.max_iters else None,
        'failed_validations': dict(getattr(runner.val_loop, 'failures', {})),
        'skipped': dict(Counter(skipped)),
    }


def _prepare(cfg: Config, weights: str | None, resume: str | bool, amp: bool, seed: int | None,
             auto_batch: bool, skip_bad_images: bool, strategy: str) -> Callable[[Config], Safety]:  # fmt: skip
    """Check and change a config as :func:`train` is asked to, and say what makes its runner."""
    require(cfg, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if resume == '':
        raise UserError('--resume names no checkpoint: leave the name out to go on from the newest')
    if cfg.train_cfg.get('by_epoch') or 'Epoch' in str(cfg.train_cfg.get('type')):
        raise UserError('train_cfg counts epochs: runs here are counted, saved and resumed by iterations')
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f'--seed {seed} must be from 0 to {2**32 - 1}')
    for section, key in (('train_dataloader', 'batch_size'), ('train_cfg', 'max_iters'), ('train_cfg', 'val_interval')):
        value = cfg[section].get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise UserError(f'{section}.{key}={value!r} must be a positive whole number')
    check_data(cfg, 'train', 'val')
    fit_to_device(cfg)
    meet(cfg)
    if weights is not None:
        cfg.model.backbone.init_cfg = None if weights == 'none' else dict(type='Pretrained', checkpoint=weights)
    if amp:
        use_mixed_precision(cfg)
    if seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)

    if strategy == 'fsdp':
        use_fsdp(cfg)
    if skip_bad_images:
        cfg.skip_bad_images = True
    if auto_batch:
        use_auto_batch(cfg)
    elif warning := effective_batch(cfg).warning:
        print_log(warning, logger='current', level=logging.WARNING)

    _use_safe_parts(cfg)
    point = find_resume_point(cfg, None if resume is True else resume) if resume else None
    if point is not None:
        return partial(_resumed_runner, point=point)
    if resume:
        print_log(f'No checkpoint in {cfg.work_dir} yet: training starts from the beginning', logger='current')
    return _new_runner


def _after_restart(cfg: Config, resume: str | bool) -> str | bool:
    """What to go on from where torchrun has started the processes again, after one of them had died.

    That is the last checkpoint of this run, if it has come to one; else what was asked for at first. A work dir can
    hold checkpoints of other runs: this one's are not older than a file that its first start writes.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return resume
    run, started = os.environ['TORCHELASTIC_RUN_ID'], Path(cfg.work_dir, '.started_by_torchrun')
    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        if process_number(cfg.launcher) == 0:
            started.write_text(run)
        return resume
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    is_own = (
        started.is_file()
        and started.read_text() == run
        and pointer.is_file()
        and pointer.stat().st_mtime_ns >= started.stat().st_mtime_ns
    )
    return is_own or resume


def _use_safe_parts(cfg: Config) -> None:
    """In the place of mmengine's, which configs of other origin name or leave to it."""
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    cfg.default_hooks = {
        'checkpoint': dict(type='CheckpointHook', by_epoch=False, interval=1000), **(cfg.get('default_hooks') or {})
    }  # fmt: skip
    hook = cfg.default_hooks.checkpoint
    if hook and HOOKS.get(hook['type']) is CheckpointHook:
        hook['type'] = 'SafeCheckpointHook'
    loop = cfg.get('val_cfg')
    if loop and LOOPS.get(loop.get('type', 'ValLoop')) is ValLoop:
        loop['type'] = 'TolerantValLoop'


def _runner(cfg: Config) -> Safety:
    return (SafeFlexibleRunner if cfg.get('strategy') else SafeRunner).from_cfg(cfg)


def _agree(runner: Safety, iteration: int | None) -> None:
    """Make sure that all processes go on from the same checkpoint, or from none."""
    found = set(all_gather_object(iteration))
    if len(found) > 1:
        names = ', '.join(sorted('none' if i is None else f'iteration {i}' for i in found))
        raise UserError(
            f'the processes of the run find different checkpoints in {runner.work_dir} ({names}): it must be a folder '
            'that all machines share; where torchrun changes their number, pass --resume'
        )


def _new_runner(cfg: Config) -> Safety:
    source = cfg.get('load_from')
    if source is not None:
        # A segmentor to fine-tune. mmengine would load what happens to match.
        cfg.model.backbone.init_cfg = None
        check_fits(MODELS.build(cfg.model), read_checkpoint(source), source, ARCHS)
    runner = _runner(cfg)
    _agree(runner, None)
    if is_main_process():
        runner.skipped_images.unlink(missing_ok=True)  # of another run in this work dir
    return runner


def _resumed_runner(cfg: Config, point: ResumePoint) -> Safety:
    cfg.update(resume=False, load_from=None)
    # Everything comes from the checkpoint: pretrained weights need not be fetched only to be overwritten.
    cfg.model.backbone.init_cfg = None
    # mmengine takes the seed over only after the sampler has been built with another one.
    cfg.randomness = {'seed': point.seed, **cfg.get('randomness', {})}
    runner = _runner(cfg)
    _agree(runner, point.iteration)
    runner.go_on_from(str(point.path))
    for warning in point.warnings:
        runner.logger.warning(warning)
    if point.iteration == cfg.train_cfg.get('max_iters'):
        runner.logger.info(f'{point.path} is of the last iteration: nothing is left to train')
    return runner
