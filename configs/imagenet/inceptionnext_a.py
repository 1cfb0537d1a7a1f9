# Table 9, column A. The released script of A trains 600 epochs instead of 450; values marked script are from there.
_base_ = './inceptionnext_t.py'
model = dict(
    backbone=dict(arch='atto', drop_path_rate=0.1),
    head=dict(in_channels=320),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.2), dict(type='CutMix', alpha=1.0)]),
)
train_pipeline = _base_.train_pipeline
train_pipeline[4].update(magnitude_level=5, magnitude_std='inf')  # 5/uniform; script: rand-m5-inc1-mstd101
train_pipeline[5].update(erase_prob=0.1)
train_dataloader = dict(batch_size=320, dataset=dict(pipeline=train_pipeline))  # of 1280 = 4 GPUs × 320: script
train_cfg = dict(max_iters=450411, val_interval=10010)  # 450 epochs of 1000.9 iterations
default_hooks = dict(checkpoint=dict(interval=10010))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-4, by_epoch=False, begin=0, end=5005),  # 5 epochs from 5e-7: script
    dict(type='CosineAnnealingLR', eta_min=5e-7, by_epoch=False, begin=5005, end=450411),  # to 5e-7: script
]
auto_scale_lr = dict(base_batch_size=1280)
