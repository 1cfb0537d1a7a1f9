"""InceptionNeXt for MMSegmentation. Importing the package registers its classes in mmseg's registries."""

import contextlib
import io
import sys
import warnings

# This file is run before `python -m mmseg_inceptionnext doctor` is, which is for when nothing below can be imported.
# `-m` stands there until Python has found what it is to run; that it is this package, Python 3.9 would not say.
if sys.argv[:2] == ['-m', 'doctor'] and __name__ in getattr(sys, 'orig_argv', [__name__]):
    from mmseg_inceptionnext import doctor

    sys.exit(doctor.main(sys.argv[2:]))

# Importing mmseg prints two lines about a data service and warns of a compiled operator that nothing here needs.
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    try:
        import mmseg.datasets
        import mmseg.models  # noqa: F401
    except Exception as error:  # mmseg asserts versions, compiled libraries raise what they like
        raise ImportError(
            f'mmseg cannot be imported ({type(error).__name__}: {error}): `python -m mmseg_inceptionnext doctor` says '
            'what is wrong and what to do'
        ) from error

from mmseg_inceptionnext.checkpoints import trusting_checkpoints
from mmseg_inceptionnext.data.check import CheckAnnotation
from mmseg_inceptionnext.data.guard import ReadImage
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation import PerClassIoUMetric
from mmseg_inceptionnext.hub import get_config, get_model
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.models.inceptionnext import InceptionNeXt
from mmseg_inceptionnext.models.label_map_segmentor import LabelMapSegmentor
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleUPerHead
from mmseg_inceptionnext.models.pvt import PVT
from mmseg_inceptionnext.registry import REGISTRIES  # noqa: F401
from mmseg_inceptionnext.report.confusion import ConfusionMetric
from mmseg_inceptionnext.report.overlay import OverlayHook, ValidationSamplesHook
from mmseg_inceptionnext.segmentor import Segmentation, Segmentor
from mmseg_inceptionnext.training.batch import AccumulatingTrainLoop
from mmseg_inceptionnext.training.checkpoint_hook import SafeCheckpointHook
from mmseg_inceptionnext.training.mixed_precision import BFloat16OptimWrapper
from mmseg_inceptionnext.training.non_finite_loss import StopOnNonFiniteLossHook
from mmseg_inceptionnext.training.reproducible import (
    ReproducibleInfiniteSampler,
    SeedAugmentation,
    SeedIterationHook,
)
from mmseg_inceptionnext.training.runner import SafeRunner
from mmseg_inceptionnext.training.tolerant_val_loop import TolerantValLoop
from mmseg_inceptionnext.version import __version__

__all__ = [
    'AccumulatingTrainLoop',
    'BFloat16OptimWrapper',
    'PVT',
    'CheckAnnotation',
    'ConfusionMetric',
    'InceptionNeXt',
    'LabelMapSegmentor',
    'LateUpsampleUPerHead',
    'OverlayHook',
    'PerClassIoUMetric',
    'ReadImage',
    'ReproducibleInfiniteSampler',
    'SafeCheckpointHook',
    'SafeRunner',
    'SeedAugmentation',
    'SeedIterationHook',
    'Segmentation',
    'Segmentor',
    'StopOnNonFiniteLossHook',
    'TolerantValLoop',
    'UserError',
    'ValidationSamplesHook',
    '__version__',
    'get_config',
    'get_model',
    'optimize_for_inference',
    'trusting_checkpoints',
]
