# PVT-Small; the recipe around the backbone is that of InceptionNeXt.
_base_ = '../../fpn/inceptionnext_t.py'
model = dict(
    backbone=dict(_delete_=True, type='PVT', arch='small', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
