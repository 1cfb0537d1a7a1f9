# The ImageNet recipe with a small network, for ten classes of small images.
_base_ = '../../configs/imagenet/inceptionnext_t.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            depths=(1, 1, 1, 1),
            channels=(16, 32, 48, 64),
            mlp_ratios=(2, 2, 2, 2),
            band_kernel_size=5,
            square_kernel_size=3,
            branch_ratio=0.25,
        ),
    ),
    head=dict(in_channels=64, num_classes=10),
)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].update(scale=64)
test_pipeline[1].update(scale=64)
test_pipeline[2].update(crop_size=64)
train_dataloader = dict(batch_size=8, num_workers=0, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=0, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, by_epoch=False, begin=0, end=2),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=2, end=4),
]
auto_scale_lr = dict(base_batch_size=16)
