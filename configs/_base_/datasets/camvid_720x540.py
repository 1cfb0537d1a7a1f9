# CamVid's images enlarged to 720×540: stride 4 is too coarse for the poles of 480×360.
_base_ = './camvid.py'
test_scale = (720, 540)

train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='ReadMask'),
    dict(type='RandomResize', scale=test_scale, ratio_range=(0.6, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size={{_base_.crop_size}}, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=test_scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='ReadMask'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [dict(type='MultiScaleTest', pipeline=test_pipeline)]  # of mmseg's test.py --tta
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
