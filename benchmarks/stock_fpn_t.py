# mmseg's Semantic FPN on timm's InceptionNeXt-T.
_base_ = ['../configs/fpn/inceptionnext_t.py', './stock_backbone.py']
model = dict(backbone=dict(_delete_=True, **_base_.stock_backbone))
