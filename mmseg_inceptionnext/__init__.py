"""InceptionNeXt for MMSegmentation. Importing the package registers its classes in mmseg's registries."""

import contextlib
import io
import warnings

# Importing mmseg prints two lines about a data service and warns of a compiled operator that nothing here needs.
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    import mmseg.datasets
    import mmseg.models  # noqa: F401

from mmseg_inceptionnext.checkpoints import trusting_checkpoints
from mmseg_inceptionnext.data.check import CheckAnnotation
from mmseg_inceptionnext.data.guard import ReadImage
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation import PerClassIoUMetric
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.models.inceptionnext import InceptionNeXt
from mmseg_inceptionnext.models.label_map_segmentor import LabelMapSegmentor
from mmseg_inceptionnext.models.late_upsample_uper_head import LateUpsampleUPerHead
from mmseg_inceptionnext.models.pvt import PVT
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
    'optimize_for_inference',
    'trusting_checkpoints',
]
