"""Weigh the classes in the loss by how rare they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict

from mmseg_inceptionnext.config_files import heads
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.data.pipeline import leaf_datasets
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import write_text

_COUNTS_FILE = 'class_counts.json'


def use_class_weights(cfg: Config, pixels: dict[str, int]) -> None:
    """Set ``class_weight`` of every head's cross-entropy, in place: the inverse root of the frequency, 1 on average.

    A class without pixels, which no loss ever sees, has weight 1.

    Args:
        cfg: A whole config.
        pixels: Number of pixels of each class in the training masks, in the order of the labels.

    Raises:
        UserError: A head has no cross-entropy.
    """
    counts = np.array(list(pixels.values()), float)
    there = counts > 0
    if not there.any():
        raise UserError("class_weights='auto': the training masks have no labelled pixel")
    weights = np.ones(len(counts))
    weights[there] = counts[there] ** -0.5
    weights[there] /= weights[there].mean()
    listed = [round(float(weight), 4) for weight in weights]
    for _, head in heads(cfg.model):
        weighted = [loss for loss in losses_of(head) if _is_cross_entropy(loss)]
        if not weighted:
            raise UserError(
                f"class_weights='auto': {head.type} has no CrossEntropyLoss, whose class_weight could be set"
            )
        for loss in weighted:
            loss.class_weight = listed
    ranked = [f'{name} {weight:.2f}' for weight, name in sorted(zip(listed, pixels, strict=True))]
    say(f'class weights: {", ".join(ranked if len(ranked) <= 4 else [*ranked[:2], "…", *ranked[-2:]])}')


def losses_of(head: ConfigDict) -> list[ConfigDict]:
    """Return the configs of a head's losses."""
    losses = head.get('loss_decode') or []
    return losses if isinstance(losses, list) else [losses]


def check_class_weights(model: ConfigDict) -> None:
    """Check that losses have a weight for each class.

    Raises:
        UserError: One has more or fewer.
    """
    for name, head in heads(model):
        for loss in losses_of(head):
            weights, classes = loss.get('class_weight'), head.get('num_classes')
            if isinstance(weights, (list, tuple)) and classes and len(weights) != classes:
                raise UserError(
                    f'model.{name}: class_weight of {loss.type} has {len(weights)} values for {classes} classes: '
                    "correct it, or let class_weights='auto' set it"
                )


def read_counts(cfg: Config) -> dict[str, int] | None:
    """Return the pixels of each class that :func:`keep_counts` has kept; None if the masks have changed since."""
    dataset_cfg = _only_dataset(cfg)
    file = dataset_cfg and _counts_file(dataset_cfg)
    if not file or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding='utf-8'))[_hash(dataset_cfg)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_counts(cfg: Config, pixels: dict[str, int]) -> None:
    """Keep the pixels of each class in the training masks beside the data; do nothing where that cannot be written."""
    dataset_cfg = _only_dataset(cfg)
    file = dataset_cfg and _counts_file(dataset_cfg)
    if not file:
        return
    try:
        kept = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        kept = {}
    with contextlib.suppress(OSError):
        write_text(file, json.dumps({**(kept if isinstance(kept, dict) else {}), _hash(dataset_cfg): pixels}))


def _is_cross_entropy(loss: ConfigDict) -> bool:
    return str(loss.get('type')).endswith('CrossEntropyLoss')


def _only_dataset(cfg: Config) -> ConfigDict | None:
    leaves = leaf_datasets(cfg.train_dataloader.dataset)
    return leaves[0] if len(leaves) == 1 else None


def _counts_file(dataset_cfg: ConfigDict) -> Path | None:
    root = dataset_cfg.get('data_root')
    return Path(root, _COUNTS_FILE) if root and '://' not in root else None


def _hash(dataset_cfg: ConfigDict) -> str:
    """Return a hash of what the counts depend on: the masks, by name, size and date, and the coding."""
    dataset = open_dataset(dataset_cfg)
    state = hashlib.blake2b(repr(sorted(dataset.metainfo.items(), key=str)).encode(), digest_size=16)
    for sample in list_samples(dataset):
        path = sample.get('seg_map_path')
        try:
            facts = os.stat(path)
            state.update(f'{path} {facts.st_size} {facts.st_mtime_ns}\n'.encode(errors='surrogateescape'))
        except (OSError, TypeError):
            state.update(f'{path}\n'.encode(errors='surrogateescape'))
    return state.hexdigest()
