"""Use a trained segmentor: make it fast, segment images in Python, segment files, run exported files."""

from mmseg_inceptionnext.inference.optimize import optimize_for_inference

__all__ = ['optimize_for_inference']
