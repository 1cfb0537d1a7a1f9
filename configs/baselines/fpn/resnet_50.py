# ResNet-50 with the stem of three 3×3 convolutions (V1c), which is what the paper's 46 GMACs belong to.
_base_ = '../../fpn/inceptionnext_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNetV1c',
        depth=50,
        norm_cfg={{_base_.norm_cfg}},
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
