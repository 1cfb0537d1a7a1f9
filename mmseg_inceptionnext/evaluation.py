"""Evaluate a trained segmentor: mIoU, mean and overall accuracy, and both figures of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.model import is_model_wrapper
from mmseg.evaluation import IoUMetric
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import METRICS
from torch import nn

from mmseg_inceptionnext.checkpoints import read_checkpoint
from mmseg_inceptionnext.config import fit_to_device, require
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.data.pipeline import lacks_truth, leave_truth_out, use_multi_scale
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.models.multi_scale_segmentor import MultiScaleSegmentor
from mmseg_inceptionnext.processes import meet
from mmseg_inceptionnext.report.confusion import HEADLINE, ConfusionMetric
from mmseg_inceptionnext.report.page import write_report
from mmseg_inceptionnext.training.runner import SafeRunner
from mmseg_inceptionnext.weights import load_segmentor


@METRICS.register_module()
class PerClassIoUMetric(IoUMetric):
    """mmseg's IoUMetric, which prints the figures of each class, and keeps them too.

    Attributes:
        figures (dict): After an evaluation, what :func:`evaluate` returns. Of several processes, only the first
            computes it.
    """

    figures: dict = {}

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if not self.format_only:
            ratios = self.total_area_to_metrics(*(sum(areas) for areas in zip(*results, strict=True)), ['mIoU'])
            names = (name.strip() for name in self.dataset_meta['classes'])
            self.figures = {
                **{key: _rounded(metrics[key]) for key in HEADLINE},
                'per_class': {
                    name: {'IoU': _rounded(100 * iou), 'Acc': _rounded(100 * acc)}
                    for name, iou, acc in zip(names, ratios['IoU'], ratios['Acc'], strict=True)
                },
            }
        return metrics


def _rounded(percent: float) -> float | None:
    """Two decimals, as mmseg prints; None, which JSON has a word for, instead of NaN."""
    return None if np.isnan(percent) else round(float(percent), 2)


def evaluate(cfg: Config, checkpoint: str | Path, out: str | Path | None = None, show_dir: str | Path | None = None,
             fast: bool = True, tta: bool = False, report: str | Path | None = None,
             report_images: int = 5, need_figures: bool = True) -> dict | None:  # fmt: skip
    """Run the test loop of a config.

    Args:
        cfg: A whole config, with ``work_dir`` set.
        checkpoint: A segmentor trained with it; every key and shape must agree.
        out: Folder for predicted label maps, as PNGs in the coding of the data set's annotations.
        show_dir: Folder for pictures of image, truth and prediction.
        fast: Evaluate what :func:`~mmseg_inceptionnext.inference.optimize_for_inference` makes of the model.
        tta: Multi-scale test with mirror images, see :func:`~mmseg_inceptionnext.data.pipeline.use_multi_scale`.
        report: Folder for a page of figures and pictures, see :mod:`mmseg_inceptionnext.report.page`.
        report_images: How many of the worst, median and best images the page shows.
        need_figures: Where there is no ground truth, stop at once. Else predict all the same, for ``out`` or
            ``show_dir``. A config says that there is none by ``test_evaluator.format_only`` or by naming no
            ``seg_map_path``, a data set by not having the folder that is named.

    Returns:
        ``{'mIoU', 'mAcc', 'aAcc', 'per_class': {name: {'IoU', 'Acc'}}}`` in percent; None where a class is neither in
        the ground truth nor predicted (IoU), or not in the ground truth (Acc). None instead of it all where there is no
        ground truth.

    Raises:
        UserError: the data set, the checkpoint or the metric cannot be read or does not fit the config.
    """
    require(cfg, 'model', 'test_dataloader', 'test_evaluator', 'test_cfg')
    metric_cfg = _iou_metric(cfg)
    no_truth = lacks_truth(cfg.test_dataloader.dataset)
    if no_truth is None and metric_cfg.get('format_only'):
        no_truth = 'test_evaluator.format_only is set'
    if no_truth:
        leave_truth_out(cfg.test_dataloader.dataset)
        if need_figures:
            check_data(cfg, 'test')  # images or the whole data set may be missing, too
            raise UserError(f'{no_truth}, so there are no figures: ask for --out or --show-dir alone, or mend that')
        metric_cfg.format_only = True
    if tta:
        use_multi_scale(cfg.test_dataloader.dataset)
    check_data(cfg, 'test')
    content = read_checkpoint(checkpoint)
    fit_to_device(cfg)
    meet(cfg)
    if out is not None:
        metric_cfg.output_dir = str(out)
    elif no_truth:
        cfg.test_evaluator = []  # pictures alone
    if report is not None:
        cfg.test_evaluator = [*_listed(cfg.test_evaluator), dict(type='ConfusionMetric')]
    if show_dir is not None:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='OverlayHook', out_dir=str(show_dir))]

    cfg.update(resume=False, load_from=None)  # the config may be one that a resumed run has written
    runner = SafeRunner.from_cfg(cfg)
    load_segmentor(runner.model, content, checkpoint, ARCHS)
    if is_model_wrapper(runner.model):
        runner.model.module = _prepared(runner.model.module, fast, tta)
    else:
        runner.model = _prepared(runner.model, fast, tta)
    if out is not None or show_dir is not None:
        _check_names_differ(runner.test_dataloader.dataset)
    runner.test()
    if no_truth:
        return None
    figures = _metric(runner, PerClassIoUMetric).figures
    if report is not None and is_main_process():
        images = _metric(runner, ConfusionMetric).images
        write_report(report, figures, images, runner.test_dataloader.dataset.metainfo, cfg, checkpoint, report_images)
    return figures


def _metric(runner: SafeRunner, kind: type) -> BaseMetric:
    return next(metric for metric in runner.test_evaluator.metrics if isinstance(metric, kind))


def _listed(evaluator: dict | list) -> list:
    return evaluator if isinstance(evaluator, list) else [evaluator]


def _prepared(segmentor: nn.Module, fast: bool, tta: bool) -> nn.Module:
    """What is evaluated in the place of a trained segmentor."""
    if not isinstance(segmentor, EncoderDecoder):  # mmseg has others, whose parts have other names
        if tta:
            raise UserError(f'--tta is for an EncoderDecoder, and the model is a {type(segmentor).__name__}: drop it')
        return segmentor
    if fast:
        segmentor = optimize_for_inference(segmentor)
    return MultiScaleSegmentor(segmentor) if tta else segmentor


def _iou_metric(cfg: Config) -> dict:
    """The config of the IoU metric; mmseg's own, which other configs have, is replaced by ours."""
    for metric in _listed(cfg.test_evaluator):
        if metric.type in ('IoUMetric', 'PerClassIoUMetric'):
            metric.type = 'PerClassIoUMetric'
            metric.iou_metrics = ['mIoU', *(name for name in metric.get('iou_metrics', []) if name != 'mIoU')]
            return metric
    raise UserError("test_evaluator has no IoU metric: add dict(type='PerClassIoUMetric', iou_metrics=['mIoU'])")


def _check_names_differ(dataset) -> None:
    """What is written for an image has the image's name; two of the same name in different folders would collide."""
    paths: dict[str, str] = {}
    for i in range(len(dataset)):
        path = dataset.get_data_info(i)['img_path']
        if (other := paths.setdefault(Path(path).stem, path)) != path:
            raise UserError(f'{other} and {path} have the same name, and so would what is written for them: rename one')
