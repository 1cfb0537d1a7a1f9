# What mmseg's users build without this project: its UPerHead and EncoderDecoder on timm's InceptionNeXt-T.
_base_ = ['../configs/upernet/inceptionnext_t.py', './stock_backbone.py']
model = dict(backbone=dict(_delete_=True, **_base_.stock_backbone), decode_head=dict(type='UPerHead'))
