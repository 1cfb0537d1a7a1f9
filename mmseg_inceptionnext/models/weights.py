"""Find weights, check every key, load them.

There are two kinds: ImageNet weights of the backbone (:func:`load_pretrained`) and trained segmentors
(:func:`load_segmentor`). Both fail closed: a partial match is an error, never a warning. Only to fine-tune
(:func:`load_for_finetuning`) may heads differ, and what was taken over is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmseg_inceptionnext.checkpoints.download import NO_NETWORK, download
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.distributed import fetch_on_rank_zero_first
from mmseg_inceptionnext.errors import UserError, first_sentence
from mmseg_inceptionnext.labels import classes_of_checkpoint
from mmseg_inceptionnext.models.archs import recognise_arch

# Where training programs put the weights in a checkpoint. As in timm, an averaged model goes before the raw one.
_CONTAINERS = ('state_dict_ema', 'state_dict', 'model')


def load_pretrained(backbone: nn.Module, source: str) -> None:
    """Load ImageNet weights into a MetaNeXt backbone, all of them or none.

    Args:
        backbone: The backbone. If its stem has other than 3 input channels, the weights are adapted as timm does it:
            summed for 1, repeated and rescaled for more.
        source: Name in timm ('inception_next_tiny.sail_in1k'), https URL, or path of a .pth or .safetensors file from
            timm, from the paper's authors, or of a whole segmentor trained here; also of their and timm's ConvNeXts.

    Raises:
        UserError: The source cannot be found or read, would run code when unpickled, lacks a key of the backbone, or
            has an extra one. Only the classifier and stages that the backbone does not build may be extra, and only
            out-norms, which ImageNet models do not have, may be missing.
    """
    path = _locate(str(source))
    loaded = _from_convnext(backbone_state_dict(read_checkpoint(path), path))
    expected = backbone.state_dict()

    stem = loaded.get('stem.0.weight')
    out, _, *kernel = expected['stem.0.weight'].shape
    if stem is not None and stem.shape == (out, 3, *kernel) and backbone.in_channels != 3:
        loaded['stem.0.weight'] = timm.models.adapt_input_conv(backbone.in_channels, stem)

    num_stages = len(backbone.stages)
    left_over = {key for key in loaded if key not in expected and _may_be_left_over(key, num_stages)}
    missing_norms = {key for key in expected if key not in loaded and re.match(r'norm\d+\.', key)}
    problems = _differences(
        {key: value for key, value in expected.items() if key not in missing_norms},
        {key: value for key, value in loaded.items() if key not in left_over},
    )
    if problems:
        raise UserError(f'{path} does not fit the backbone{_recognised(loaded)}: {problems}')

    backbone.load_state_dict({key: value for key, value in loaded.items() if key in expected}, strict=False)
    say(
        f'Loaded {len(loaded) - len(left_over)} tensors into the backbone from {path}'
        + (f'; left over: {len(left_over)} of the classifier or of stages not built' if left_over else '')
        + (f'; out-norms not in the file, kept as initialised: {len(missing_norms)} tensors' if missing_norms else '')
    )


def load_classifier(model: nn.Module, source: str | Path, finetune: bool = False) -> dict:
    """Load a trained ImageNet classifier, all of it or nothing.

    Args:
        model: An :class:`~mmseg_inceptionnext.models.classifier.ImageNetClassifier`, possibly wrapped.
        source: Name in timm ('inception_next_tiny.sail_in1k'), https URL, or path of a .pth or .safetensors file from
            timm, from the paper's authors, or of a classifier trained here.
        finetune: Leave out the last layer where it has another number of classes than the model, and say so.

    Returns:
        The content of the checkpoint.

    Raises:
        UserError: The source cannot be found or read, would run code when unpickled, or does not fit.
    """
    path = _locate(str(source))
    content = read_checkpoint(path)
    module = model.module if is_model_wrapper(model) else model
    expected = module.state_dict()
    loaded = {}
    for key, value in backbone_and_head_state_dict(content, path).items():
        loaded[key if key.startswith(('backbone.', 'head.')) else f'backbone.{key}'] = value
    # 0 for what is no matrix, or for a head of another kind.
    there, here = (part['head.fc2.weight'].shape[0] if getattr(part.get('head.fc2.weight'), 'ndim', 0) == 2 else 0
                   for part in (loaded, expected))  # fmt: skip
    left_out = ''
    if there and here and there != here:
        if not finetune:
            raise UserError(f'{path} has {there} classes, the config {here}: set model.head.num_classes')
        left_out = f'; left out: its classifier of {there} classes, as there are {here} here'
        loaded |= {key: value for key, value in expected.items() if key.startswith('head.fc2.')}
    if problems := _differences(expected, loaded):
        backbone = {key.removeprefix('backbone.'): value for key, value in loaded.items()}
        raise UserError(f'{path} does not fit the classifier{_recognised(backbone)}: {problems}')
    module.load_state_dict(loaded)
    say(f'Loaded {len(loaded)} tensors into the classifier from {path}{left_out}')
    return content


def backbone_state_dict(checkpoint: dict, path: Path) -> dict[str, Tensor]:
    """Return the backbone's tensors of a checkpoint, without the container and prefixes that programs add.

    Raises:
        UserError: There are no tensors.
    """
    return _inside('backbone.', backbone_and_head_state_dict(checkpoint, path))


def backbone_and_head_state_dict(checkpoint: dict, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without the container and the prefix of a distributed model.

    Raises:
        UserError: There are no tensors.
    """
    container = next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), dict)), None)
    state_dict = _inside('module.', _tensors(checkpoint[container] if container else checkpoint))
    if not state_dict:
        raise UserError(f'{path} holds no tensors: it has the keys {_some(checkpoint)}')
    return state_dict


def _inside(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what has a prefix, without it; all, if nothing has it."""
    found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return found or state_dict


# Names of parameters in the released ConvNeXts and in timm's, and ours for the same.
_CONVNEXT_NAMES = (
    (r'^downsample_layers\.0\.', 'stem.'),
    (r'^downsample_layers\.(\d+)\.', r'stages.\1.downsample.'),
    (r'^stages\.(\d+)\.(\d+)\.', r'stages.\1.blocks.\2.'),
    (r'\.(?:conv_dw|dwconv(?:\.conv)?)\.', '.token_mixer.dwconv.'),
    (r'\.pwconv([12])\.', r'.mlp.fc\1.'),
    (r'^norm\.', 'head.norm.'),
)


def _from_convnext(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a ConvNeXt, whose linear layers are our 1×1 convolutions; others stay as they are."""
    if not any(re.match(r'stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\.', key) for key in state_dict):
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        for theirs, ours in _CONVNEXT_NAMES:
            key = re.sub(theirs, ours, key)
        is_linear = re.search(r'\.mlp\.fc\d\.weight$', key) and value.ndim == 2
        renamed[key] = value[:, :, None, None] if is_linear else value
    return renamed


def check_fits(model: nn.Module, checkpoint: dict, path: str | Path) -> None:
    """Check that a trained segmentor fits a model, key by key.

    Args:
        model: A segmentor, possibly wrapped for distributed training.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for messages.

    Raises:
        UserError: The number of classes, the architecture or the keys differ.
    """
    state_dict = _tensors(checkpoint.get('state_dict', checkpoint))
    expected = (model.module if is_model_wrapper(model) else model).state_dict()
    for classifier in (key for key in expected if re.fullmatch(r'decode_head\.(\d+\.)?conv_seg\.weight', key)):
        if classifier not in state_dict:
            continue
        (there, *_), (here, *_) = (*state_dict[classifier].shape, 0), expected[classifier].shape
        if there != here:
            raise UserError(
                f'{path} was trained for {there} classes, the config has {here}: '
                'use the config it was trained with, or set num_classes of every head'
            )
    if name := recognise_arch(state_dict):
        raise UserError(
            f'{path} holds weights of a backbone, inception_next_{name}, not of a trained segmentor: '
            f'to train from it, pass weights={str(path)!r}'
        )
    problems = _differences(expected, state_dict)
    if problems:
        backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
        raise UserError(f'{path} does not fit the config{_recognised(backbone)}: {problems}')


def load_for_finetuning(model: nn.Module, path: str | Path, class_names: Sequence[str]) -> str:
    """Load what fits of another trained segmentor, whatever its classes: backbone, neck, heads.

    The backbones must be the same. Of a classifier, the rows of classes that have the same name in both are taken
    over; the others stay as they are.

    Args:
        model: A segmentor, possibly wrapped for distributed training.
        path: Path of the checkpoint.
        class_names: Names of the model's classes.

    Returns:
        What was loaded and what was not, in one line.

    Raises:
        UserError: It cannot be read, is no segmentor, or its backbone is another.
    """
    content = read_checkpoint(path)
    found = _tensors(content.get('state_dict', content))
    expected = (model.module if is_model_wrapper(model) else model).state_dict()
    backbone = {key for key in expected if key.startswith('backbone.')}
    if not any(key.startswith('decode_head.') for key in found):
        raise UserError(f'{path} holds no trained segmentor: weights={str(path)!r} loads a backbone')
    theirs = {key: value for key, value in found.items() if key.startswith('backbone.')}
    if problems := _differences({key: expected[key] for key in backbone}, theirs):
        arch = _recognised({key.removeprefix('backbone.'): value for key, value in theirs.items()})
        raise UserError(f'{path} has another backbone{arch}: {problems}')

    try:
        there = [name.lower() for name in classes_of_checkpoint(content, path).names]
    except UserError:
        there = []
    here = [name.strip().lower() for name in class_names]
    rows = [(i, there.index(name)) for i, name in enumerate(here) if name in there]
    taken, new = 0, []
    for key, tensor in expected.items():
        other = found.get(key)
        if (
            'conv_seg.' in key
            and other is not None
            and len(tensor) == len(here)
            and other.shape[1:] == tensor.shape[1:]
        ):
            for i, j in rows:
                tensor[i].copy_(other[j])
        elif other is not None and other.shape == tensor.shape and _is_plain(other):
            tensor.copy_(other)
            taken += 1
        else:
            new.append(key)
    names = [class_names[i].strip() for i, _ in rows]
    parts = [f'{taken} of {len(expected)} tensors']
    parts.append(f'the classifier rows of {len(rows)} of {len(here)} classes' + (f' ({_some(names)})' if rows else ''))
    text = f'Taken over from {path}: {" and ".join(parts)}'
    if not there:
        text += '; it does not say what its classes are'
    if new:
        text += f'; new: {len(new)} tensors, such as {_some(new)}'
    if left := [key for key in found if key not in expected]:
        text += f'; left out: {len(left)} tensors, such as {_some(left)}'
    return text


def load_segmentor(model: nn.Module, checkpoint: dict, path: str | Path) -> None:
    """Load a trained segmentor, all of it or nothing; see :func:`check_fits`."""
    check_fits(model, checkpoint, path)
    (model.module if is_model_wrapper(model) else model).load_state_dict(
        _tensors(checkpoint.get('state_dict', checkpoint))
    )


def _locate(source: str) -> Path:
    """Return the local path of a timm name, a URL or a path."""
    if '://' in source:
        return fetch_on_rank_zero_first(download, source)
    if Path(source).suffix in ('.pth', '.pt', '.safetensors', '.bin') or os.path.exists(source):
        return Path(source)
    return fetch_on_rank_zero_first(_download_timm, source)


def _download_timm(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    cfg = timm.models.get_pretrained_cfg(name) if timm.models.is_model(name) else None
    if cfg is None or not cfg.hf_hub_id:
        names = ', '.join(timm.list_pretrained('inception_next_*'))
        raise UserError(f'{name!r} is neither a file, an https URL nor a model of timm; timm has {names}')
    repository = cfg.hf_hub_id if not cfg.hf_hub_id.endswith('/') else f'{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}'
    try:
        return Path(hf_hub_download(repository, 'model.safetensors'))
    except Exception as error:  # the hub's HTTP client differs between versions
        raise UserError(f'could not download {name} from the hub ({first_sentence(error)}): {NO_NETWORK}') from error


def _tensors(state_dict) -> dict[str, Tensor]:
    """Return the named tensors of what should be a state dict."""
    if not isinstance(state_dict, dict):
        return {}
    return {key: value for key, value in state_dict.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _may_be_left_over(key: str, num_stages: int) -> bool:
    """Return whether a key is of the classifier, a stage not built, or the norm of a stage not returned."""
    stage = re.match(r'stages\.(\d+)\.', key)
    return bool(re.match(r'head\.|norm\d+\.', key)) or (stage is not None and int(stage[1]) >= num_stages)


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say why ``found`` cannot be loaded as ``expected``; an empty string if it can."""
    parts = []
    if missing := [key for key in expected if key not in found]:
        parts.append(f'{len(missing)} keys are missing, such as {_some(missing)}')
    if unexpected := [key for key in found if key not in expected]:
        parts.append(f'{len(unexpected)} keys are not known, such as {_some(unexpected)}')
    shapes = [(key, tuple(found[key].shape), tuple(expected[key].shape)) for key in expected if key in found]
    if different := [f'{key} is {there}, here {here}' for key, there, here in shapes if there != here]:
        parts.append(f'{len(different)} shapes differ: {_some(different)}')
    if odd := [key for key in expected if key in found and not _is_plain(found[key])]:
        parts.append(f'{len(odd)} tensors are complex, sparse, quantised or empty, such as {_some(odd)}')
    return '; '.join(parts)


def _recognised(state_dict: Mapping[str, Tensor]) -> str:
    if name := recognise_arch(state_dict):
        return f' (this is inception_next_{name})'
    if any('.token_mixer.dwconv.' in key for key in state_dict):
        return ' (this is a ConvNeXt)'
    if not any('.token_mixer.dwconv_' in key for key in state_dict):
        return ' (this is no InceptionNeXt)'
    return ''


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has a real number for each of its elements."""
    return not (tensor.is_complex() or tensor.is_quantized or tensor.is_meta) and tensor.layout == torch.strided


def _some(items, number: int = 3) -> str:
    items = list(map(str, items))
    return ', '.join(items[:number]) + (', …' if len(items) > number else '')
