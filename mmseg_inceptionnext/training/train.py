"""Train a segmentor: check the config, apply the options to it, make the runner, run it."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.registry import OPTIMIZERS

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config_files import is_classifier, pretrained_source, require
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.check import check_data, open_dataset
from mmseg_inceptionnext.data.class_weights import check_class_weights, read_counts, use_class_weights
from mmseg_inceptionnext.data.ignore_index import use_one_ignore_index
from mmseg_inceptionnext.data.inspection import inspect_data
from mmseg_inceptionnext.data.pipeline import leaf_datasets
from mmseg_inceptionnext.device import available_cores, keep_freed_memory
from mmseg_inceptionnext.distributed import init_process_group, rank
from mmseg_inceptionnext.errors import UserError, first_sentence
from mmseg_inceptionnext.files import write_text
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import check_fits, load_for_finetuning
from mmseg_inceptionnext.training.agreement import check_agreement
from mmseg_inceptionnext.training.batch import effective_batch, split_recipe_batch
from mmseg_inceptionnext.training.dry_run import Plan, dry_run
from mmseg_inceptionnext.training.fsdp import check_fsdp
from mmseg_inceptionnext.training.hooks.checkpoint import check_checkpoint_hook
from mmseg_inceptionnext.training.mixed_precision import amp_optim_wrapper, check_amp
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.resume import ResumePoint, belongs_to, find_resume_point
from mmseg_inceptionnext.training.runner import FaultTolerantMixin, SafeFlexibleRunner, SafeRunner, check_backends
from mmseg_inceptionnext.training.schedule import schedule_warning, set_iterations, stretch_ends
from mmseg_inceptionnext.training.work_dir_lock import holder, locked


def train(cfg: Config, options: TrainOptions = TrainOptions()) -> FaultTolerantMixin:
    """Run the training loop of a config, with its validations.

    Args:
        cfg: A whole config, with ``work_dir`` set; :func:`apply` changes it.
        options: Options of the run.

    Returns:
        The runner, after the last iteration, or after the one in which a signal asked it to stop.

    Raises:
        UserError: The data set, the weights or the checkpoint cannot be read or do not fit; or the loss is not finite.
    """
    _start(cfg, options)
    with locked(cfg.work_dir):
        options = resume_if_restarted(cfg, options)
        if text := _occupied(cfg, options):
            raise UserError(text)
        runner = make_runner(cfg, apply(cfg, options), keep_checkpoints=bool(options.resume) and not options.overwrite)
        runner.train()
    return runner


def plan(cfg: Config, options: TrainOptions = TrainOptions()) -> Plan:
    """Return what :func:`train` would do with the same arguments, and its cost; keep nothing."""
    _start(cfg, options)
    if is_main_process() and (text := holder(cfg.work_dir) or _occupied(cfg, options)):
        say(text, logging.WARNING)
    point = apply(cfg, options)
    return dry_run(cfg, lambda changed: make_runner(changed, point))


def _start(cfg: Config, options: TrainOptions) -> None:
    check(cfg, options)
    init_process_group(cfg.get('launcher', 'none'), cfg.get('env_cfg', {}).get('dist_cfg'))
    if get_device() == 'cpu':
        keep_freed_memory()


def check(cfg: Config, options: TrainOptions) -> None:
    """Check that a config can be trained with some options; change nothing.

    Raises:
        UserError: It cannot.
    """
    require(cfg, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if options.resume == '':
        raise UserError("resume='' names no checkpoint: resume=True resumes from the newest")
    if cfg.train_cfg.get('by_epoch') or 'Epoch' in str(cfg.train_cfg.get('type')):
        raise UserError('train_cfg counts epochs: set train_cfg.type to IterBasedTrainLoop, and max_iters')
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise UserError(f'seed={options.seed} must be from 0 to {2**32 - 1}')
    if options.finetune and options.weights:
        raise UserError('finetune=FILE brings the backbone, too: drop weights')
    if options.finetune and options.strategy == 'fsdp':
        raise UserError("finetune=FILE goes with strategy='ddp' alone")
    if options.class_weights not in (None, 'auto'):
        raise UserError(f"class_weights={options.class_weights!r} is not 'auto'")
    for name in ('epochs', 'iters', 'early_stop'):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f'{name}={value} must be a positive whole number')
    if options.epochs and options.iters:
        raise UserError(f'epochs={options.epochs} and iters={options.iters} both say how long to train: drop one')
    if is_classifier(cfg):
        _check_for_classifier(options)
    check_agreement(cfg)
    _check_optimizer(cfg.optim_wrapper.get('optimizer'))
    check_checkpoint_hook((cfg.get('default_hooks') or {}).get('checkpoint') or {})
    if not options.class_weights:
        check_class_weights(cfg.model)
    check_backends(cfg.get('visualizer'))
    check_data(cfg, 'train', 'val')
    if options.amp:
        check_amp(cfg)
    if options.strategy == 'fsdp':
        check_fsdp(cfg)
    if options.auto_batch:
        split_recipe_batch(cfg)


def _check_optimizer(optimizer: dict | None) -> None:
    try:
        if optimizer:
            OPTIMIZERS.build(dict(optimizer, params=[torch.nn.Parameter(torch.zeros(1))]))
    except (TypeError, ValueError) as error:  # torch's, of a value that it does not take
        raise UserError(f'optim_wrapper.optimizer={dict(optimizer)}: {first_sentence(error)}') from error


def _check_for_classifier(options: TrainOptions) -> None:
    if options.finetune:
        raise UserError(
            f'finetune={options.finetune!r} is for segmentors: a classifier starts from another, whatever its classes, '
            f'with weights={options.finetune!r}'
        )
    if options.class_weights:
        raise UserError(f'class_weights={options.class_weights!r} is for segmentors: drop it')
    if options.strategy == 'fsdp':
        raise UserError("strategy='fsdp' is for segmentors: the largest classifier has 87 M parameters, drop it")


def _occupied(cfg: Config, options: TrainOptions) -> str:
    """Say that the work dir has checkpoints of another run which this one would replace unasked; '' if it has none."""
    is_its_own = options.resume and (options.resume is True or belongs_to(options.resume, cfg.work_dir))
    there = [] if is_its_own or options.overwrite else _checkpoints(cfg.work_dir)
    if not there:
        return ''
    return (
        f'{cfg.work_dir} has checkpoints of another run, such as {there[0].name}: pass resume=True to go on with it, '
        'overwrite=True to replace them, or choose another work_dir=DIR'
    )


def _checkpoints(work_dir: str | Path) -> list[Path]:
    """Return the files by which a run can be resumed or tested, newest first."""
    found = [path for pattern in ('iter_*.pth', 'best_*.pth') for path in Path(work_dir).glob(pattern)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def apply(cfg: Config, options: TrainOptions) -> ResumePoint | None:
    """Change a checked config, in place, into what the run executes and saves.

    Nothing else changes it. What depends on the machine stays out of it, so that the saved config works elsewhere:
    SyncBN becomes BN where the model is built, and the runner replaces mmengine's hooks, loops and model wrapper.

    Returns:
        The checkpoint to resume from; None to start from the beginning.

    Raises:
        UserError: There are checkpoints to resume from, and none of them can be used.
    """
    use_one_ignore_index(cfg)
    if options.weights is not None:
        pretrained = dict(type='Pretrained', checkpoint=options.weights)
        part = cfg.model if cfg.model.type == 'ImageNetClassifier' else cfg.model.backbone  # which check what they load
        part.init_cfg = None if options.weights == 'none' else pretrained
    if options.amp:
        cfg.optim_wrapper.update(amp_optim_wrapper())
    if options.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=options.seed)
    if options.strategy == 'fsdp':
        cfg.strategy = dict(type='ShardedStrategy')
    if options.skip_bad_images:
        cfg.skip_bad_images = True
    if options.auto_batch:
        batch, micro_batch = split_recipe_batch(cfg)
        cfg.train_dataloader.batch_size = batch
        cfg.optim_wrapper.accumulative_counts = batch // micro_batch
        cfg.train_cfg.update(type='AccumulatingTrainLoop', micro_batch_size=micro_batch)
    elif warning := effective_batch(cfg).warning:
        say(warning, logging.WARNING)
    set_iterations(cfg, options)
    if options.finetune:
        cfg.finetune = options.finetune
    if options.class_weights:
        use_class_weights(cfg, _class_pixels(cfg))
    hooks = _optional_hooks(cfg, options)
    replaced = {hook['type'] for hook in hooks}  # of a config that an earlier run with these options has saved
    cfg.custom_hooks = [*(hook for hook in cfg.get('custom_hooks') or [] if hook['type'] not in replaced), *hooks]
    cfg.default_hooks = {
        'checkpoint': dict(type='CheckpointHook', by_epoch=False, interval=1000), **(cfg.get('default_hooks') or {})
    }  # fmt: skip

    point = None
    if options.resume:
        point = find_resume_point(cfg, None if options.resume is True else options.resume)
        if point is None:
            say(f'No checkpoint in {cfg.work_dir} yet: training starts from the beginning')
        elif point.max_iters:
            stretch_ends(cfg, point.max_iters)
    if warning := schedule_warning(cfg):
        say(warning, logging.WARNING)
    if point is None:
        return None
    # mmengine restores the seed only after it has built the sampler with another one.
    asked = cfg.get('randomness', {}).get('seed')
    if None not in (asked, point.seed) and asked != point.seed:
        say(
            f'seed {point.seed} of the checkpoint holds, not {asked}: a resumed run goes on with its seed',
            logging.WARNING,
        )
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': point.seed if point.seed is not None else asked}
    if point.is_averaged and not any('EMAHook' in str(hook['type']) for hook in cfg.custom_hooks):
        say(
            f'{point.path} holds the averaged weights of a run with ema=True, from which this one goes on without '
            'averaging: pass `--ema` to go on as it was',
            logging.WARNING,
        )
    return point


def _class_pixels(cfg: Config) -> dict[str, int]:
    """Return the pixels of each class in the training masks: those that `check` has kept, or count them."""
    pixels = [None]
    if is_main_process():
        pixels = [read_counts(cfg)]
        if pixels[0] is None:
            say('counting the pixels of each class …')
            found = inspect_data(cfg, available_cores(), splits=('train',))
            pixels = [{name: count['pixels'] for name, count in found.splits['train'].classes.items()}]
    broadcast_object_list(pixels)
    return pixels[0]


def _optional_hooks(cfg: Config, options: TrainOptions) -> list[dict]:
    hooks = []
    if options.ema:
        # Over the last tenth of the run so far, and 2000 iterations at most: short runs forget their start, too.
        hooks.append(dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.0005, gamma=10))
    if options.early_stop:
        checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        monitor, rule = checkpoint.get('save_best') or 'mIoU', checkpoint.get('rule') or 'greater'
        rule = rule[0] if isinstance(rule, (list, tuple)) else rule
        monitor = monitor[0] if isinstance(monitor, (list, tuple)) else 'mIoU' if monitor == 'auto' else monitor
        hooks.append(
            dict(type='EarlyStoppingHook', monitor=monitor, rule=rule, min_delta=0.0, patience=options.early_stop)
        )
    return hooks


def make_runner(cfg: Config, point: ResumePoint | None, keep_checkpoints: bool = True) -> FaultTolerantMixin:
    """Build the runner of a config that :func:`apply` has changed.

    Args:
        cfg: The config.
        point: The checkpoint to resume from; None to start from the beginning.
        keep_checkpoints: Leave those of another run, which this one does not resume, in the work dir.

    Raises:
        UserError: ``load_from`` of the config does not fit, or the ranks found different checkpoints.
    """
    source = cfg.get('load_from')
    if point is None and source is not None:  # to fine-tune; mmengine would silently load a partial match
        try:
            check_fits(build_segmentor(cfg), read_checkpoint(source), source)
        except UserError as error:
            raise UserError(f'load_from: {error}; finetune={str(source)!r} takes over what fits') from error
    if point is None and cfg.get('finetune'):  # an early error
        names = open_dataset(leaf_datasets(cfg.train_dataloader.dataset)[0]).metainfo['classes']
        load_for_finetuning(build_segmentor(cfg), cfg.finetune, names)
    runner = (SafeFlexibleRunner if cfg.get('strategy') else SafeRunner).from_cfg(cfg)
    _check_same_on_all_ranks(point, runner.work_dir)
    if point is None:
        if is_main_process():
            runner.skipped_images.unlink(missing_ok=True)  # left by an earlier run
            sources = (source, cfg.get('finetune'), pretrained_source(cfg.model))
            needed = {os.path.realpath(path) for path in sources if path}
            there = [path for path in _checkpoints(runner.work_dir) if os.path.realpath(path) not in needed]
            if there and keep_checkpoints:
                say(f'{there[0]}, of an earlier run, is kept, but no run can be resumed from it', logging.WARNING)
            elif not keep_checkpoints:
                for path in (*there, Path(runner.work_dir, 'last_checkpoint')):
                    path.unlink(missing_ok=True)
        return runner
    runner.resume_from(str(point.path))
    for warning in point.warnings:
        runner.logger.warning(warning)
    if point.iteration == cfg.train_cfg.get('max_iters'):
        runner.logger.info(f'{point.path} is of the last iteration: nothing is left to train')
    return runner


def run_result(runner: FaultTolerantMixin) -> dict:
    """Return the result of a run.

    Returns:
        A dict. 'metric', 'best': name and best value of the metric that selects the best checkpoint. 'iteration',
        'checkpoint': those of the best validation, or the last ones if there is none. 'config': path of the config
        that the run saved. 'done': number of iterations done. 'stopped_by': signal that stopped the run early, or
        None. 'failed_validations': reason by iteration. 'skipped': number of replacements by message.
    """
    hub, work_dir = runner.message_hub, Path(runner.work_dir)
    metrics = getattr(runner.checkpoint_hook, 'key_indicators', None) or ['']
    suffix = f'_{metrics[0]}' if len(metrics) > 1 else ''
    best, score = (hub.get_info(f'best_{what}{suffix}') for what in ('ckpt', 'score'))
    checkpoint = Path(best or hub.get_info('last_ckpt') or work_dir / f'iter_{runner.iter}.pth')
    iteration = re.search(r'iter_(\d+)', checkpoint.name)
    skipped = runner.skipped_images.read_text(encoding='utf-8').splitlines() if runner.skipped_images.is_file() else []
    return {
        'metric': metrics[0],
        'best': score if best else None,
        'iteration': int(iteration[1]) if iteration else runner.iter,
        'checkpoint': checkpoint,
        'config': work_dir / Path(runner.cfg.filename).name,
        'done': runner.iter,
        'stopped_by': runner.stopped_by if runner.iter < runner.max_iters else None,
        'failed_validations': dict(getattr(runner.val_loop, 'failures', {})),
        'skipped': dict(Counter(skipped)),
    }


def resume_if_restarted(cfg: Config, options: TrainOptions) -> TrainOptions:
    """Set ``resume`` if torchrun restarted the processes and this run has written a checkpoint before.

    The first start notes which checkpoint is there: a later one is this run's, also where the clock has been set back.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return options
    run, started = os.environ['TORCHELASTIC_RUN_ID'], Path(cfg.work_dir, '.started_by_torchrun')
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    written = pointer.stat().st_mtime_ns if pointer.is_file() else None
    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        if rank(cfg.launcher) == 0:
            write_text(started, f'{run} {written}')
        return options
    noted, _, before = started.read_text(encoding='utf-8').rpartition(' ') if started.is_file() else ('', '', '')
    is_own = noted == run and written is not None and before != str(written)
    return dataclasses.replace(options, resume=True) if is_own else options


def _check_same_on_all_ranks(point: ResumePoint | None, work_dir: str) -> None:
    found = set(all_gather_object(point and point.iteration))
    if len(found) > 1:
        names = ', '.join(sorted('none' if i is None else f'iteration {i}' for i in found))
        raise UserError(
            f'the processes of the run find different checkpoints in {work_dir} ({names}): it must be a folder that '
            'all machines share; where torchrun changes their number, pass resume=True'
        )
