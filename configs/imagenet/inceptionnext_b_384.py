# Table 9, column Finetune. The released script differs: a constant learning rate, neither mixup nor cutmix.
_base_ = './inceptionnext_b.py'
model = dict(
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_base.pth',
    ),
    backbone=dict(drop_path_rate=0.7),
    head=dict(dropout=0.5),
)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].update(scale=384)
test_pipeline[1].update(scale=384)  # 384 / 1.0: released
test_pipeline[2].update(crop_size=384)
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))  # of 1024 = 8 GPUs × 32 × 4: script
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=37535, val_interval=1252)  # 30 epochs of 1251.1 iterations
default_hooks = dict(checkpoint=dict(interval=1252))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=37535)]  # eta_min: ours
custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', momentum=1e-4, update_buffers=True)]  # decay 0.9999
auto_scale_lr = dict(base_batch_size=1024)
