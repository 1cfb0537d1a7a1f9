"""InceptionNeXt for MMSegmentation. Importing the package registers its classes in mmseg's registries."""

import contextlib
import sys
import warnings

# `python -m mmseg_inceptionnext doctor` is for when nothing below can be imported, and Python runs this file first.
# While it looks for the module to run, sys.argv[0] is '-m'; Python 3.9 has no sys.orig_argv to name the module.
if sys.argv[:2] == ['-m', 'doctor'] and __name__ in getattr(sys, 'orig_argv', [__name__]):
    from mmseg_inceptionnext import doctor

    sys.exit(doctor.main(sys.argv[2:]))

from mmseg_inceptionnext.muted_stream import MutedStream

# Importing mmseg prints two lines about a data service and warns of a compiled operator that nothing here needs.
with warnings.catch_warnings(), MutedStream(sys.stdout) as muted, contextlib.redirect_stdout(muted):
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    try:
        import mmseg.datasets
        import mmseg.models  # noqa: F401
    except Exception as error:  # mmseg asserts versions, compiled libraries raise what they like
        from mmseg_inceptionnext.doctor import import_fault, is_tool

        if is_tool():
            print(f'error: {import_fault(error)}', file=sys.stderr)
            sys.exit(2)
        raise ImportError(import_fault(error)) from error

from mmseg_inceptionnext.checkpoints.mmengine_loaders import replace_mmengine_loaders
from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.data.mask_dataset import MaskDataset, ReadMask
from mmseg_inceptionnext.data.pipeline import MultiScaleTest
from mmseg_inceptionnext.data.transforms import CheckAnnotation, ReadImage
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation import boundary, calibration  # noqa: F401  register metrics
from mmseg_inceptionnext.evaluation.metrics import ConfusionMetric, PerClassIoUMetric
from mmseg_inceptionnext.evaluation.picture_hooks import OverlayHook, ValidationSamplesHook
from mmseg_inceptionnext.hub import config_path, get_config, get_model
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.inference.label_map_segmentor import LabelMapSegmentor
from mmseg_inceptionnext.inference.segmentor import Segmentation, Segmentor
from mmseg_inceptionnext.measure import pvt  # noqa: F401  registers PVT
from mmseg_inceptionnext.models.inceptionnext import InceptionNeXt
from mmseg_inceptionnext.models.kernels import use_kernels
from mmseg_inceptionnext.models.late_upsample import late_upsample
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleUPerHead
from mmseg_inceptionnext.models.metanext import MetaNeXt
from mmseg_inceptionnext.models.token_mixers import TOKEN_MIXERS
from mmseg_inceptionnext.training.hooks.checkpoint import SafeCheckpointHook
from mmseg_inceptionnext.training.hooks.kernels import UseKernelsHook
from mmseg_inceptionnext.training.hooks.non_finite_loss import StopOnNonFiniteLossHook
from mmseg_inceptionnext.training.loops import AccumulatingTrainLoop, TolerantValLoop
from mmseg_inceptionnext.training.mixed_precision import BFloat16OptimWrapper
from mmseg_inceptionnext.training.reproducible import (
    ReproducibleInfiniteSampler,
    SeedAugmentation,
    SeedIterationHook,
)
from mmseg_inceptionnext.training.runner import SafeRunner
from mmseg_inceptionnext.version import __version__

replace_mmengine_loaders()  # for the whole process: mmengine then reads checkpoints without running code from them

__all__ = [
    'AccumulatingTrainLoop',
    'BFloat16OptimWrapper',
    'CheckAnnotation',
    'ConfusionMetric',
    'InceptionNeXt',
    'LabelMapSegmentor',
    'LateUpsampleUPerHead',
    'MaskDataset',
    'MetaNeXt',
    'MultiScaleTest',
    'OverlayHook',
    'PerClassIoUMetric',
    'ReadImage',
    'ReadMask',
    'ReproducibleInfiniteSampler',
    'SafeCheckpointHook',
    'SafeRunner',
    'SeedAugmentation',
    'SeedIterationHook',
    'Segmentation',
    'Segmentor',
    'StopOnNonFiniteLossHook',
    'TOKEN_MIXERS',
    'TolerantValLoop',
    'UseKernelsHook',
    'UserError',
    'ValidationSamplesHook',
    '__version__',
    'config_path',
    'get_config',
    'get_model',
    'late_upsample',
    'optimize_for_inference',
    'trusting_checkpoints',
    'use_kernels',
]
