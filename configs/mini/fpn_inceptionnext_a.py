# InceptionNeXt-A with a narrow Semantic FPN, from scratch on the embedded data set: minutes on two cores.
_base_ = [
    '../_base_/models/fpn_inceptionnext_t.py',
    '../_base_/datasets/mini_ade20k.py',
    '../_base_/schedules/mini.py',
    '../_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(arch='atto', layer_scale_init_value=1.0),  # blocks that start as identity learn too slowly here
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=96),
    decode_head=dict(in_channels=[96, 96, 96, 96], channels=64),
)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
