_base_ = './poolformer_s24.py'
model = dict(
    backbone=dict(model_name='poolformer_m36'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
