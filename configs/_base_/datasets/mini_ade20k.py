_base_ = './ade20k.py'
train_images = 64
crop_size = (128, 128)
test_scale = (640, 160)

train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='CheckAnnotation', num_classes={{_base_.num_classes}}),
    dict(type='RandomResize', scale=test_scale, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=test_scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='CheckAnnotation', num_classes={{_base_.num_classes}}),
    dict(type='PackSegInputs'),
]
tta_pipeline = [dict(type='MultiScaleTest', pipeline=test_pipeline)]  # of mmseg's test.py --tta
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(data_root='data/mini_ade20k', pipeline=train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root='data/mini_ade20k', pipeline=test_pipeline))
test_dataloader = val_dataloader
