"""Change the pipelines of a config: safe reading, several views of an image, no ground truth, images in memory."""

from __future__ import annotations

import os

from mmcv.transforms import BaseTransform, Compose
from mmengine import fileio
from mmseg.registry import TRANSFORMS

from mmseg_inceptionnext.config_files import dicts_inside
from mmseg_inceptionnext.data.transforms import takes_arguments_of
from mmseg_inceptionnext.errors import UserError

# Swin's protocol, which the paper's UperNet figures (Table 6) follow: these sizes, and the mirror image of each.
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

IMAGE_LOADERS = ('LoadImageFromFile', 'ReadImage')
GROUND_TRUTH_TRANSFORMS = ('LoadAnnotations', 'CheckAnnotation', 'ReadMask')


def leaf_datasets(dataset_cfg: dict) -> list[dict]:
    """Return the configs of the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset_cfg.get('dataset', dataset_cfg.get('datasets'))
    if inner is None:
        return [dataset_cfg]
    return [leaf for child in (inner if isinstance(inner, list) else [inner]) for leaf in leaf_datasets(child)]


def displayed_path(path: str) -> str:
    """Return an absolute path for a message; that of another storage as it is."""
    return path if '://' in path else os.path.abspath(path)


def missing_ground_truth(dataset_cfg: dict) -> str | None:
    """Say why a data set, or one inside it, has no ground truth; None if all have."""
    for leaf in leaf_datasets(dataset_cfg):
        folder = leaf.get('data_prefix', {}).get('seg_map_path')
        if folder is None:
            return 'the config names no seg_map_path'
        path = fileio.join_path(leaf.get('data_root') or '', folder)
        if not fileio.isdir(path, backend_args=leaf.get('backend_args')):
            return f'there is no folder {displayed_path(path)}'
    return None


def remove_ground_truth(dataset_cfg: dict) -> None:
    """Remove the ground truth from every data set inside a config, in place."""
    for leaf in leaf_datasets(dataset_cfg):
        leaf.data_prefix.pop('seg_map_path', None)
        leaf.pipeline = [t for t in leaf.pipeline if t.type not in GROUND_TRUTH_TRANSFORMS]


def read_images_safely(dataset_cfg: dict) -> None:
    """Replace mmcv's LoadImageFromFile by ReadImage everywhere inside a data set's config, in place.

    The configs name LoadImageFromFile, which mmseg's tools look for by that name. Where its arguments ask for another
    way to read than ReadImage knows, it stays.
    """
    for node in dicts_inside(dataset_cfg):
        if node.get('type') == 'LoadImageFromFile' and takes_arguments_of(node):
            node['type'] = 'ReadImage'


def use_multi_scale(dataset_cfg: dict) -> None:
    """Put a :class:`MultiScaleTest` around every test pipeline inside a config, in place.

    Raises:
        UserError: A pipeline has no Resize to one scale.
    """
    for leaf in leaf_datasets(dataset_cfg):
        _multi_scale_views(leaf.pipeline)
        leaf.pipeline = [dict(type='MultiScaleTest', pipeline=leaf.pipeline)]


@TRANSFORMS.register_module()
class MultiScaleTest(BaseTransform):
    """Makes views of an image from a plain test pipeline: its scale times :data:`TTA_RATIOS`, and their mirror images.

    The result is that of mmcv's TestTimeAug. mmseg's own ``tta_pipeline`` scales the original image instead, whatever
    its size.

    Args:
        pipeline: A test pipeline with a Resize to one scale.

    Raises:
        UserError: It has none.
    """

    def __init__(self, pipeline: list[dict]):
        loading, views = _multi_scale_views(pipeline)
        self.pipeline = Compose([*loading, dict(type='TestTimeAug', transforms=views)])

    def transform(self, results: dict) -> dict:
        return self.pipeline(results)


def _multi_scale_views(pipeline: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """Return the transforms before the Resize, and those from it on as the argument of mmcv's TestTimeAug."""
    at = next((i for i, t in enumerate(pipeline) if t['type'] == 'Resize'), None)
    scale = pipeline[at].get('scale') if at is not None else None
    if not isinstance(scale, (tuple, list)):
        raise UserError('tta=True multiplies the scale of the Resize in the test pipeline, which has none: add one')
    # The ground truth keeps its orientation, so it is loaded after the flip.
    sizes = [t for t in pipeline[at + 1 :] if 'Resize' in t['type']]
    rest = [t for t in pipeline[at + 1 :] if 'Resize' not in t['type']]
    return pipeline[:at], [
        [dict(pipeline[at], scale=tuple(int(side * ratio) for side in scale)) for ratio in TTA_RATIOS],
        *([transform] for transform in sizes),
        [dict(type='RandomFlip', prob=probability, direction='horizontal') for probability in (0.0, 1.0)],
        *([transform] for transform in rest),
    ]


def pipeline_for_arrays(pipeline: list[dict]) -> list[dict]:
    """Return a test pipeline for images in memory, without ground truth."""
    kept = [t for t in pipeline if t.type not in (*IMAGE_LOADERS, 'LoadImageFromNDArray', *GROUND_TRUTH_TRANSFORMS)]
    return [dict(type='LoadImageFromNDArray'), *kept]
