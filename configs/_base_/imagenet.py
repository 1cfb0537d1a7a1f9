# Table 9's recipe for T, S and B. Where it leaves something open, "train.py" marks what the released train.py does:
# timm 0.6.11's with DeiT's values: https://github.com/sail-sg/inceptionnext. An epoch is 312.8 iterations.
_base_ = './default_runtime.py'
custom_imports = dict(imports=['mmseg_inceptionnext', 'mmseg_inceptionnext.models.classifier'])
default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer')
tta_model = dict(type='AverageClsScoreTTA')
custom_hooks = [dict(type='SeedIterationHook'), dict(type='StopOnNonFiniteLossHook')]
default_hooks = dict(
    checkpoint=dict(interval=3128, save_best='accuracy/top1'),
    visualization=dict(
        _delete_=True, type='VisualizationHook'
    ),  # draws nothing, unless mmpretrain's test.py asks it to
)

mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
bgr_mean, bgr_std = mean[::-1], std[::-1]
model = dict(
    type='ImageNetClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=mean, std=std, to_rgb=True),
    backbone=dict(
        type='InceptionNeXt',
        arch='tiny',
        drop_path_rate=0.1,  # peak stochastic depth rate of T
        layer_scale_init_value=1e-6,
        out_indices=(-1,),
        out_norm=False,
        norm_cfg=dict(type='BN'),  # statistics of each process's own images, as in train.py
    ),
    head=dict(
        type='MlpClsHead',
        in_channels=768,
        num_classes=1000,
        dropout=0.0,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    # One of the two for each batch, with the probability of 0.5.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(  # Random Augment 9/0.5: timm's rand-m9-mstd0.5-inc1, which in train.py takes the place of colour jitter
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[round(value) for value in bgr_mean], interpolation='bicubic'),
    ),
    dict(  # mode, areas: train.py
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'
    ),  # 224 / 0.875: released
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
data_root = 'data/imagenet'  # with a folder for each class in train and val
train_dataloader = dict(
    batch_size=128,  # of 4096 = 8 GPUs × 128 × 4: released script. No repeated augmentation
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='ReproducibleInfiniteSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=93836, val_interval=3128)  # 300 epochs, validated every 10
val_cfg = dict(type='TolerantValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(  # no gradient clipping
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),  # train.py: of matrices only
)
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, by_epoch=False, begin=0, end=6256),  # 20 epochs from 1e-6: train.py
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=6256, end=93836),  # to 1e-5: train.py
]
auto_scale_lr = dict(enable=False, base_batch_size=4096)  # tools/train.py --auto-batch keeps it
