# InceptionNeXt-A with a narrow Semantic FPN on CamVid, from scratch; to train with --amp --ema --class-weights auto.
_base_ = [
    '../_base_/models/fpn_inceptionnext_t.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/camvid.py',
    '../_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(arch='atto', layer_scale_init_value=1.0, drop_path_rate=0.05),  # see configs/mini
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=128),
    decode_head=dict(in_channels=[128, 128, 128, 128], num_classes=11),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=128,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
)
default_hooks = dict(checkpoint=dict(interval=500))
