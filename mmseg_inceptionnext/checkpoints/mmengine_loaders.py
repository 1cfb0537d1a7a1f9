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
from mmseg_inceptionnext.checkpoints.reading import MapLocation, checkpoints_are_trusted, read_checkpoint
from mmseg_inceptionnext.distributed import fetch_on_rank_zero_first
from mmseg_inceptionnext.errors import UserError, first_sentence


def replace_mmengine_loaders() -> None:
    """Let mmengine read all checkpoints through :func:`~mmseg_inceptionnext.checkpoints.reading.read_checkpoint`.

    This holds for the whole process, also for other libraries that use mmengine; see SECURITY.md. The loaders have the
    names of mmengine's, which it logs.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        ('pavi://', load_from_pavi),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_ceph),
        (('modelzoo://', 'torchvision://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
    ):
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)


def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
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


def load_from_http(filename: str, map_location: MapLocation = None) -> dict:
    """Download a file over https and read it."""
    return load_from_local(str(fetch_on_rank_zero_first(download, filename)), map_location)


def load_from_pavi(filename: str, map_location: MapLocation = None) -> dict:
    """Refuse it: only a package of its makers can read from there."""
    raise UserError(f'{filename}: checkpoints are not read from there: copy it to a file')


def load_from_ceph(filename: str, map_location: MapLocation = None) -> dict:
    """Read an object by mmengine's back end for its prefix, which may need a package."""
    try:
        content = get(filename)
    except (ImportError, ValueError, KeyError, AssertionError) as error:  # a package or the prefix is missing
        raise UserError(f'{filename} cannot be read ({first_sentence(error)}): copy it to a file') from error
    with NamedTemporaryFile(suffix=Path(filename).suffix) as file:
        file.write(content)
        file.flush()
        return load_from_local(file.name, map_location)


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> dict:
    """Read a model of torchvision by its name."""
    return _load_named(filename, mmengine_checkpoint.get_torchvision_models(), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> dict:
    """Read a model of OpenMMLab by its name, or by an old one."""
    zoo, name = filename.split('://')
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    return _load_named(f'{zoo}://{name}', mmengine_checkpoint.get_external_models(), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> dict:
    """Read a backbone of a classifier of mmcls by its name."""
    content = _load_named(filename, mmengine_checkpoint.get_mmcls_models(), map_location)
    return mmengine_checkpoint._process_mmcls_checkpoint(content)


def _load_named(filename: str, urls: dict[str, str], map_location: MapLocation) -> dict:
    name = filename.split('://')[1]
    if name not in urls:
        raise UserError(f'{filename}: mmengine knows no model of this name')
    return load_from_http(urls[name], map_location)
