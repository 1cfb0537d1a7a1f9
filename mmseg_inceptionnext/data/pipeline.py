"""Test pipelines of a config, changed for a purpose: several views of an image, no ground truth, no files."""

from __future__ import annotations

from pathlib import Path

from mmseg_inceptionnext.errors import UserError

# Swin's protocol, which the paper's UperNet figures (Table 6) follow: these sizes, and the mirror image of each.
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

# Transforms of a test pipeline that are about the ground truth.
_OF_TRUTH = ('LoadAnnotations', 'CheckAnnotation')


def leaves(dataset_cfg: dict) -> list[dict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset_cfg.get('dataset', dataset_cfg.get('datasets'))
    if inner is None:
        return [dataset_cfg]
    return [leaf for child in (inner if isinstance(inner, list) else [inner]) for leaf in leaves(child)]


def lacks_truth(dataset_cfg: dict) -> str | None:
    """Why there is no ground truth for a data set or one of those inside it; None where there is."""
    for leaf in leaves(dataset_cfg):
        folder = leaf.get('data_prefix', {}).get('seg_map_path')
        if folder is None:
            return 'the config names no seg_map_path'
        path = Path(leaf.get('data_root') or '', folder)
        if not path.is_dir():
            return f'there is no folder {path.absolute()}'
    return None


def leave_truth_out(dataset_cfg: dict) -> None:
    """Make every data set inside one of images alone, in place."""
    for leaf in leaves(dataset_cfg):
        leaf.data_prefix.pop('seg_map_path', None)
        leaf.pipeline = [t for t in leaf.pipeline if t.type not in _OF_TRUTH]


def use_multi_scale(dataset_cfg: dict) -> None:
    """Let a test pipeline make views of its scale times :data:`RATIOS`, each also as mirror image; in place.

    mmseg's own ``tta_pipeline`` scales the original image instead, whatever its size.

    Raises:
        UserError: the pipeline has no Resize to one scale.
    """
    for leaf in leaves(dataset_cfg):
        at = next((i for i, t in enumerate(leaf.pipeline) if t.type == 'Resize'), None)
        scale = leaf.pipeline[at].get('scale') if at is not None else None
        if not isinstance(scale, (tuple, list)):
            raise UserError('--tta multiplies the scale of the Resize in the test pipeline, which has none: add one')
        resize = leaf.pipeline[at]
        before, after = leaf.pipeline[:at], leaf.pipeline[at + 1 :]
        # The ground truth stays as it is, so it is loaded after the flip, which would turn it, too.
        sizes = [t for t in after if 'Resize' in t.type]
        rest = [t for t in after if 'Resize' not in t.type]
        views = [
            [dict(resize, scale=tuple(int(side * ratio) for side in scale)) for ratio in RATIOS],
            *([transform] for transform in sizes),
            [dict(type='RandomFlip', prob=probability, direction='horizontal') for probability in (0.0, 1.0)],
            *([transform] for transform in rest),
        ]
        leaf.pipeline = [*before, dict(type='TestTimeAug', transforms=views)]


def of_arrays(pipeline: list[dict]) -> list[dict]:
    """A test pipeline for images that are in memory, without ground truth."""
    loaders = ('ReadImage', 'LoadImageFromFile', 'LoadImageFromNDArray')
    kept = [t for t in pipeline if t.type not in (*loaders, *_OF_TRUTH)]
    return [dict(type='LoadImageFromNDArray'), *kept]
