# From scratch, 131 epochs of 367 images: a higher learning rate than the paper's, and warm-up.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6000, val_interval=500)
val_cfg = dict(type='TolerantValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=200, end=6000),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)  # 1 × 8; tools/train.py --auto-batch keeps it
