"""Export a trained segmentor to ONNX or torch.export."""

from mmseg_inceptionnext.export.export import export

__all__ = ['export']
