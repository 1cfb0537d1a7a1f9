"""Get configs and models by name, and register the package with mmengine's config and class registries.

mmengine puts the scope ``mmseg_inceptionnext`` into a config whose ``_base_`` is ``'mmseg_inceptionnext::…'``, and then
looks in registries of that scope. Our classes are in mmseg's registries; the registries here are empty, and fall back
to those.
"""

from __future__ import annotations

from pathlib import Path

import mmseg.registry
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.model import BaseModel
from mmengine.registry import Registry

from mmseg_inceptionnext.config_files import find_config, is_classifier, read_config, require
from mmseg_inceptionnext.device import find_device
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import load_classifier

_SCOPE = 'mmseg_inceptionnext'

MODULE2PACKAGE[_SCOPE] = _SCOPE  # mmengine: configs by name are looked up in this package

# mmseg imports these when its own registries are asked, but not when one of their children asks.
_LOCATIONS = [f'mmseg.{part}' for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization')]

REGISTRIES = [
    Registry(parent.name, parent=parent, scope=_SCOPE, locations=_LOCATIONS)
    for parent in vars(mmseg.registry).values()
    if isinstance(parent, Registry)
]


def get_config(name: str | Path) -> Config:
    """Return a shipped config.

    Args:
        name: Name of a shipped config, such as 'upernet/inceptionnext_t', or path of a config.

    Raises:
        UserError: There is no such config, or it cannot be read.
    """
    return read_config(name)


def config_path(name: str) -> str:
    """Return the path of a shipped config, for ``_base_`` of another, in programs that do not import this package.

    ``_base_ = 'mmseg_inceptionnext::upernet/inceptionnext_t.py'`` is read only where the package has been imported
    before, as by its own tools. This line is read everywhere, because mmengine evaluates it::

        _base_ = __import__('mmseg_inceptionnext').config_path('upernet/inceptionnext_t')

    Args:
        name: Name of a shipped config, such as 'upernet/inceptionnext_t'.

    Raises:
        UserError: There is no such config.
    """
    return str(find_config(name).absolute())


def get_model(
    name: str | Path, checkpoint: str | Path | None = None, device: str | torch.device | None = None
) -> BaseModel:
    """Return the segmentor, or the classifier, of a config, in eval mode.

    To segment images as the config prepares them, take :class:`~mmseg_inceptionnext.Segmentor`.

    Args:
        name: Name or path of a config, see :func:`get_config`.
        checkpoint: Path of a segmentor trained with the config, which is read without running code from it; every key
            and shape must agree. Of a classifier, also what
            :func:`~mmseg_inceptionnext.models.weights.load_classifier` takes. Default: random weights; the model's
            ``init_weights()`` loads ImageNet's into the backbone.
        device: Device, such as 'cpu' or 'cuda:1'. Default: a GPU if there is one.

    Raises:
        UserError: The config or the checkpoint cannot be read, they do not fit, or there is no such device.
    """
    device = find_device(device)
    cfg = read_config(name)
    require(cfg, 'model')
    if not is_classifier(cfg):
        return build_segmentor(cfg, checkpoint).to(device).eval()
    model = build_segmentor(cfg).to(device).eval()
    if checkpoint is not None:
        load_classifier(model, checkpoint)
    return model
