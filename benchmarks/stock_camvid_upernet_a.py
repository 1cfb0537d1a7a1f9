# What camvid/upernet_a is with mmseg and timm alone, for mmseg's own tools/train.py: model, pipeline, loops and hooks.
scale, crop_size = (480, 360), (320, 320)
norm_cfg = dict(type='SyncBN', requires_grad=True)
cross_entropy = dict(type='CrossEntropyLoss', use_sigmoid=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=crop_size,
        pad_val=0,
        seg_pad_val=11,
    ),
    backbone=dict(
        type='TIMMBackbone',
        model_name='inception_next_atto',
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2, 3),
        ls_init_value=1.0,
        drop_path_rate=0.05,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[40, 80, 160, 320],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=128,
        dropout_ratio=0.1,
        num_classes=11,
        ignore_index=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(cross_entropy, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=160,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        ignore_index=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(cross_entropy, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=11),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 384), keep_ratio=False),  # whole multiples of 32, as ours
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# mmseg takes the masks as they are: 11, unlabelled, is what losses and metric ignore.
camvid = dict(
    type='BaseSegDataset',
    data_root='data/camvid',
    img_suffix='.png',
    metainfo=dict(
        classes=[
            'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian',
            'Bicyclist',
        ]
    ),
)  # fmt: skip
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(camvid, data_prefix=dict(img_path='train', seg_map_path='trainannot'), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(camvid, data_prefix=dict(img_path='val', seg_map_path='valannot'), pipeline=test_pipeline),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(camvid, data_prefix=dict(img_path='test', seg_map_path='testannot'), pipeline=test_pipeline),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=11)
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6000, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=200, end=6000),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=6000),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
log_processor = dict(by_epoch=False)
default_scope = 'mmseg'
