"""A resumed run follows its config: rates and schedules of the checkpoint give way, and it is said where they differ.

mmengine takes optimizer settings and schedules from the checkpoint, and everything else from the config.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper, _ParamScheduler

from mmseg_inceptionnext.training.schedule import schedule_text

# What changes the training of a run; not where its files lie, how it logs or how often it validates.
_SECTIONS = ('train_cfg', 'optim_wrapper', 'train_dataloader.batch_size', 'train_dataloader.dataset.pipeline', 'model')
_LEFT_OUT = ('train_cfg.val_interval', 'train_cfg.val_begin', 'train_cfg.dynamic_intervals', 'model.init_cfg',
             'model.backbone.init_cfg')  # fmt: skip
_LONGEST_VALUE = 60  # characters
_MOST_SHOWN = 8
_LONGEST_CONFIG = 1_000_000  # characters; a file can hold anything

# Attributes of mmengine's schedulers that count, and those that follow from the optimizer's settings.
_STATE = ('optimizer', 'base_values', 'last_step', '_global_step', '_last_value', 'verbose')


@dataclass
class Settings:
    """Optimizer settings and schedules as a config gives them, at iteration 0.

    Attributes:
        groups: Settings of each parameter group, without its parameters.
        schedulers: State of each scheduler.
    """

    groups: list[dict]
    schedulers: list[dict]


def settings_of(wrapper: OptimWrapper, schedulers: list[_ParamScheduler] | None) -> Settings | None:
    """Return the settings of an optimizer and its schedulers that have just been built; None for several optimizers."""
    if not isinstance(wrapper, OptimWrapper) or isinstance(schedulers, dict):
        return None
    groups = [{key: value for key, value in group.items() if key != 'params'} for group in wrapper.param_groups]
    return Settings(copy.deepcopy(groups), [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers or []])


def follow_config(wrapper: OptimWrapper, schedulers: list[_ParamScheduler] | None, config: Settings, iteration: int,
                  saved: list[dict]) -> None:  # fmt: skip
    """Put a config's settings in the place of those that a checkpoint has brought, in place, where they differ.

    The schedules are run again from iteration 0: a rate is what it would be had the run begun with this config. Where
    nothing differs, everything stays as the checkpoint has it, bit for bit. So it does with a scheduler that waits for
    metrics, whose past cannot be run again.

    Args:
        wrapper, schedulers: Those of the run, after they have been resumed.
        config: What :func:`settings_of` returned before.
        iteration: Number of iterations that the checkpoint has done.
        saved: States of the checkpoint's schedulers.
    """
    schedulers = schedulers or []
    scheduled = _scheduled(schedulers)
    for group, ours in zip(wrapper.param_groups, config.groups, strict=True):
        group.update({key: value for key, value in ours.items() if key not in scheduled})
    if any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers):
        return
    same_rates = all(
        state['base_values'] == scheduler.base_values
        for state, scheduler in zip(config.schedulers, schedulers, strict=True)
    )
    if same_rates and list(map(_arguments, config.schedulers)) == list(map(_arguments, saved)):
        return
    _run_again(wrapper.param_groups, schedulers, config, iteration)


def _scheduled(schedulers: list[_ParamScheduler]) -> set[str]:
    """Return the settings of parameter groups that schedulers change: a momentum is the first of Adam's betas."""
    names = {scheduler.param_name for scheduler in schedulers}
    return names | {'betas'} if any(getattr(scheduler, 'use_betas', False) for scheduler in schedulers) else names


def _arguments(state: dict) -> dict:
    return {key: value for key, value in state.items() if key not in _STATE}


def _run_again(groups: list[dict], schedulers: list[_ParamScheduler], config: Settings, iteration: int) -> None:
    """Step fresh schedulers to an iteration; once for all parameter groups that start alike, which are hundreds."""
    kinds = [repr(sorted(group.items())) for group in config.groups]
    distinct = list(dict.fromkeys(kinds))
    first, of_group = [kinds.index(kind) for kind in distinct], [distinct.index(kind) for kind in kinds]
    optimizers = [scheduler.optimizer for scheduler in schedulers]
    few = SimpleNamespace(param_groups=[dict(config.groups[i]) for i in first], _global_step=0)
    few.step = SimpleNamespace(_with_counter=True)  # mmengine looks whether the optimizer has stepped
    for scheduler, state in zip(schedulers, config.schedulers, strict=True):
        scheduler.__dict__.clear()
        scheduler.__dict__.update(copy.deepcopy(state), optimizer=few)
        scheduler.base_values = [state['base_values'][i] for i in first]
    for _ in range(iteration):
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
    for scheduler, optimizer, state in zip(schedulers, optimizers, config.schedulers, strict=True):
        scheduler.optimizer, scheduler.base_values = optimizer, state['base_values']
        scheduler._last_value = [scheduler._last_value[i] for i in of_group]
    for group, i in zip(groups, of_group, strict=True):
        group.update({name: few.param_groups[i][name] for name in _scheduled(schedulers)})


def differences(cfg: Config, checkpoint: dict) -> str:
    """Say what a config sets otherwise than that of the run that saved a checkpoint; an empty string if nothing."""
    theirs = _saved_config(checkpoint)
    if theirs is None:
        return ''
    before, now = [], []
    for key, (old, new) in _changes(theirs, _plain(cfg.to_dict())).items():
        before.append(f'{key}={_short(old)}')
        now.append(_short(new))
    if _plain(cfg.get('param_scheduler')) != theirs.get('param_scheduler'):
        before.append(f'param_scheduler={schedule_text(theirs.get("param_scheduler"))}')
        now.append(schedule_text(cfg.get('param_scheduler')))
    if not before:
        return ''
    if (more := len(before) - _MOST_SHOWN) > 0:
        before, now = [*before[:_MOST_SHOWN], f'{more} more'], [*now[:_MOST_SHOWN], '…']
    done = checkpoint['meta']['iter']
    return (
        f"The run that saved the checkpoint had {', '.join(before)}. From iteration {done} on this run's config holds: "
        f'{", ".join(now)}'
    )


def _changes(theirs: dict, ours: dict) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) of the settings under :data:`_SECTIONS` that differ."""
    found = {}

    def compare(key: str, old: Any, new: Any) -> None:
        if key in _LEFT_OUT or old == new:
            return
        if isinstance(old, dict) and isinstance(new, dict):
            for name in dict.fromkeys([*old, *new]):
                compare(f'{key}.{name}', old.get(name), new.get(name))
        else:
            found[key] = (old, new)

    for section in _SECTIONS:
        values = []
        for tree in (theirs, ours):
            for name in section.split('.'):
                tree = (tree or {}).get(name)
            values.append(tree)
        compare(section, *values)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f'{text[:_LONGEST_VALUE]}…'


def _plain(value: Any) -> Any:
    """Return a value of a config with lists in the place of tuples, as the text of a saved config has them or not."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _saved_config(checkpoint: dict) -> dict | None:
    """Return the settings in the text of the config that a checkpoint holds; None if it holds none.

    The text is a program, which is not run: only literals and calls of ``dict`` are read.
    """
    text = checkpoint['meta'].get('cfg')
    try:
        tree = ast.parse(text) if isinstance(text, str) and len(text) <= _LONGEST_CONFIG else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None:
        return None
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _plain(_literal(node.value))
            except (ValueError, TypeError, RecursionError):
                continue
    return found


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)
