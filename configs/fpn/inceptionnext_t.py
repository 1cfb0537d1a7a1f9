_base_ = [
    '../_base_/models/fpn_inceptionnext_t.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/fpn_40k.py',
    '../_base_/default_runtime.py',
]
train_dataloader = dict(batch_size=4)  # of 32 = 8 GPUs × 4
model = dict(
    backbone=dict(
        drop_path_rate=0.1,  # Table 10
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_tiny.pth',
        ),
    )
)
# Test sizes are rounded up to a multiple of 32, as PVT and PoolFormer do.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={{_base_.test_scale}}, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='CheckAnnotation', num_classes={{_base_.num_classes}}),
    dict(type='PackSegInputs'),
]
tta_pipeline = [dict(type='MultiScaleTest', pipeline=test_pipeline)]  # of mmseg's test.py --tta
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
