"""Replace mmengine's checkpoint loaders, which unpickle without any check, by safe ones.

mmengine reads checkpoints for ``init_cfg`` of any backbone, for ``load_from``, in its Runner and in its tools.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import NamedTemporaryFile

from mmengine.fileio import get
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmseg_inceptionnext.checkpoints.download import download
from mmseg_inceptionnext.checkpoints.reading import checkpoints_are_trusted, read_checkpoint
from mmseg_inceptionnext.distributed import fetch_on_rank_zero_first
from mmseg_inceptionnext.errors import UserError, first_sentence

_STORAGES = ('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
_MODEL_ZOOS = ('modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://')


def replace_mmengine_loaders() -> None:
    """Let mmengine read all checkpoints through :func:`~mmseg_inceptionnext.checkpoints.reading.read_checkpoint`.

    This holds for the whole process, also for other libraries that use mmengine; see SECURITY.md.
    """
    for prefixes, loader in (
        ('', _load_file),
        (('http://', 'https://'), _load_url),
        (_STORAGES, _load_from_storage),
        (_MODEL_ZOOS, _load_from_model_zoo),
    ):
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)


def _load_file(filename: str, map_location=None) -> dict:
    """Read a file, by default onto the CPU, without the configs in it, unless it is trusted.

    mmengine's Runner executes ``meta.config`` when it resumes, and its inferencer executes the others.
    """
    checkpoint = read_checkpoint(filename, map_location or 'cpu')
    if not checkpoints_are_trusted():
        meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
        info = hub.get('runtime_info') if isinstance(hub, dict) else None
        for holder, keys in ((meta, ('config', 'cfg')), (info, ('cfg',))):
            for key in keys if isinstance(holder, dict) else ():
                holder.pop(key, None)
    return checkpoint


def _load_url(filename: str, map_location=None) -> dict:
    return _load_file(str(fetch_on_rank_zero_first(download, filename)), map_location)


def _load_from_storage(filename: str, map_location=None) -> dict:
    """Read an object by mmengine's back end for its prefix, which may need a package."""
    try:
        content = get(filename)
    except (ImportError, ValueError, KeyError, AssertionError) as error:  # a package or the prefix is missing
        raise UserError(f'{filename} cannot be read ({first_sentence(error)}): copy it to a file') from error
    with NamedTemporaryFile(suffix=Path(filename).suffix) as file:
        file.write(content)
        file.flush()
        return _load_file(file.name, map_location)


def _load_from_model_zoo(filename: str, map_location=None) -> dict:
    zoo, name = filename.split('://')
    if zoo in ('modelzoo', 'torchvision'):
        urls = mmengine_checkpoint.get_torchvision_models()
    elif zoo == 'mmcls':
        urls = mmengine_checkpoint.get_mmcls_models()
    else:
        urls = mmengine_checkpoint.get_external_models()
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in urls:
        raise UserError(f'{filename}: mmengine knows no model of this name')
    content = _load_url(urls[name], map_location)
    return mmengine_checkpoint._process_mmcls_checkpoint(content) if zoo == 'mmcls' else content
