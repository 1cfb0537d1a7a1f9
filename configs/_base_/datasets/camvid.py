# CamVid with 11 classes at 480×360: 367 images to train on, 101 to validate, 233 to test (docs/camvid.md).
_base_ = './ade20k.py'
data_root = 'data/camvid'
train_images = 367
num_classes = 11
crop_size = (320, 320)
test_scale = (480, 360)

train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='ReadMask'),
    dict(type='RandomResize', scale=test_scale, ratio_range=(0.75, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
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
camvid = dict(
    type='MaskDataset',
    data_root=data_root,
    metainfo=dict(
        classes=[
            'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian',
            'Bicyclist',
        ],
        palette=[
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
            [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
        labels=[[i] for i in range(num_classes)],
        ignored=[11, 255],
    ),
)  # fmt: skip
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(camvid, data_prefix=dict(img_path='train', seg_map_path='trainannot'), pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(camvid, data_prefix=dict(img_path='val', seg_map_path='valannot'), pipeline=test_pipeline),
)
test_dataloader = dict(
    num_workers=1,
    dataset=dict(camvid, data_prefix=dict(img_path='test', seg_map_path='testannot'), pipeline=test_pipeline),
)
