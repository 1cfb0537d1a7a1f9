"""Run the test loop of a config: mIoU, mean and overall accuracy, IoU and accuracy of each class."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.model import is_model_wrapper
from mmseg.models.segmentors import EncoderDecoder
from torch import nn

from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.config_files import is_classifier, require
from mmseg_inceptionnext.console import say
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.data.ignore_index import use_one_ignore_index
from mmseg_inceptionnext.data.pipeline import missing_ground_truth, remove_ground_truth, use_multi_scale
from mmseg_inceptionnext.distributed import init_process_group
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.evaluation.boundary import BoundaryIoUMetric
from mmseg_inceptionnext.evaluation.calibration import CalibrationMetric, TemperatureMetric
from mmseg_inceptionnext.evaluation.exported import ExportedSegmentor
from mmseg_inceptionnext.evaluation.metrics import ConfusionMetric, PerClassIoUMetric, mean_of_classes, rounded
from mmseg_inceptionnext.evaluation.report import write_report
from mmseg_inceptionnext.files import file_digest
from mmseg_inceptionnext.inference.multi_scale_segmentor import MultiScaleSegmentor
from mmseg_inceptionnext.inference.onnx_model import is_onnx
from mmseg_inceptionnext.inference.optimize import made_for
from mmseg_inceptionnext.inference.precision import AutoPrecision, check_precision
from mmseg_inceptionnext.inference.temperature import read_temperature, temperature_file, write_temperature
from mmseg_inceptionnext.labels import check_same_classes
from mmseg_inceptionnext.models.weights import load_classifier, load_segmentor
from mmseg_inceptionnext.training.runner import SafeRunner


def evaluate(cfg: Config, checkpoint: str | Path, out: str | Path | None = None, show_dir: str | Path | None = None,
             fast: bool = True, tta: bool = False, report: str | Path | None = None,
             report_images: int = 5, need_figures: bool = True, precision: str = 'fp32',
             details: bool = False, temperature: str | None = None,
             on_figures: Callable[[dict], None] = lambda figures: None) -> dict | None:  # fmt: skip
    """Evaluate a trained segmentor on the test set; or a classifier, in fp32 and by the metrics of its config alone.

    Args:
        cfg: A whole config, with ``work_dir`` set; it stays as it is.
        checkpoint: Path of a segmentor trained with the config; every key and shape must agree. Or of an .onnx file
            that ``tools/export.py`` has made of one, which computes as it was exported to. Of a classifier, also what
            :func:`~mmseg_inceptionnext.models.weights.load_classifier` takes.
        out: Folder for predicted label maps, as PNGs in the coding of the data set's annotations.
        show_dir: Folder for pictures of image, ground truth and prediction.
        fast: Apply :func:`~mmseg_inceptionnext.inference.optimize_for_inference` to the model first.
        tta: Multi-scale test with mirror images, see :func:`~mmseg_inceptionnext.data.pipeline.use_multi_scale`.
        report: Folder for a page of metrics and pictures, see :mod:`mmseg_inceptionnext.evaluation.report`.
        report_images: How many of the worst, the median and the best images the page shows.
        need_figures: Raise if there is no ground truth. Otherwise predict without it, for ``out`` or
            ``show_dir``. There is none if the config has ``test_evaluator.format_only`` or no ``seg_map_path``, or if
            that folder does not exist.
        precision: 'fp32', 'bf16', or 'auto': the faster of the two, which race for about a second on the first images.
        details: Compute calibration and boundary IoU as well; with a report always. A file that returns labels alone
            has no calibration.
        temperature: 'fit': fit one on the validation set first, and store it beside the checkpoint
            (:mod:`mmseg_inceptionnext.inference.temperature`). A stored one is used for the calibration; a multi-scale
            test averages probabilities without it.
        on_figures: Called with what is returned before the report is written, which may fail.

    Returns:
        ``{'mIoU', 'mAcc', 'aAcc', 'per_class': {name: {'IoU', 'Acc'}}}`` in percent, and all other metrics that the
        config asks for, such as 'mDice' and 'Dice' of each class. IoU is None for a class that is neither in the ground
        truth nor predicted, Acc for one that is not in the ground truth. Without ground truth, None instead of the
        dict. With details, 'mBoundaryIoU' and 'BoundaryIoU' of each class, 'ECE', and under 'calibration' what
        :func:`~mmseg_inceptionnext.evaluation.calibration.calibration` returns, and the temperature. Of a classifier,
        ``{'accuracy/top1', 'accuracy/top5'}`` in percent.

    Raises:
        UserError: The data set, the checkpoint, the file or the metric cannot be read or does not fit the config,
            there is no such precision, or what is to be written would replace something else.
    """
    check_precision(precision)
    if out is not None and show_dir is not None and os.path.realpath(out) == os.path.realpath(show_dir):
        raise UserError(
            f'out and show_dir={str(show_dir)!r} are one folder, where files of one name would clash: '
            'choose another for one of them'
        )
    if temperature not in (None, 'fit'):
        raise UserError(f"temperature={temperature!r} must be 'fit', or be left out")
    require(cfg, 'model', 'test_dataloader', 'test_evaluator', 'test_cfg')
    cfg = copy.deepcopy(cfg)
    if is_classifier(cfg):
        for name, value in dict(out=out, show_dir=show_dir, tta=tta, report=report, temperature=temperature).items():
            if value:
                shown = value if isinstance(value, bool) else str(value)
                raise UserError(f'{name}={shown!r} is for segmentors, the config is of a classifier: drop it')
        if precision != 'fp32':
            raise UserError(f'precision={precision!r} is for segmentors, a classifier is tested in fp32: drop it')
        return _evaluate_classifier(cfg, checkpoint, on_figures)
    use_one_ignore_index(cfg)
    metric_cfg = _iou_metric(cfg)
    no_truth = missing_ground_truth(cfg.test_dataloader.dataset)
    if no_truth is None and metric_cfg.get('format_only'):
        no_truth = 'test_evaluator.format_only is set'
    if no_truth:
        remove_ground_truth(cfg.test_dataloader.dataset)
        if need_figures:
            check_data(cfg, 'test')  # images or the whole data set may be missing, too
            raise UserError(f'{no_truth}, so there are no metrics: correct it, or pass only out=DIR or show_dir=DIR')
        metric_cfg.format_only = True
    if tta:
        use_multi_scale(cfg.test_dataloader.dataset)
    check_data(cfg, 'test')
    exported = content = None
    if is_onnx(checkpoint):
        for name, value in dict(tta=tta, temperature=temperature, precision=precision != 'fp32' and precision).items():
            if value:
                raise UserError(f'{name}={value!r} is for checkpoints, {checkpoint} is an exported file: drop it')
        exported = ExportedSegmentor(checkpoint, cfg)
    else:
        content = read_checkpoint(checkpoint)
    # Now: a training that goes on may replace the file.
    digest = file_digest(Path(checkpoint).expanduser()) if report is not None or temperature == 'fit' else None
    init_process_group(cfg.get('launcher', 'none'), cfg.get('env_cfg', {}).get('dist_cfg'))
    if out is not None:
        metric_cfg.output_dir = str(out)
    elif no_truth:
        cfg.test_evaluator = []  # pictures alone
    kept = {'ignore_index': metric_cfg.ignore_index} if 'ignore_index' in metric_cfg else {}
    if temperature == 'fit':
        _fit_temperature(cfg, content, checkpoint, digest, fast, precision, kept)
    temperature = exported.temperature if exported else 1.0 if tta else read_temperature(checkpoint)
    details = (details or report is not None) and not no_truth
    is_sure = details and (exported is None or exported.is_sure)
    if report is not None:
        cfg.test_evaluator = [*_listed(cfg.test_evaluator), dict(type='ConfusionMetric', **kept)]
    if details:
        cfg.test_evaluator = [*_listed(cfg.test_evaluator), dict(type='BoundaryIoUMetric', **kept)]
    if is_sure:
        cfg.test_evaluator.append(dict(type='CalibrationMetric', temperature=temperature, **kept))
    if show_dir is not None:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='OverlayHook', out_dir=str(show_dir))]

    if exported:
        runner = _bare_runner(cfg)
        runner.model = exported
    else:
        runner = _runner(cfg, content, checkpoint, fast, tta, precision)
    if out is not None or show_dir is not None:
        _check_outputs(runner.test_dataloader.dataset, [folder for folder in (out, show_dir) if folder is not None])
    metrics = runner.test()
    if no_truth:
        return None
    if not is_main_process():
        return {}
    figures = dict(_metric(runner, PerClassIoUMetric).figures)
    per_class = figures.pop('per_class')
    figures |= {key: float(value) for key, value in metrics.items() if key not in figures and isinstance(value, Real)}
    if details:
        ious = _metric(runner, BoundaryIoUMetric).ious
        for row, iou in zip(per_class.values(), ious, strict=True):
            others = {key: row.pop(key) for key in list(row) if key != 'IoU'}
            row |= dict(BoundaryIoU=rounded(iou)) | others
        figures['mBoundaryIoU'] = rounded(mean_of_classes(ious))
    calibration = {}
    if is_sure:
        found = dict(_metric(runner, CalibrationMetric).figures)
        figures['ECE'] = found.pop('ECE')
        calibration = dict(calibration=found | dict(temperature=temperature))
    figures |= dict(per_class=per_class, **calibration)
    on_figures(figures)
    if report is not None:
        images, meta = _metric(runner, ConfusionMetric).images, runner.test_dataloader.dataset.metainfo
        write_report(report, figures, images, meta, cfg, checkpoint, report_images, digest)
    return figures


def _evaluate_classifier(cfg: Config, checkpoint: str | Path, on_figures: Callable[[dict], None]) -> dict:
    check_data(cfg, 'test')
    init_process_group(cfg.get('launcher', 'none'), cfg.get('env_cfg', {}).get('dist_cfg'))
    runner = _bare_runner(cfg)
    content = load_classifier(runner.model, checkpoint)
    check_same_classes(content, checkpoint, runner.test_dataloader.dataset.metainfo['classes'])
    metrics = runner.test()
    figures = {key: round(value, 2) for key, value in metrics.items() if isinstance(value, Real)}
    if is_main_process():
        on_figures(figures)
    return figures


def _bare_runner(cfg: Config) -> SafeRunner:
    # The weights of a checkpoint are the averages already.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook.get('type') != 'EMAHook']
    cfg.update(resume=False, load_from=None)  # the config may be one that a resumed run has written
    return SafeRunner.from_cfg(cfg)


def _runner(cfg: Config, content: dict, checkpoint: str | Path, fast: bool, tta: bool, precision: str) -> SafeRunner:
    """Return a runner whose model is ready for the test loop."""
    runner = _bare_runner(cfg)
    load_segmentor(runner.model, content, checkpoint)
    check_same_classes(content, checkpoint, runner.test_dataloader.dataset.metainfo['classes'])
    if is_model_wrapper(runner.model):
        runner.model.module = _prepared(runner.model.module, fast, tta, precision)
    else:
        runner.model = _prepared(runner.model, fast, tta, precision)
    return runner


def _fit_temperature(cfg: Config, content: dict, checkpoint: str | Path, digest: str, fast: bool, precision: str,
                     kept: dict) -> None:  # fmt: skip
    """Fit a temperature on the validation set, and store it beside the checkpoint."""
    require(cfg, 'val_dataloader')
    cfg, folder = copy.deepcopy(cfg), temperature_file(checkpoint).parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"temperature='fit' is kept beside the checkpoint, but {folder} cannot be written: copy it")
    if no_truth := missing_ground_truth(cfg.val_dataloader.dataset):
        raise UserError(f"temperature='fit' needs the masks of the validation set, but {no_truth}: correct it")
    cfg.test_dataloader, cfg.custom_hooks = cfg.val_dataloader, []
    check_data(cfg, 'test')
    cfg.test_evaluator = [dict(type='TemperatureMetric', **kept)]
    runner = _runner(cfg, content, checkpoint, fast, False, precision)
    metric = _metric(runner, TemperatureMetric)
    metric.spread_over(len(runner.test_dataloader.dataset))
    runner.test()
    if is_main_process():
        text = '{temperature}: on {pixels} pixels, the negative log-likelihood is {nll_after:.4f}, not {nll_before:.4f}'
        say(f'temperature {text.format(**metric.fitted)}. It is kept in {temperature_file(checkpoint)}')
        write_temperature(checkpoint, metric.fitted, digest)
    barrier()


def _metric(runner: SafeRunner, kind: type) -> BaseMetric:
    return next(metric for metric in runner.test_evaluator.metrics if isinstance(metric, kind))


def _listed(evaluator: dict | list) -> list:
    return evaluator if isinstance(evaluator, list) else [evaluator]


def _prepared(segmentor: nn.Module, fast: bool, tta: bool, precision: str) -> nn.Module:
    """Apply ``fast``, ``tta`` and ``precision`` to a trained segmentor."""
    if tta and not isinstance(segmentor, EncoderDecoder):  # mmseg has others, whose parts have other names
        raise UserError(f'tta=True is for an EncoderDecoder, the model is a {type(segmentor).__name__}: drop it')

    def make(precision: str) -> nn.Module:
        made = made_for(segmentor, precision, fast)
        return MultiScaleSegmentor(made) if tta else made

    return AutoPrecision(make, get_device(), say) if precision == 'auto' else make(precision)


def _iou_metric(cfg: Config) -> dict:
    """Return the config of the IoU metric, changed to :class:`PerClassIoUMetric`."""
    for metric in _listed(cfg.test_evaluator):
        if metric.type in ('IoUMetric', 'PerClassIoUMetric'):
            metric.type = 'PerClassIoUMetric'
            return metric
    raise UserError("test_evaluator has no IoU metric: add dict(type='PerClassIoUMetric', iou_metrics=['mIoU'])")


def _check_outputs(dataset, folders: Sequence[str | Path]) -> None:
    """Check that outputs, which are named after the images, replace neither each other nor the data set."""
    paths: dict[str, str] = {}
    outputs, inputs = {os.path.realpath(folder) for folder in folders}, set()
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        path = info['img_path']
        inputs |= {os.path.dirname(name) for name in (path, info.get('seg_map_path')) if name}
        if (other := paths.setdefault(Path(path).stem, path)) != path:
            raise UserError(f'{other} and {path} have the same name, so their outputs would clash: rename one')
    if own := [folder for folder in inputs if os.path.realpath(folder) in outputs]:
        raise UserError(f'{own[0]} is a folder of the data set, which outputs would become part of: choose another')
