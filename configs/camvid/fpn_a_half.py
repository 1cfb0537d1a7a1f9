# The first part of fpn_a's training, on smaller images: a crop has 0.36 of the pixels of fpn_a's.
_base_ = './fpn_a.py'
crop_size = (192, 192)
model = dict(data_preprocessor=dict(size=crop_size))
train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='ReadMask'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.5, 1.35), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='ReadMask'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [dict(type='MultiScaleTest', pipeline=test_pipeline)]  # of mmseg's test.py --tta
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_iters=2000, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=0.9, eta_min=5e-4, by_epoch=False, begin=200, end=2000),
]
auto_scale_lr = dict(base_batch_size=8)  # 1 × 8
