"""Evaluate a trained segmentor: metrics, reports, and pictures of what it predicts."""

from mmseg_inceptionnext.evaluation.evaluate import evaluate

__all__ = ['evaluate']
