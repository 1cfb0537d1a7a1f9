"""Checkpoints: find them, read them without running what is in them, check every key, load them.

Two kinds are read here: ImageNet weights of the backbone (:func:`load_pretrained`) and trained segmentors
(:func:`read_checkpoint`, :func:`check_fits`). Both fail closed: a partial match is an error, never a warning.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import timm
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from mmseg_inceptionnext.errors import UserError

# Where training programs put the weights in a checkpoint. As in timm, an averaged model goes before the raw one.
_CONTAINERS = ('state_dict_ema', 'state_dict', 'model')

# What readers raise on damaged files.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    IndexError,
    AssertionError,
    struct.error,
    SafetensorError,
)

_NO_NETWORK = (
    'download it elsewhere and pass the file (init_cfg checkpoint, or --weights FILE), or train from scratch '
    '(init_cfg=None, or --weights none)'
)


def load_pretrained(backbone: nn.Module, source: str, archs: Mapping[str, dict]) -> None:
    """Load ImageNet weights into an InceptionNeXt backbone, all of them or none.

    Args:
        backbone: An :class:`~mmseg_inceptionnext.InceptionNeXt`. A stem for other than 3 input channels gets the
            weights that timm would give it (summed for 1, repeated and rescaled for more).
        source: A timm name ('inception_next_tiny.sail_in1k'), an https URL, or a local .pth or .safetensors file, of
            timm, of the paper's authors, or a whole segmentor trained here.
        archs: Known architectures by name, to tell which one a file holds that does not fit.

    Raises:
        UserError: the source cannot be found or read, would run code when unpickled, lacks a key of the backbone, or
            holds one too many. Only the classifier and stages that the backbone does not build may be left over, and
            only out-norms, which ImageNet models do not have, may be missing.
    """
    path = _locate(str(source))
    loaded = backbone_state_dict(read_checkpoint(path), path)
    expected = backbone.state_dict()

    stem = loaded.get('stem.0.weight')
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3 != backbone.in_channels:
        loaded['stem.0.weight'] = timm.models.adapt_input_conv(backbone.in_channels, stem)

    num_stages = len(backbone.stages)
    left_over = {key for key in loaded if key not in expected and _may_be_left_over(key, num_stages)}
    missing_norms = {key for key in expected if key not in loaded and re.match(r'norm\d+\.', key)}
    problems = _differences(
        {key: value for key, value in expected.items() if key not in missing_norms},
        {key: value for key, value in loaded.items() if key not in left_over},
    )
    if problems:
        raise UserError(f'{path} does not fit the backbone{_recognised(loaded, archs)}: {problems}')

    backbone.load_state_dict({key: value for key, value in loaded.items() if key in expected}, strict=False)
    print_log(
        f'Loaded {len(loaded) - len(left_over)} tensors into the backbone from {path}'
        + (f'; left over: {len(left_over)} of the classifier or of stages not built' if left_over else '')
        + (f'; out-norms not in the file, kept as initialised: {len(missing_norms)} tensors' if missing_norms else ''),
        logger='current',
    )


def read_checkpoint(path: str | Path) -> dict:
    """Read a .pth or .safetensors file onto the CPU without running code from it.

    Besides tensors and plain containers, only what mmengine writes into its checkpoints is unpickled: its
    ``HistoryBuffer`` and the numpy arrays in it.

    Raises:
        UserError: no such file, truncated, of another format, or with a pickled global that is not allowed (named).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f'no checkpoint at {path.absolute()}: check the path')
    try:
        if path.suffix == '.safetensors':
            checkpoint = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(_mmengine_globals()):
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
        if forbidden is None:
            raise UserError(f'{path} is damaged or not a checkpoint: its pickle cannot be read') from error
        raise UserError(
            f'{path} is refused: it wants to run {forbidden[1].rstrip(".")}, which a file of weights has no need of. '
            'Get the weights as .safetensors, or save them again as a plain state dict'
        ) from error
    except PermissionError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    except _DAMAGE as error:
        raise UserError(
            f'{path} is truncated or not a checkpoint ({type(error).__name__}: {_summary(error)})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__} where a state dict was expected')
    return checkpoint


def backbone_state_dict(checkpoint: dict, path: Path) -> dict[str, Tensor]:
    """The backbone's tensors of a checkpoint, without the container and the prefixes that programs put around them."""
    container = next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), dict)), None)
    state_dict = checkpoint[container] if container else checkpoint
    state_dict = _tensors(state_dict)
    for prefix in ('module.', 'backbone.'):
        if any(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    if not state_dict:
        raise UserError(f'{path} holds no tensors: it has the keys {_some(checkpoint)}')
    return state_dict


def check_fits(model: nn.Module, checkpoint: dict, path: str | Path, archs: Mapping[str, dict]) -> None:
    """Make sure that a trained segmentor fits ``model`` key by key.

    Args:
        model: A segmentor, possibly wrapped for distributed training.
        checkpoint: What :func:`read_checkpoint` gave for ``path``.
        path: For the message.
        archs: Known architectures by name, to tell which one a file holds that does not fit.

    Raises:
        UserError: another number of classes, another architecture, or other keys.
    """
    state_dict = _tensors(checkpoint.get('state_dict', checkpoint))
    expected = (model.module if is_model_wrapper(model) else model).state_dict()
    classifier = 'decode_head.conv_seg.weight'
    if classifier in state_dict and classifier in expected:
        there, here = len(state_dict[classifier]), len(expected[classifier])
        if there != here:
            raise UserError(
                f'{path} was trained for {there} classes, the config has {here}: '
                'use the config it was trained with, or set num_classes of every head'
            )
    problems = _differences(expected, state_dict)
    if problems:
        backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
        raise UserError(f'{path} does not fit the config{_recognised(backbone, archs)}: {problems}')


def load_segmentor(model: nn.Module, checkpoint: dict, path: str | Path, archs: Mapping[str, dict]) -> None:
    """Load a trained segmentor, all of it or nothing; see :func:`check_fits`."""
    check_fits(model, checkpoint, path, archs)
    model.load_state_dict(_tensors(checkpoint.get('state_dict', checkpoint)))


def recognise_arch(state_dict: Mapping[str, Tensor], archs: Mapping[str, dict]) -> str | None:
    """Which of ``archs`` has the depths and widths of this backbone, or None."""
    widths: dict[int, list[int]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'stages\.(\d+)\.blocks\.\d+\.gamma', key):
            widths.setdefault(int(match[1]), []).append(len(value))
    depths = tuple(len(widths[i]) for i in sorted(widths))
    channels = tuple(widths[i][0] for i in sorted(widths))
    found = (name for name, arch in archs.items() if (arch['depths'], arch['channels']) == (depths, channels))
    return next(found, None)


def _locate(source: str) -> Path:
    """The local file of a timm name, a URL or a path; downloaded by the first process, then found by the others."""
    if re.match(r'[a-z0-9+]+://', source) and not source.startswith('https://'):
        raise UserError(f'{source}: weights are fetched over https:// only')
    is_url = source.startswith('https://')
    if not is_url and (Path(source).suffix in ('.pth', '.pt', '.safetensors', '.bin') or Path(source).exists()):
        return Path(source).expanduser()

    download = _download_url if is_url else _download_timm
    if get_rank() == 0:
        path = download(source)
    barrier()
    return path if get_rank() == 0 else download(source)


def _download_url(url: str) -> Path:
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f'{url} names no file')
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f'could not download {url} ({_summary(error)}): {_NO_NETWORK}') from error
    return path


def _download_timm(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    cfg = timm.models.get_pretrained_cfg(name) if timm.models.is_model(name) else None
    if cfg is None or not cfg.hf_hub_id:
        names = ', '.join(timm.list_pretrained('inception_next_*'))
        raise UserError(f'{name!r} is neither a file, an https URL nor a model of timm; timm has {names}')
    repository = cfg.hf_hub_id if not cfg.hf_hub_id.endswith('/') else f'{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}'
    try:
        return Path(hf_hub_download(repository, 'model.safetensors'))
    except Exception as error:  # of the hub's HTTP client, which changes from version to version
        raise UserError(f'could not download {name} from the hub ({_summary(error)}): {_NO_NETWORK}') from error


def _tensors(state_dict) -> dict[str, Tensor]:
    """The named tensors of what ought to be a state dict."""
    if not isinstance(state_dict, dict):
        return {}
    return {key: value for key, value in state_dict.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _may_be_left_over(key: str, num_stages: int) -> bool:
    """The classifier, stages not built, and the norms of stages not returned."""
    stage = re.match(r'stages\.(\d+)\.', key)
    return bool(re.match(r'head\.|norm\d+\.', key)) or (stage is not None and int(stage[1]) >= num_stages)


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What keeps ``found`` from being loaded as ``expected``, or an empty string."""
    parts = []
    if missing := [key for key in expected if key not in found]:
        parts.append(f'{len(missing)} keys are missing, such as {_some(missing)}')
    if unexpected := [key for key in found if key not in expected]:
        parts.append(f'{len(unexpected)} keys are not known, such as {_some(unexpected)}')
    shapes = [(key, tuple(found[key].shape), tuple(expected[key].shape)) for key in expected if key in found]
    if different := [f'{key} is {there}, here {here}' for key, there, here in shapes if there != here]:
        parts.append(f'{len(different)} shapes differ: {_some(different)}')
    return '; '.join(parts)


def _recognised(state_dict: Mapping[str, Tensor], archs: Mapping[str, dict]) -> str:
    if name := recognise_arch(state_dict, archs):
        return f' (this is inception_next_{name})'
    if not any('.token_mixer.dwconv_hw.' in key for key in state_dict):
        return ' (this is no InceptionNeXt)'
    return ''


def _some(items, number: int = 3) -> str:
    items = list(map(str, items))
    return ', '.join(items[:number]) + (', …' if len(items) > number else '')


def _summary(error: BaseException) -> str:
    """The first sentence of an error: libraries put advice after it that does not apply here."""
    return re.split(r'\.\s|\n', str(error).strip())[0]


def _mmengine_globals() -> list:
    """What the pickle inside a checkpoint of mmengine may name, under the names that numpy 1 and 2 write."""
    array = np.array(0)
    reconstruct, scalar = array.__reduce__()[0], np.int64(0).__reduce__()[0]
    return [
        HistoryBuffer,
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(t)) for t in ('bool', 'uint8', 'int32', 'int64', 'float32', 'float64')},
        *((reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    ]


def _history_buffer_method(owner: type, name: str):
    """``getattr`` as far as a pickled HistoryBuffer needs it: one of its statistics, of nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r} and {name!r} is not allowed')
    return getattr(owner, name)
