"""Save checkpoints in a run that may be killed, or run out of disk, at any moment."""

from __future__ import annotations

import errno
import inspect
import tempfile
from collections import deque
from numbers import Real
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.distributed import any_rank
from mmseg_inceptionnext.errors import UserError, did_you_mean
from mmseg_inceptionnext.files import atomic_write, remove_partial_checkpoints
from mmseg_inceptionnext.training.resume import belongs_to


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, which always keeps a complete checkpoint on disk, from the first save on.

    mmengine removes an old checkpoint before it writes the new one, and writes ``last_checkpoint`` in place. Here the
    new file is written atomically (by :class:`~mmseg_inceptionnext.SafeRunner`), then ``last_checkpoint`` names it,
    then the old one is removed. If writing fails, the run logs it, keeps what it has, and tries again at the next
    interval and at its end.

    Raises:
        UserError: The last checkpoint of the run cannot be written.
    """

    def before_train(self, runner) -> None:
        # A resumed checkpoint lists older and best ones. It can list anything, and may have been moved: only those in
        # this run's folder are removed for newer ones.
        info = runner.message_hub.runtime_info
        ids = info.pop('keep_ckpt_ids', [])
        source = runner.resumed_from
        is_its_own = not source or self.out_dir or belongs_to(source, runner.work_dir)
        ids = [step for step in ids if isinstance(step, int)] if isinstance(ids, list) and is_its_own else []
        info['keep_ckpt_ids'] = ids
        super().before_train(runner)
        for key in [key for key in info if key.startswith('best_ckpt')]:
            name, score = Path(str(info[key])).name, info.get(key.replace('ckpt', 'score', 1))
            path = self.file_backend.join_path(self.out_dir, name)
            if name.startswith('best_') and isinstance(score, Real) and self.file_backend.isfile(path):
                info[key] = path
                continue
            if name.startswith('best_'):
                runner.logger.warning(f'{path}, the best so far ({score}), is not there: the best from here on is kept')
            del info[key]
            info.pop(key.replace('ckpt', 'score', 1), None)
        self._read_best_from_hub(runner)

        self._unsaved: OSError | None = None
        self._is_read_back = False
        if runner.resumed_from:
            self.last_ckpt = runner.resumed_from
        if is_main_process():
            remove_partial_checkpoints(Path(self.out_dir))

    def after_train(self, runner) -> None:
        stopped_early = runner.iter < runner.max_iters
        if self._unsaved or stopped_early:
            self.save(runner, runner.iter)
        if self._unsaved:
            fault = f'{self.out_dir} cannot be written ({self._unsaved.strerror})'
            if kept := self._save_elsewhere(runner):
                raise UserError(
                    f'{fault}; the last checkpoint is kept as {kept}: free space or choose another work_dir=DIR, then '
                    f'start again with resume={str(kept)!r}'
                )
            raise UserError(
                f'the last iterations are lost: {fault}; {runner.last_checkpoint}: free space, then start again with '
                'resume=True'
            )
        super().after_train(runner)

    def save(self, runner, iteration: int) -> None:
        """Save a checkpoint now, unless this iteration has one.

        A run that counts epochs saves none: mmengine resumes from whole epochs only.
        """
        path = Path(self.out_dir, self.filename_tmpl.format(iteration)).absolute()
        if not self.by_epoch and (self._unsaved or Path(self.last_ckpt or '').absolute() != path):
            self._save_checkpoint_with_step(runner, iteration, dict(epoch=runner.epoch, iter=iteration))

    def _save_elsewhere(self, runner) -> Path | None:
        """Save the last iteration in the temporary folder; return None where that cannot be written either."""
        path = Path(tempfile.gettempdir(), f'{Path(self.out_dir).name}_{runner.timestamp}_iter_{runner.iter}.pth')
        failed = False
        try:
            self._write(runner, str(path.parent), path.name, dict(epoch=runner.epoch, iter=runner.iter))
        except OSError:
            failed = True
        return None if any_rank(failed) else path

    def _write(self, runner, folder: str, name: str, meta: dict) -> None:
        runner.save_checkpoint(
            folder, name, self.file_client_args, self.save_optimizer, self.save_param_scheduler, meta,
            self.by_epoch, self.backend_args, **self.args,
        )  # fmt: skip

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))
        hub, before = runner.message_hub, dict(runner.message_hub.runtime_info)
        # Set before saving: they are part of the checkpoint.
        hub.update_info('last_ckpt', path)
        if self.max_keep_ckpts > 0:
            ids = [*(i for i in self.keep_ckpt_ids if i != step), step]
            hub.update_info('keep_ckpt_ids', ids[-self.max_keep_ckpts :])
        failure = None
        try:
            self._write(runner, self.out_dir, self.filename_tmpl.format(step), meta)
            if is_main_process():
                with atomic_write(Path(runner.work_dir, 'last_checkpoint'), durable=True) as partial:
                    partial.write_text(path)
        except OSError as error:
            failure = error
        # All ranks must agree, to try again together: under FSDP each holds a shard.
        if any_rank(failure is not None):
            _restore(hub, before)
            self._unsaved = failure or OSError(errno.EIO, 'in another process')
            runner.logger.error(
                f'{path} cannot be written ({self._unsaved.strerror}); {runner.last_checkpoint}. '
                'The next attempt is at the next interval'
            )
            return
        self._unsaved, self.last_ckpt = None, path
        if not self._is_read_back and is_main_process() and isinstance(self.file_backend, LocalBackend):
            self._is_read_back = True
            try:
                read_checkpoint(path, mmap=True)
            except UserError as error:
                runner.logger.error(f'The checkpoint that this run saves could not be resumed from: {error}')
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(ids, self.max_keep_ckpts)
            for outdated in ids[: -self.max_keep_ckpts]:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        """Save the best checkpoint as mmengine does, but remove the previous one afterwards.

        mmengine does not find the previous one, because its attributes are reset.
        """
        if not self.save_best:
            return
        hub, before = runner.message_hub, dict(runner.message_hub.runtime_info)
        self.best_ckpt_path, self.best_ckpt_path_dict = None, dict.fromkeys(self.key_indicators)
        reason = ''
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            reason = error.strerror
        if any_rank(bool(reason)):
            _restore(hub, before)
            runner.logger.error(f'the best checkpoint so far cannot be written ({reason}): it is lost')
        self._read_best_from_hub(runner)
        for key, path in before.items():
            if key.startswith('best_ckpt') and path not in self.best_ckpt_path_dict.values():
                self._remove(path)

    def _read_best_from_hub(self, runner) -> None:
        """Set mmengine's attributes about the best checkpoints, for one metric or several, from the message hub."""
        if self.save_best:
            several = len(self.key_indicators) > 1
            names = {key: f'best_ckpt_{key}' if several else 'best_ckpt' for key in self.key_indicators}
            info = runner.message_hub.runtime_info
            self.best_ckpt_path_dict = {key: info.get(name) for key, name in names.items()}
            self.best_ckpt_path = None if several else info.get('best_ckpt')

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


def check_checkpoint_hook(given: dict) -> None:
    """Check the names of the arguments of mmengine's CheckpointHook, which takes others and fails when it saves.

    Raises:
        UserError: It has no such argument.
    """
    if given.get('type', 'CheckpointHook') not in ('CheckpointHook', 'SafeCheckpointHook'):
        return
    known = {'type', 'priority', *inspect.signature(CheckpointHook).parameters} - {'kwargs'}
    if odd := [key for key in given if key not in known]:
        meant = did_you_mean(odd[0], known, f'known are {", ".join(sorted(known))}')
        raise UserError(f'default_hooks.checkpoint has no {odd[0]!r}: {meant}')


def _restore(hub, runtime_info: dict) -> None:
    hub.runtime_info.clear()
    hub.runtime_info.update(runtime_info)
