"""Evaluate a trained segmentor: mIoU, mean and overall accuracy, and both figures of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import METRICS

from mmseg_inceptionnext.config import fit_to_device, require
from mmseg_inceptionnext.data.check import check_data
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.models.inceptionnext import ARCHS
from mmseg_inceptionnext.weights import check_fits, read_checkpoint


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
                **{key: _rounded(metrics[key]) for key in ('mIoU', 'mAcc', 'aAcc')},
                'per_class': {
                    name: {'IoU': _rounded(100 * iou), 'Acc': _rounded(100 * acc)}
                    for name, iou, acc in zip(names, ratios['IoU'], ratios['Acc'], strict=True)
                },
            }
        return metrics


def _rounded(percent: float) -> float | None:
    """Two decimals, as mmseg prints; None, which JSON has a word for, instead of NaN."""
    return None if np.isnan(percent) else round(float(percent), 2)


def evaluate(cfg: Config, checkpoint: str | Path, out: str | None = None, show_dir: str | None = None,
             fast: bool = True) -> dict:  # fmt: skip
    """Run the test loop of a config.

    Args:
        cfg: A whole config, with ``work_dir`` set.
        checkpoint: A segmentor trained with it; every key and shape must agree.
        out: Folder for predicted label maps, as PNGs in the coding of the data set's annotations.
        show_dir: Folder for pictures of image, truth and prediction.
        fast: Evaluate what :func:`~mmseg_inceptionnext.inference.optimize_for_inference` makes of the model.

    Returns:
        ``{'mIoU', 'mAcc', 'aAcc', 'per_class': {name: {'IoU', 'Acc'}}}`` in percent; None where a class is neither in
        the ground truth nor predicted (IoU), or not in the ground truth (Acc).

    Raises:
        UserError: the data set, the checkpoint or the metric cannot be read or does not fit the config.
    """
    require(cfg, 'model', 'test_dataloader', 'test_evaluator', 'test_cfg')
    check_data(cfg, 'test')
    content = read_checkpoint(checkpoint)
    fit_to_device(cfg)
    metric_cfg = _iou_metric(cfg)
    if out is not None:
        metric_cfg.output_dir = str(out)
    if show_dir is not None:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='OverlayHook', out_dir=str(show_dir))]

    runner = Runner.from_cfg(cfg)
    check_fits(runner.model, content, checkpoint, ARCHS)
    runner.load_checkpoint(str(checkpoint), map_location='cpu', strict=True)
    if fast:
        _make_fast(runner)
    if out is not None or show_dir is not None:
        _check_names_differ(runner.test_dataloader.dataset)
    runner.test()
    return next(m for m in runner.test_evaluator.metrics if isinstance(m, PerClassIoUMetric)).figures


def _make_fast(runner: Runner) -> None:
    distributed = is_model_wrapper(runner.model)
    model = runner.model.module if distributed else runner.model
    if not isinstance(model, EncoderDecoder):
        return  # mmseg has others, whose parts have other names
    if distributed:
        runner.model.module = optimize_for_inference(model)
    else:
        runner.model = optimize_for_inference(model)


def _iou_metric(cfg: Config) -> dict:
    """The config of the IoU metric; mmseg's own, which other configs have, is replaced by ours."""
    evaluator = cfg.test_evaluator
    for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
        if metric.type in ('IoUMetric', 'PerClassIoUMetric'):
            if metric.get('format_only'):
                raise UserError('test_evaluator.format_only computes no figures: drop it, --out writes the label maps')
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
