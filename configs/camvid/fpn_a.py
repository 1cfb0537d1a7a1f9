# InceptionNeXt-A with a narrow Semantic FPN on CamVid at 720×540, from a model of fpn_a_half (docs/camvid.md).
_base_ = [
    '../_base_/models/fpn_inceptionnext_t.py',
    '../_base_/datasets/camvid_720x540.py',
    '../_base_/schedules/camvid.py',
    '../_base_/default_runtime.py',
]
# Thin things weigh more than by the inverse root of their pixels (chosen on val, docs/camvid.md).
class_weight = [0.3431, 0.292, 3.5, 0.2503, 0.6649, 0.4516, 2.0, 0.9, 0.5815, 1.7614, 2.0]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(arch='atto', layer_scale_init_value=1.0, drop_path_rate=0.05),  # see configs/mini
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64], channels=64, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=64,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4, class_weight=class_weight),
    ),
)
# Half the batch and half the learning rate: with little time, more steps are worth more than larger ones.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_iters=5200, val_interval=1300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineRestartLR', periods=[3800, 1300], restart_weights=[1, 0.7], eta_min=0, by_epoch=False, begin=100),
]
default_hooks = dict(checkpoint=dict(interval=650))
auto_scale_lr = dict(base_batch_size=4)  # 1 × 4
